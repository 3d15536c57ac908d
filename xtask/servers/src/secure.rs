//! Servers that are reached by TLS, for tests of the clients' side.

use anyhow::{Context, Result, bail};
use testcontainers::core::{IntoContainerPort, WaitFor};
use testcontainers::{ContainerAsync, ContainerRequest, GenericImage, ImageExt};

use crate::server::{free_port, kafka_variables, named, run};
use crate::{ADVICE, Server, image_of};

/// The server's certificate and its key, as PEM.
pub struct Identity {
    pub certificate: String,
    pub key: String,
}

/// A server of a test's own, which ends with this value.
pub struct Secure {
    /// `HOST:PORT`, by TLS.
    pub address: String,
    /// The same server, without. Only Kafka's.
    pub plain_address: Option<String>,
    _container: ContainerAsync<GenericImage>,
}

impl Secure {
    /// With a certificate for `127.0.0.1`: Redis, RabbitMQ, where the user `guest` has the password
    /// `guest`, or Kafka, where the user `ada` shows by SASL's `PLAIN` that it knows `password`; SCRAM has
    /// no user yet.
    ///
    /// # Errors
    /// As [`lease`](crate::lease), and for other servers.
    pub async fn start(server: Server, identity: &Identity, password: &str) -> Result<Self> {
        let image = image_of(server).await?;
        let started = match server {
            Server::Redis => redis(&image, identity).await,
            Server::RabbitMq => rabbitmq(&image, identity).await,
            Server::Kafka => kafka(&image, identity, password).await,
            other => bail!("{} is not started by TLS", other.name()),
        };
        let starting = || format!("starting {} by TLS from {image}; {ADVICE}", server.name());
        started.with_context(starting)
    }
}

/// <https://redis.io/docs/latest/operate/oss_and_stack/management/security/encryption/>
async fn redis(image: &str, identity: &Identity) -> Result<Secure> {
    let options = "redis-server --port 0 --tls-port 6380 --tls-auth-clients no \
                   --tls-cert-file /etc/tls.crt --tls-key-file /etc/tls.key \
                   --tls-ca-cert-file /etc/tls.crt";
    let request = named(image)
        .with_exposed_port(6380.tcp())
        .with_wait_for(WaitFor::message_on_stdout("Ready to accept connections"))
        .with_cmd(options.split_whitespace())
        .with_copy_to("/etc/tls.crt", bytes(&identity.certificate))
        .with_copy_to("/etc/tls.key", bytes(&identity.key));
    with_port(request, 6380).await
}

/// <https://www.rabbitmq.com/docs/ssl#enabling-tls>
async fn rabbitmq(image: &str, identity: &Identity) -> Result<Secure> {
    let settings = "listeners.ssl.default = 5671
ssl_options.certfile = /etc/rabbitmq/tls.crt
ssl_options.keyfile = /etc/rabbitmq/tls.key
ssl_options.cacertfile = /etc/rabbitmq/tls.crt
ssl_options.verify = verify_none
";
    let request = named(image)
        .with_exposed_port(5671.tcp())
        .with_wait_for(WaitFor::message_on_stdout("Server startup complete"))
        .with_copy_to("/etc/rabbitmq/conf.d/20-tls.conf", bytes(settings))
        .with_copy_to("/etc/rabbitmq/tls.crt", bytes(&identity.certificate))
        .with_copy_to("/etc/rabbitmq/tls.key", bytes(&identity.key));
    with_port(request, 5671).await
}

/// <https://kafka.apache.org/documentation/#security_ssl>
async fn kafka(image: &str, identity: &Identity, password: &str) -> Result<Secure> {
    let (plain, secure) = (free_port()?, free_port()?);
    let mut variables = kafka_variables();
    let user = "org.apache.kafka.common.security.plain.PlainLoginModule required";
    variables.extend([
        (
            "LISTENERS",
            format!("PLAINTEXT://:{plain},SECURE://:{secure},CONTROLLER://localhost:9093"),
        ),
        (
            "ADVERTISED_LISTENERS",
            format!("PLAINTEXT://127.0.0.1:{plain},SECURE://127.0.0.1:{secure}"),
        ),
        (
            "LISTENER_SECURITY_PROTOCOL_MAP",
            "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SECURE:SASL_SSL".to_owned(),
        ),
        ("SSL_KEYSTORE_TYPE", "PEM".to_owned()),
        ("SSL_KEYSTORE_LOCATION", "/etc/kafka-tls.pem".to_owned()),
        (
            "SASL_ENABLED_MECHANISMS",
            "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512".to_owned(),
        ),
        (
            "LISTENER_NAME_SECURE_PLAIN_SASL_JAAS_CONFIG",
            format!("{user} user_ada=\"{password}\";"),
        ),
    ]);
    for name in [
        "LISTENER_NAME_SECURE_SCRAM___SHA___256_SASL_JAAS_CONFIG",
        "LISTENER_NAME_SECURE_SCRAM___SHA___512_SASL_JAAS_CONFIG",
    ] {
        let scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;";
        variables.push((name, scram.to_owned()));
    }
    let keys = format!("{}{}", identity.key, identity.certificate);
    let mut request = named(image)
        .with_wait_for(WaitFor::message_on_stdout("Kafka Server started"))
        .with_mapped_port(plain, plain.tcp())
        .with_mapped_port(secure, secure.tcp())
        .with_copy_to("/etc/kafka-tls.pem", bytes(&keys));
    for (name, value) in variables {
        request = request.with_env_var(format!("KAFKA_{name}"), value);
    }
    let container = run(request).await?;
    Ok(Secure {
        address: format!("127.0.0.1:{secure}"),
        plain_address: Some(format!("127.0.0.1:{plain}")),
        _container: container,
    })
}

/// Starts it, and finds out where this port is.
async fn with_port(request: ContainerRequest<GenericImage>, port: u16) -> Result<Secure> {
    let container = run(request).await?;
    Ok(Secure {
        // The name that its certificate is for.
        address: format!("127.0.0.1:{}", container.get_host_port_ipv4(port).await?),
        plain_address: None,
        _container: container,
    })
}

fn bytes(text: &str) -> Vec<u8> {
    text.as_bytes().to_vec()
}
