//! The program's commands, each as its own process.

use std::process::{Output, Stdio};
use std::time::Duration;

use test_servers::Server;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

use crate::broker::Broker;
use crate::database::Database;
use crate::test_app::{TestApp, config_dir, eventually, free_port, order};

/// Runs it with its words to its end, while services of the same test go on: they may be in the middle of
/// a write.
pub async fn run(command: &str, variables: &[(&str, &str)]) -> (i32, String) {
    let Output { status, stderr, .. } = Command::new(env!("CARGO_BIN_EXE_service"))
        .args(command.split(' '))
        .env("SERVICE_CONFIG_DIR", config_dir())
        .envs(variables.iter().copied())
        .output()
        .await
        .unwrap();
    let said = String::from_utf8(stderr).unwrap();
    (status.code().unwrap(), said)
}

/// A service at these addresses, on this database; it goes with what is started of it.
fn serving(database: &Database, public: &str, admin: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_service"));
    command
        .arg("serve")
        .env("SERVICE_CONFIG_DIR", config_dir())
        .env("SERVICE__DATABASE__URL", database.url())
        .env("SERVICE__SERVER__LISTEN", public)
        .env("SERVICE__SERVER__ADMIN_LISTEN", admin)
        .kill_on_drop(true);
    command
}

#[tokio::test]
async fn migrating_is_done_once_and_can_be_left_to_another() {
    for database in Database::each().await {
        // Nobody has brought the schema up to date, and this service must not.
        let waiting = TestApp::start_on(database.clone(), |config| {
            config.database.migrate = false;
        })
        .await;
        let not_ready = waiting.admin_text("/health/ready").await;
        assert!(not_ready.contains("\"ready\":false"), "{not_ready}");

        let url = [("SERVICE__DATABASE__URL", database.url())];
        let read_only = ("SERVICE__DATABASE__READ_ONLY", "true");
        let (code, said) = run("migrate", &[url[0], read_only]).await;
        assert_eq!((code, said.contains("already")), (1, false), "{said}");
        let (code, said) = run("migrate", &url).await;
        assert_eq!(
            (code, said.contains("the schema is new")),
            (0, true),
            "{said}"
        );
        let (code, said) = run("migrate", &url).await;
        assert_eq!((code, said.contains("already")), (0, true), "{said}");

        eventually("it is ready", async || {
            let ready = waiting.admin_text("/health/ready").await;
            !ready.contains("\"ready\":false")
        })
        .await;
        let (code, said) = run("migrate", &[url[0], read_only]).await;
        assert_eq!((code, said.contains("already")), (0, true), "{said}");
    }
}

/// Secrets are mounted as files; none of them is ever shown.
#[tokio::test]
async fn a_variable_may_name_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let good = format!("sqlite://{}/orders.db\n", dir.path().display());
    let good = write("good", &good);
    let name = "SERVICE__DATABASE__URL_FILE";
    let (code, said) = run("migrate", &[(name, &good)]).await;
    assert_eq!(
        (code, said.contains("the schema is new")),
        (0, true),
        "{said}"
    );
    assert!(dir.path().join("orders.db").exists());

    let wrong = write("wrong", "mysql://ada:hunter2@database/orders");
    let absent = dir.path().join("absent").display().to_string();
    for (variables, why) in [
        (vec![(name, wrong.as_str())], "database.url"),
        (vec![(name, absent.as_str())], "absent: No such file"),
        (
            vec![
                (name, good.as_str()),
                ("SERVICE__DATABASE__URL", "sqlite://x"),
            ],
            "SERVICE__DATABASE__URL is set, too",
        ),
    ] {
        let (code, said) = run("check-config", &variables).await;
        assert_eq!((code, said.contains(why)), (78, true), "{said}");
        assert!(!said.contains("hunter2"), "{said}");
    }
}

