//! Each server does its work: something goes in and comes out again. Each test has a database,
//! virtual host, topic or name of its own, so that they can share a server.

use std::collections::BTreeMap;

use futures_util::StreamExt;
use sqlx::{Connection, Executor, PgConnection};
use test_servers::{Server, lease};

/// A name that no other test has.
fn name() -> String {
    format!("test-{}", uuid::Uuid::new_v4().simple())
}

#[tokio::test]
async fn postgres_keeps_a_row() {
    let server = lease(Server::Postgres).await.unwrap();
    let mut admin = PgConnection::connect(&server.address).await.unwrap();
    let database = name();
    let create = format!("CREATE DATABASE \"{database}\"");
    admin.execute(create.as_str()).await.unwrap();
    let (place, _) = server.address.rsplit_once('/').unwrap();
    let own = format!("{place}/{database}");
    let mut own = PgConnection::connect(&own).await.unwrap();
    own.execute("CREATE TABLE t (x text); INSERT INTO t VALUES ('\u{e9}')")
        .await
        .unwrap();
    let (x, version): (String, i32) =
        sqlx::query_as("SELECT x, current_setting('server_version_num')::int FROM t")
            .fetch_one(&mut own)
            .await
            .unwrap();
    assert_eq!(x, "\u{e9}");
    assert!(version >= 170_000, "PostgreSQL {version}");
}

#[tokio::test]
async fn redis_keeps_a_value() {
    use redis::AsyncCommands;
    let server = lease(Server::Redis).await.unwrap();
    let client = redis::Client::open(server.address.as_str()).unwrap();
    let mut connection = client.get_multiplexed_async_connection().await.unwrap();
    let key = name();
    let () = connection.set(&key, 7).await.unwrap();
    let value: i64 = connection.get(&key).await.unwrap();
    assert_eq!(value, 7);
}

#[tokio::test]
async fn rabbitmq_delivers_what_was_confirmed() {
    use lapin::options::{
        BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, ConfirmSelectOptions,
        QueueDeclareOptions,
    };
    use lapin::{BasicProperties, Confirmation, Connection, ConnectionProperties};
    let server = lease(Server::RabbitMq).await.unwrap();
    let (broker, management) = test_servers::rabbitmq(&server.address).unwrap();
    let host = name();
    let web = reqwest::Client::new();
    let put = |path: String| {
        let request = web.put(format!("{management}/api/{path}"));
        request.basic_auth("guest", Some("guest"))
    };
    let rights = serde_json::json!({ "configure": ".*", "write": ".*", "read": ".*" });
    let made = put(format!("vhosts/{host}")).send().await.unwrap();
    made.error_for_status().unwrap();
    let granted = put(format!("permissions/{host}/guest")).json(&rights);
    granted.send().await.unwrap().error_for_status().unwrap();

    let address = format!("{broker}/{host}");
    let connection = Connection::connect(&address, ConnectionProperties::default())
        .await
        .unwrap();
    let channel = connection.create_channel().await.unwrap();
    let confirm = ConfirmSelectOptions::default();
    channel.confirm_select(confirm).await.unwrap();
    let queue = QueueDeclareOptions::default();
    channel
        .queue_declare("q".into(), queue, BTreeMap::new().into())
        .await
        .unwrap();
    let publish = BasicPublishOptions::default();
    let confirmed = channel
        .basic_publish(
            "".into(),
            "q".into(),
            publish,
            b"hi",
            BasicProperties::default(),
        )
        .await
        .unwrap()
        .await
        .unwrap();
    assert_eq!(confirmed, Confirmation::Ack(None));
    let consume = BasicConsumeOptions::default();
    let mut deliveries = channel
        .basic_consume("q".into(), "".into(), consume, BTreeMap::new().into())
        .await
        .unwrap();
    let delivery = deliveries.next().await.unwrap().unwrap();
    assert_eq!(delivery.data, b"hi");
    delivery.ack(BasicAckOptions::default()).await.unwrap();
}

#[tokio::test]
async fn kafka_keeps_a_record() {
    use rskafka::client::ClientBuilder;
    use rskafka::client::partition::{Compression, UnknownTopicHandling};
    use rskafka::record::Record;
    let server = lease(Server::Kafka).await.unwrap();
    let client = ClientBuilder::new(vec![server.address.clone()])
        .build()
        .await
        .unwrap();
    let topic = name();
    let controller = client.controller_client().unwrap();
    controller.create_topic(&topic, 1, 1, 10_000).await.unwrap();
    let partition = client
        .partition_client(&topic, 0, UnknownTopicHandling::Retry)
        .await
        .unwrap();
    let record = Record {
        key: None,
        value: Some(b"hi".to_vec()),
        headers: BTreeMap::new(),
        timestamp: rskafka::chrono::DateTime::UNIX_EPOCH,
    };
    partition
        .produce(vec![record], Compression::NoCompression)
        .await
        .unwrap();
    let (records, _) = partition
        .fetch_records(0, 1..1_000_000, 10_000)
        .await
        .unwrap();
    assert_eq!(records[0].record.value.as_deref(), Some(&b"hi"[..]));
}

/// The way of a blob in the OCI distribution specification.
#[tokio::test]
async fn the_registry_gives_back_a_blob() {
    // SHA-256 of "hi".
    const DIGEST: &str = "sha256:8f434346648f6b96df89dda901c5176b10a6d83961dd3c1ac88b59b2dc327aa4";
    let server = lease(Server::Registry).await.unwrap();
    let web = reqwest::Client::new();
    let repository = format!("{}/v2/{}/blobs", server.address, name());
    let begun = web
        .post(format!("{repository}/uploads/"))
        .send()
        .await
        .unwrap();
    assert_eq!(begun.status(), 202);
    let place = begun.headers()["location"].to_str().unwrap();
    let place = reqwest::Url::parse(&server.address)
        .unwrap()
        .join(place)
        .unwrap();
    let put = web.put(place).query(&[("digest", DIGEST)]).body("hi");
    assert_eq!(put.send().await.unwrap().status(), 201);
    let blob = web
        .get(format!("{repository}/{DIGEST}"))
        .send()
        .await
        .unwrap();
    assert_eq!(blob.text().await.unwrap(), "hi");
}
