//! C code, macros, and code that was written while this was built.

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

include!(concat!(env!("OUT_DIR"), "/made.rs"));

#[derive(serde::Serialize)]
struct Said {
    arguments: usize,
    place: &'static str,
}

fn main() {
    let said = Said {
        arguments: made(std::env::args().count()),
        place: file!(),
    };
    println!("{}", serde_json::to_string(&said).unwrap());
}