/// What is logged can be changed while the process runs, to find out about it.
#[tokio::test]
async fn the_log_is_turned_up_and_down_while_it_runs() {
    let database = Database::sqlite();
    let address = || format!("127.0.0.1:{}", free_port());
    let (public, admin) = (address(), address());
    let mut child = serving(&database, &public, &admin)
        .env("SERVICE__LOGGING__LEVEL", "info,access=error")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut until = async |wanted: &str| {
        let mut lines = Vec::new();
        loop {
            let line = tokio::time::timeout(Duration::from_secs(60), log.next_line());
            let line = line.await.expect("the log says more").unwrap();
            let line = line.expect("the log goes on");
            lines.push(line);
            if lines.last().unwrap().contains(wanted) {
                return lines.join("\n");
            }
        }
    };
    until("serving").await;
    let client = reqwest::Client::new();
    let level = format!("http://{admin}/log-level");
    let put = async |wanted: &str| {
        let body = serde_json::json!({ "level": wanted });
        client.put(&level).json(&body).send().await.unwrap()
    };
    let ask = async |path: &str| {
        let answer = client.get(format!("http://{public}{path}")).send().await;
        assert_eq!(answer.unwrap().status(), 200);
    };
    let now: serde_json::Value = client
        .get(&level)
        .send()
        .await
        .unwrap()
        .json()
        .await
        .unwrap();
    assert_eq!(now["level"], "info,access=error");
    let wrong = put("info,access=loud").await;
    assert_eq!(wrong.status(), 422);
    assert!(wrong.text().await.unwrap().contains("not a log filter"));

    ask("/info").await;
    assert_eq!(put("info,access=info").await.status(), 200);
    ask("/v1/orders").await;
    let said = until("answered").await;
    assert!(
        said.contains("/v1/orders") && !said.contains("/info"),
        "{said}"
    );
    assert_eq!(put("info,access=error").await.status(), 200);
    ask("/v1/orders").await;
    assert_eq!(put("info").await.status(), 200);
    let said = until("filter=\"info\"").await;
    assert!(!said.contains("answered"), "{said}");
}

/// A log whose reader has stopped, as where a node's disk is busy, holds nobody up, and its end either.
#[tokio::test]
async fn nobody_waits_for_the_log() {
    let database = Database::sqlite();
    let address = || format!("127.0.0.1:{}", free_port());
    let (public, admin) = (address(), address());
    let (unread, log) = std::io::pipe().unwrap();
    let mut child = serving(&database, &public, &admin)
        .env("SERVICE__RATE_LIMIT__BURST", "20000")
        .stdout(Stdio::null())
        .stderr(log)
        .spawn()
        .unwrap();
    let client = reqwest::Client::new();
    let ready = format!("http://{admin}/health/ready");
    eventually("it is ready", async || {
        client.get(&ready).send().await.is_ok()
    })
    .await;
    let dropped = async || {
        let metrics = client.get(format!("http://{admin}/metrics")).send().await;
        let metrics = metrics.unwrap().text().await.unwrap();
        let line = metrics
            .lines()
            .find_map(|line| line.strip_prefix("log_lines_dropped_total "));
        line.expect(&metrics).parse::<f64>().unwrap()
    };
    assert_eq!(dropped().await, 0.0);
    // A pipe takes some hundred lines, and four thousand wait.
    for _ in 0..6_000 {
        let answer = client.get(format!("http://{public}/info")).send().await;
        assert_eq!(answer.unwrap().status(), 200);
    }
    assert!(dropped().await > 0.0);
    let pid = i32::try_from(child.id().unwrap()).unwrap();
    rustix::process::kill_process(
        rustix::process::Pid::from_raw(pid).unwrap(),
        rustix::process::Signal::TERM,
    )
    .unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(60), child.wait()).await;
    assert!(ended.expect("it ends").unwrap().success());
    drop(unread);
}

/// An address with a user and a password.
fn with_user(address: &str, user: [&str; 2]) -> String {
    address.replacen("://", &format!("://{}@", user.join(":")), 1)
}

