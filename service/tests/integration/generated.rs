//! What is made from the .proto files is in the repository, so that a build needs no compiler of them.

use std::path::Path;

use prost::Message;

/// Set, what differs is written instead.
const UPDATE: &str = "UPDATE_GENERATED";

/// Here it is made anew, without protoc, and is the same.
#[test]
fn what_is_made_from_the_proto_files_is_up_to_date() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let proto = package.join("proto");
    let files = protox::compile([proto.join("orders/v1/orders.proto")], [proto]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let descriptors = files.encode_to_vec();
    tonic_prost_build::configure()
        .build_transport(false)
        .out_dir(dir.path())
        .compile_fds(files)
        .unwrap();
    let code = std::fs::read(dir.path().join("orders.v1.rs")).unwrap();
    let mut differ = Vec::new();
    // Reflection answers from the descriptors.
    for (name, made) in [("orders.v1.rs", code), ("descriptors.bin", descriptors)] {
        let kept = package.join("src/api/grpc").join(name);
        if std::fs::read(&kept).unwrap_or_default() == made {
            continue;
        }
        match std::env::var_os(UPDATE) {
            Some(_) => std::fs::write(&kept, made).unwrap(),
            None => differ.push(kept),
        }
    }
    assert!(
        differ.is_empty(),
        "{differ:?} are of other .proto files; make them anew: {UPDATE}=1 cargo test --package service \
         --test integration generated"
    );
}
