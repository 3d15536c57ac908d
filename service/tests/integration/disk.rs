//! A disk that has no room left.

use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};

use crate::database::Database;
use crate::test_app::{Process, TestApp, audited, config_dir, eventually, free_port, order};

/// No file of the process may grow behind so many bytes; `None` for as large as they like.
fn limit_files(process: &Process, bytes: Option<u64>) {
    let maximum = getrlimit(Resource::Fsize).maximum;
    let limit = Rlimit {
        current: bytes.or(maximum),
        maximum,
    };
    prlimit(Some(Pid::from_child(&process.0)), Resource::Fsize, limit).unwrap();
}

/// What was answered as placed is there, what could not be written was not answered so, and it goes on
/// by itself once there is room.
#[tokio::test]
async fn a_full_disk_loses_no_order() {
    let database = Database::sqlite();
    let port = free_port();
    // Without the trap a file that may not grow would end the process; a full disk does not.
    let child = Command::new("sh")
        .args([
            "-c",
            "trap '' XFSZ; exec \"$0\"",
            env!("CARGO_BIN_EXE_service"),
        ])
        .env("SERVICE_CONFIG_DIR", config_dir())
        .env("SERVICE__DATABASE__URL", database.url())
        .env("SERVICE__SERVER__LISTEN", format!("127.0.0.1:{port}"))
        .env("SERVICE__SERVER__ADMIN_LISTEN", "127.0.0.1:0")
        // A busy machine is no full disk.
        .env("SERVICE__SERVER__REQUEST_TIMEOUT", "30s")
        .env("SERVICE__DATABASE__ACQUIRE_TIMEOUT", "20s")
        .env("SERVICE__DATABASE__BUSY_TIMEOUT", "20s")
        .env("SERVICE__LOGGING__LEVEL", "off")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let process = Process(child);
    let url = format!("http://127.0.0.1:{port}/v1/orders");
    let client = reqwest::Client::builder()
        .timeout(Duration::from_secs(40))
        .build()
        .unwrap();
    let place = async || {
        let answer = client.post(&url).json(&order()).send().await;
        answer.map_or(0, |answer| answer.status().as_u16())
    };
    let mut placed = 0;
    eventually("an order", async || place().await == 201).await;
    placed += 1;
    for _ in 0..3 {
        limit_files(&process, Some(1));
        for _ in 0..5 {
            assert_eq!(place().await, 503);
            let read = client.get(&url).send().await.unwrap();
            assert_eq!(read.status(), 200);
        }
        limit_files(&process, None);
        eventually("orders again", async || place().await == 201).await;
        placed += 1;
    }
    drop(process);

    let app = TestApp::start_on(database.clone(), |_| {}).await;
    assert_eq!(app.number_of_orders().await, placed);
    audited(&database, placed).await;
}
