//! Rust from the .proto files, without protoc.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let files = protox::compile(["orders/v1/orders.proto"], ["proto"])?;
    // What reflection answers from.
    let to = PathBuf::from(std::env::var("OUT_DIR")?).join("descriptors.bin");
    std::fs::write(to, prost::Message::encode_to_vec(&files))?;
    tonic_prost_build::configure()
        .build_transport(false)
        .compile_fds(files)?;
    Ok(())
}
