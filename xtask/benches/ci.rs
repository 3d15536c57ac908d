//! What the runner of `ci` costs beyond the commands it runs: ratios, each of two things that were
//! measured one after the other in this run.
#![expect(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 5;

fn main() {
    let dir = tempfile::tempdir().expect("a directory for the steps");
    let root = dir.path();
    std::fs::write(root.join("Cargo.lock"), "").expect("a lock file");
    std::fs::write(root.join(".gitignore"), "/target/\n").expect("what git ignores");
    for number in 0..200 {
        let text = format!("// file {number}\n").repeat(300);
        std::fs::write(root.join(format!("{number}.rs")), text).expect("a file");
    }
    run(Command::new("git")
        .args(["init", "--quiet"])
        .current_dir(root));

    let chain: String = (0..8)
        .map(|n| format!("[[step]]\nname = \"s{n}\"\nrun = [\"sleep\", \"0.25\"]\nreads = []\n"))
        .collect();
    let by_hand = || {
        for _ in 0..8 {
            run(Command::new("sleep").arg("0.25"));
        }
    };
    let one_by_one = ratio(|| ci(root, &chain, &["--jobs", "1", "--no-cache"]), by_hand);
    println!("one after the other: {one_by_one:.3} of the same commands by hand");

    // a -> c -> e and b -> d, of which a, c, e is the longest way: 1.2 s.
    let graph = r#"
[[step]]
name = "a"
run = ["sleep", "0.4"]
reads = []
[[step]]
name = "b"
run = ["sleep", "0.3"]
reads = []
[[step]]
name = "c"
run = ["sleep", "0.4"]
reads = []
needs = ["a"]
[[step]]
name = "d"
run = ["sleep", "0.3"]
reads = []
needs = ["b"]
[[step]]
name = "e"
run = ["sleep", "0.4"]
reads = []
needs = ["c", "d"]
"#;
    let longest = || {
        for _ in 0..3 {
            run(Command::new("sleep").arg("0.4"));
        }
    };
    let side_by_side = ratio(|| ci(root, graph, &["--jobs", "2", "--no-cache"]), longest);
    println!("side by side: {side_by_side:.3} of the longest chain by hand");

    let five: String = (0..5)
        .map(|n| format!("[[step]]\nname = \"s{n}\"\nrun = [\"true\"]\nreads = [\"**/*.rs\"]\n"))
        .collect();
    ci(root, &five, &[]);
    let unchanged: Vec<Duration> = (0..ROUNDS)
        .map(|_| timed(|| ci(root, &five, &[])))
        .collect();
    println!(
        "five unchanged steps over 200 files: {:.0} ms",
        median(unchanged).as_secs_f64() * 1e3
    );
}

fn ci(root: &Path, steps: &str, arguments: &[&str]) {
    std::fs::write(root.join("target.toml"), steps).expect("the steps");
    run(Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["ci", "--steps", "target.toml"])
        .args(arguments)
        .env_remove("CARGO_TARGET_DIR")
        .current_dir(root));
}

fn run(command: &mut Command) {
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(status.expect("a command").success(), "{command:?}");
}

/// The median of `ours` as a share of the median of `theirs`, in alternation.
fn ratio(ours: impl Fn(), theirs: impl Fn()) -> f64 {
    let mut times: (Vec<Duration>, Vec<Duration>) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        times.0.push(timed(&ours));
        times.1.push(timed(&theirs));
    }
    median(times.0).as_secs_f64() / median(times.1).as_secs_f64()
}

fn timed(work: impl Fn()) -> Duration {
    let began = Instant::now();
    work();
    began.elapsed()
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}
