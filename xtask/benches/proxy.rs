//! The sandbox's proxy against nginx, on the same two upstreams, in alternating rounds.
//!
//! `cargo bench --package xtask --features rollout` prints requests for each second of processor
//! time, and the ratio. It needs nginx, wrk and h2load (Debian: nginx-light, wrk,
//! nghttp2-client), talks to loopback only, and ends by itself.
#![expect(clippy::unwrap_used, reason = "a benchmark that cannot go on fails")]
#![expect(clippy::print_stdout, reason = "its result is what it prints")]

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const ROUNDS: usize = 3;
const SECONDS: &str = "4";

fn main() {
    let dir = tempfile::tempdir().unwrap();
    let [u1, u2, v1, v2, n1, n2, p1, p2] = free_ports();
    let upstreams = nginx(dir.path(), "upstreams", &upstreams(&[u1, u2], &[v1, v2]));
    let rival = nginx(dir.path(), "proxy", &rival(n1, n2, &[u1, u2], &[v1, v2]));
    let ours = [proxy(p1, u1, u2), proxy(p2, v1, v2)];
    for port in [u1, u2, v1, v2, n1, n2, p1, p2] {
        await_port(port);
    }
    println!("requests for each second of the proxy's processor time, weights 90/10");
    for (name, load, nginx_port, our_port, our_pid) in [
        ("HTTP/1.1", wrk as fn(u16) -> f64, n1, p1, ours[0].0.id()),
        ("h2c", h2load as fn(u16) -> f64, n2, p2, ours[1].0.id()),
    ] {
        let mut ratios = Vec::new();
        for _ in 0..ROUNDS {
            let theirs = efficiency(load, nginx_port, rival.0.id());
            let mine = efficiency(load, our_port, our_pid);
            ratios.push(mine / theirs);
            println!(
                "{name:9} nginx {theirs:8.0}   xtask {mine:8.0}   ratio {:.2}",
                mine / theirs
            );
        }
        ratios.sort_by(f64::total_cmp);
        println!("{name:9} median ratio {:.2}", ratios[ROUNDS / 2]);
    }
    drop((upstreams, rival, ours));
}

/// A process that ends with the benchmark.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        // SIGTERM, not SIGKILL: nginx ends its workers then.
        let _ = Command::new("kill").arg(self.0.id().to_string()).status();
        let _ = self.0.wait();
    }
}

/// Requests for each second of processor time that the process and its children used.
fn efficiency(load: fn(u16) -> f64, port: u16, pid: u32) -> f64 {
    let pids: Vec<u32> = std::iter::once(pid).chain(children(pid)).collect();
    let used = || pids.iter().map(|pid| ticks(*pid)).sum::<u64>();
    let before = used();
    let requests = load(port);
    // Linux counts in hundredths of a second (USER_HZ).
    requests / ((used() - before) as f64 / 100.0)
}

fn ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name before may hold spaces; utime and stime are fields 14 and 15 (proc(5)).
    let fields: Vec<&str> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn children(pid: u32) -> Vec<u32> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    text.unwrap_or_default()
        .split_whitespace()
        .filter_map(|pid| pid.parse().ok())
        .collect()
}

fn wrk(port: u16) -> f64 {
    let duration = format!("-d{SECONDS}s");
    let text = run(
        "wrk",
        &[
            "-t1",
            "-c64",
            &duration,
            &format!("http://127.0.0.1:{port}/"),
        ],
    );
    assert!(!text.contains("Non-2xx"), "{text}");
    number_before(&text, " requests in ")
}

fn h2load(port: u16) -> f64 {
    let url = format!("http://127.0.0.1:{port}/");
    let text = run("h2load", &["-c16", "-m8", "-D", SECONDS, &url]);
    assert!(text.contains(" 0 failed, 0 errored"), "{text}");
    number_before(&text, " done, ")
}

fn number_before(text: &str, word: &str) -> f64 {
    let (before, _) = text
        .split_once(word)
        .unwrap_or_else(|| panic!("no {word:?} in {text}"));
    let number = before.rsplit([' ', '\n']).next().unwrap();
    number
        .parse()
        .unwrap_or_else(|_| panic!("{number:?} in {text}"))
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    let output =
        output.unwrap_or_else(|error| panic!("{program}: {error}; see the top of this file"));
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

fn proxy(port: u16, stable: u16, candidate: u16) -> Guard {
    let child = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .args(["sandbox", "proxy", "--listen", &format!("127.0.0.1:{port}")])
        .args(["--upstream", &format!("127.0.0.1:{stable}=90")])
        .args(["--upstream", &format!("127.0.0.1:{candidate}=10")])
        .stdout(Stdio::null())
        .spawn();
    Guard(child.unwrap())
}

fn nginx(dir: &Path, name: &str, http: &str) -> Guard {
    let config = dir.join(format!("{name}.conf"));
    let text = format!(
        "daemon off; worker_processes 2; pid {0}/{name}.pid; error_log {0}/{name}.log;\n\
         events {{ worker_connections 1024; }}\n\
         http {{ access_log off; client_body_temp_path {0}; proxy_temp_path {0}; \
         fastcgi_temp_path {0}; uwsgi_temp_path {0}; scgi_temp_path {0}; \
         keepalive_requests 100000000;\n{http} }}\n",
        dir.display()
    );
    std::fs::write(&config, text).unwrap();
    let child = Command::new("nginx")
        .arg("-c")
        .arg(&config)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    Guard(child.unwrap_or_else(|error| panic!("nginx: {error}; see the top of this file")))
}

fn upstreams(http1: &[u16], http2: &[u16]) -> String {
    let server = |port: &u16, kind: &str| {
        format!(
            "server {{ listen 127.0.0.1:{port} {kind}; location / {{ \
             default_type application/json; return 200 '{{\"id\":1,\"status\":\"open\"}}'; }} }}\n"
        )
    };
    let plain = http1.iter().map(|port| server(port, ""));
    plain
        .chain(http2.iter().map(|port| server(port, "http2")))
        .collect()
}

fn rival(port1: u16, port2: u16, http1: &[u16], http2: &[u16]) -> String {
    let group = |name: &str, ports: &[u16]| {
        format!(
            "upstream {name} {{ server 127.0.0.1:{} weight=9; server 127.0.0.1:{} weight=1; \
             keepalive 64; keepalive_requests 100000000; }}\n",
            ports[0], ports[1]
        )
    };
    format!(
        "{}{}server {{ listen 127.0.0.1:{port1}; location / {{ proxy_pass http://one; \
         proxy_http_version 1.1; proxy_set_header Connection \"\"; \
         proxy_set_header X-Forwarded-For $remote_addr; }} }}\n\
         server {{ listen 127.0.0.1:{port2} http2; location / {{ grpc_pass grpc://two; \
         grpc_set_header X-Forwarded-For $remote_addr; }} }}\n",
        group("one", http1),
        group("two", http2)
    )
}

fn free_ports<const N: usize>() -> [u16; N] {
    let sockets: [TcpListener; N] =
        std::array::from_fn(|_| TcpListener::bind("127.0.0.1:0").unwrap());
    sockets.map(|socket| socket.local_addr().unwrap().port())
}

fn await_port(port: u16) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port))).is_err() {
        assert!(Instant::now() < deadline, "nothing listens on {port}");
        std::thread::yield_now();
    }
}