/// Secrets are in no line of the log, however much is logged, and in no answer: not those of the settings,
/// not a caller's token, and not what only the service may read.
#[tokio::test]
async fn no_secret_is_ever_shown() {
    let redis = test_servers::lease(Server::Redis).await.unwrap();
    let redis = with_user(&redis.address, ["", "canary-redis"]);
    // It is asked to let somebody in, and does not.
    let rabbitmq = Broker::rabbitmq().await;
    let refused = format!("amqp://{}", rabbitmq.address());
    let refused = with_user(&refused, ["guest", "canary-rabbitmq"]);
    let key = "Y2FuYXJ5LWtleS1jYW5hcnkta2V5LWNhbmFyeS1rZXk=";
    let canaries = ["canary", "Y2FuYXJ5"];
    for bus in ["rabbitmq", "kafka"] {
        let (database, dir) = (Database::sqlite(), tempfile::tempdir().unwrap());
        let address = || format!("127.0.0.1:{}", free_port());
        let (public, admin) = (address(), address());
        let log = dir.path().join("log");
        let _running = serving(&database, &public, &admin)
            .env("SERVICE__DATABASE__ENCRYPTION_KEYS", format!("a:{key}"))
            .env("SERVICE__LOGGING__LEVEL", "trace")
            .env("SERVICE__AUTH__CLIENT_SECRET", "canary-client")
            .env("SERVICE__CACHE__KIND", "redis")
            .env("SERVICE__REDIS__URL", &redis)
            .env("SERVICE__EVENTS__BUS", bus)
            .env("SERVICE__RABBITMQ__URL", &refused)
            .env("SERVICE__KAFKA__BOOTSTRAP_SERVERS", address())
            .env("SERVICE__KAFKA__USER", "ada")
            .env("SERVICE__KAFKA__PASSWORD", "canary-kafka")
            .stderr(std::fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        let client = reqwest::Client::new();
        let mut shown = String::new();
        let mut see = async |request: reqwest::RequestBuilder| {
            let answer = request.bearer_auth("canary-token").send().await;
            let text = answer.unwrap().text().await.unwrap();
            shown.push_str(&text);
            text
        };
        let at = |path: &str| format!("http://{public}{path}");
        eventually("it runs", async || {
            client.get(at("/health/live")).send().await.is_ok()
        })
        .await;
        let mut with_contact = order();
        with_contact["contact"] = serde_json::json!("canary@example.com");
        let placed = client.post(at("/v1/orders")).json(&with_contact);
        let placed = placed.send().await.unwrap();
        assert_eq!(placed.status(), 201);
        let placed: serde_json::Value = placed.json().await.unwrap();
        let id = placed["id"].as_str().unwrap();
        // By the cache, which cannot be had, and what cannot be read.
        for path in [
            "/info",
            "/v1/nothing",
            "/v1/orders?limit=x",
            "/health/ready",
        ] {
            see(client.get(at(path))).await;
        }
        client
            .get(at(&format!("/v1/orders/{id}")))
            .send()
            .await
            .unwrap();
        see(client.post(at("/v1/orders")).body("{")).await;
        see(client.get(format!("http://{admin}/info"))).await;
        eventually("the bus was asked for", async || {
            let metrics = see(client.get(format!("http://{admin}/metrics"))).await;
            metrics.contains("duty_failures_total{duty=\"relay\"}")
        })
        .await;
        let log = std::fs::read_to_string(&log).unwrap();
        assert!(log.contains("DEBUG") && log.contains("relay"), "{log}");
        for canary in canaries {
            for text in [&shown, &log] {
                let line = text.lines().find(|line| line.contains(canary));
                assert_eq!(line, None, "{bus}");
            }
        }
    }
}

#[tokio::test]
async fn a_configuration_can_be_checked_beforehand() {
    let environment = ("SERVICE_ENVIRONMENT", "production");
    let issuer = ("SERVICE__AUTH__ISSUER", "https://login.example");
    let (code, said) = run("check-config", &[environment, issuer]).await;
    assert_eq!((code, said.contains("is good")), (0, true), "{said}");
    let wrong = ("SERVICE__ORDERS__PAGE_SIZE", "0");
    let (code, said) = run("check-config", &[environment, issuer, wrong]).await;
    assert_eq!(
        (code, said.contains("SERVICE__ORDERS__PAGE_SIZE")),
        (78, true),
        "{said}"
    );
    // What `serve` would find out is found out before.
    for (wrong, code, why) in [
        (
            ("SERVICE__RABBITMQ__URL", "amqp://here:port"),
            78,
            "rabbitmq.url",
        ),
        (("SERVICE__REDIS__URL", "redis:here"), 78, "redis.url"),
        (
            ("SERVICE__KAFKA__CA", "/nowhere.pem"),
            1,
            "kafka.ca = /nowhere.pem",
        ),
        (
            ("SERVICE__AUTH__MODE", "development"),
            1,
            "not for production",
        ),
    ] {
        let (got, said) = run("check-config", &[environment, issuer, wrong]).await;
        assert_eq!((got, said.contains(why)), (code, true), "{said}");
    }
    // As it ships, nobody has said whose tokens production believes.
    let (code, said) = run("check-config", &[environment]).await;
    assert_eq!(
        (code, said.contains("SERVICE__AUTH__ISSUER")),
        (78, true),
        "{said}"
    );
    let (code, said) = run("sevre", &[]).await;
    assert_eq!((code, said.contains("'serve'")), (2, true), "{said}");
}
