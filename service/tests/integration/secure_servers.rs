//! Servers that are reached by TLS, and want to know who comes.

use std::num::NonZeroU32;
use std::path::Path;

use aws_lc_rs::pbkdf2;
use krafka::admin::AdminClient;
use krafka::auth::ScramMechanism;
use krafka::protocol::ScramCredentialUpsertion;
use service::adapters::bus::{self, BusError};
use service::adapters::cache;
use service::config::{BusKind, CacheKind, Config, Mechanism, Secret, ServerUrl};
use tempfile::TempDir;
use test_servers::{Identity, Secure, Server};

use crate::test_app::{eventually, shipped_config};
use crate::tls::Authority;

const PASSWORD: &str = "correct horse";

/// A server, and the file of who has signed its certificate, beside that of somebody else.
async fn start(server: Server) -> (Secure, TempDir) {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (certificate, key) = authority.sign("127.0.0.1");
    let files = tempfile::tempdir().unwrap();
    std::fs::write(files.path().join("ca.crt"), authority.pem()).unwrap();
    std::fs::write(files.path().join("stranger.crt"), stranger.pem()).unwrap();
    let identity = Identity { certificate, key };
    let secure = Secure::start(server, &identity, PASSWORD).await.unwrap();
    (secure, files)
}

/// Whether the broker can be used with this configuration.
async fn reaches(config: &Config) -> Result<(), BusError> {
    bus::open(config).subscribe("totals").await.map(drop)
}

fn secret(text: &str) -> Secret {
    serde_json::from_value(text.into()).unwrap()
}

#[tokio::test]
async fn redis_is_reached_by_tls() {
    let (server, files) = start(Server::Redis).await;
    let get = async |scheme: &str, ca: Option<&str>| {
        let mut config = shipped_config();
        config.cache.kind = CacheKind::Redis;
        config.redis.url = ServerUrl(format!("{scheme}://{}", server.address));
        config.redis.ca = ca.map(|ca| files.path().join(ca));
        let cache = cache::open(&config).map_err(|error| format!("{error:#}"))?;
        let got = cache.unwrap().get("one").await;
        got.map_err(|error| error.to_string())
    };
    assert_eq!(get("rediss", Some("ca.crt")).await, Ok(None));
    for (scheme, ca, why) in [
        ("rediss", None, "certificate"),
        ("rediss", Some("stranger.crt"), "certificate"),
        ("rediss", Some("missing.crt"), "redis.ca"),
        ("redis", None, ""),
    ] {
        let error = get(scheme, ca).await.unwrap_err();
        assert!(error.contains(why), "{scheme}, {ca:?}: {error}");
    }
}

#[tokio::test]
async fn rabbitmq_is_reached_by_tls() {
    let (broker, files) = start(Server::RabbitMq).await;
    let config = |ca: Option<&str>| {
        let mut config = shipped_config();
        config.events.bus = BusKind::RabbitMq;
        config.rabbitmq.url = ServerUrl(format!("amqps://guest:guest@{}/%2f", broker.address));
        config.rabbitmq.ca = ca.map(|ca| files.path().join(ca));
        config
    };
    reaches(&config(Some("ca.crt"))).await.unwrap();
    for (wrong, why) in [
        (None, "certificate"),
        (Some("stranger.crt"), "certificate"),
        (Some("missing.crt"), "rabbitmq.ca"),
    ] {
        let error = reaches(&config(wrong)).await.unwrap_err().to_string();
        assert!(error.contains(why), "{wrong:?}: {error}");
    }
}

#[tokio::test]
async fn kafka_is_reached_by_tls_and_knows_who_comes() {
    let (broker, files) = start(Server::Kafka).await;
    let plain = broker.plain_address.as_ref().unwrap();
    make_users(plain).await;
    let config = |mechanism, password: &str, ca: &Path| {
        let mut config = shipped_config();
        config.events.bus = BusKind::Kafka;
        let kafka = &mut config.kafka;
        kafka.bootstrap_servers.clone_from(&broker.address);
        kafka.tls = true;
        kafka.ca = Some(ca.to_owned());
        kafka.user = Some("ada".to_owned());
        kafka.password = Some(secret(password));
        kafka.mechanism = mechanism;
        config
    };
    let (ca, stranger) = (
        files.path().join("ca.crt"),
        files.path().join("stranger.crt"),
    );
    for mechanism in [
        Mechanism::Plain,
        Mechanism::ScramSha256,
        Mechanism::ScramSha512,
    ] {
        // Brokers learn of new users a little later.
        let known = config(mechanism, PASSWORD, &ca);
        eventually(&format!("{mechanism:?}"), async || {
            reaches(&known).await.is_ok()
        })
        .await;
        let unknown = reaches(&config(mechanism, "wrong", &ca)).await;
        assert!(unknown.is_err(), "{mechanism:?}");
    }
    assert!(
        reaches(&config(Mechanism::Plain, PASSWORD, &stranger))
            .await
            .is_err()
    );
}

/// SCRAM's users are the broker's own data.
async fn make_users(broker: &str) {
    let admin = AdminClient::builder().bootstrap_servers(broker);
    let admin = admin.build().await.unwrap();
    let iterations = 4096;
    let user = |mechanism, algorithm, length| {
        let mut salted = vec![0; length];
        let times = NonZeroU32::new(iterations).unwrap();
        pbkdf2::derive(algorithm, times, b"salt", PASSWORD.as_bytes(), &mut salted);
        ScramCredentialUpsertion {
            name: "ada".into(),
            mechanism,
            iterations: i32::try_from(iterations).unwrap(),
            salt: b"salt".to_vec().into(),
            salted_password: salted.into(),
        }
    };
    let users = [
        user(ScramMechanism::Sha256, pbkdf2::PBKDF2_HMAC_SHA256, 32),
        user(ScramMechanism::Sha512, pbkdf2::PBKDF2_HMAC_SHA512, 64),
    ];
    // One user of a request is one credential.
    for user in users {
        let made = admin.alter_user_scram_credentials(Vec::new(), vec![user]);
        for made in made.await.unwrap() {
            assert!(made.error.is_none(), "{:?}", made.error);
        }
    }
}
