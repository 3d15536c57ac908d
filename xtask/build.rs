//! Tells the program the hash of what it is built from.

#[path = "src/sources.rs"]
mod sources;

use std::path::Path;

fn main() -> std::io::Result<()> {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    println!("cargo::rustc-env=XTASK_SOURCES={}", sources::hash(package)?);
    for part in ["Cargo.toml", "src", "servers/Cargo.toml", "servers/src"] {
        println!("cargo::rerun-if-changed={part}");
    }
    Ok(())
}
