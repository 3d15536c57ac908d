//! The servers: how each is started, and when it is ready.

use std::net::TcpListener;
use std::time::Duration;

use anyhow::{Context, Result};
use testcontainers::core::{IntoContainerPort, WaitFor};
use testcontainers::runners::AsyncRunner;
use testcontainers::{ContainerAsync, ContainerRequest, GenericImage, ImageExt};

use crate::owner;

const STARTUP: Duration = Duration::from_secs(120);
/// Ports that were free a moment ago may be taken the next.
const ATTEMPTS: usize = 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Server {
    Postgres,
    Redis,
    RabbitMq,
    Kafka,
    Registry,
}

type Started = (ContainerAsync<GenericImage>, String);

impl Server {
    pub const ALL: [Self; 5] = [
        Self::Postgres,
        Self::Redis,
        Self::RabbitMq,
        Self::Kafka,
        Self::Registry,
    ];

    /// Its name in `config/tools.toml` and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Postgres => "postgres",
            Self::Redis => "redis",
            Self::RabbitMq => "rabbitmq",
            Self::Kafka => "kafka",
            Self::Registry => "registry",
        }
    }

    /// The variable that tests find its address in.
    pub fn variable(self) -> &'static str {
        match self {
            Self::Postgres => "TEST_POSTGRES_URL",
            Self::Redis => "TEST_REDIS_URL",
            Self::RabbitMq => "TEST_RABBITMQ_URL",
            Self::Kafka => "TEST_KAFKA_BROKER",
            Self::Registry => "TEST_REGISTRY_URL",
        }
    }

    pub(crate) async fn start(self, image: &str) -> Result<Started> {
        match self {
            Self::Postgres => postgres(image).await,
            Self::Redis => {
                let request = named(image)
                    .with_exposed_port(6379.tcp())
                    // Version 7.2 adds the protocol to the line.
                    .with_wait_for(WaitFor::message_on_stdout("Ready to accept connections"));
                let container = run(request.into()).await?;
                let address = format!("redis://{}", address(&container, 6379).await?);
                Ok((container, address))
            }
            Self::RabbitMq => rabbitmq(image).await,
            Self::Kafka => kafka(image).await,
            Self::Registry => {
                let request = named(image)
                    .with_exposed_port(5000.tcp())
                    .with_wait_for(WaitFor::message_on_either_std("listening on "));
                let container = run(request.into()).await?;
                let address = format!("http://{}", address(&container, 5000).await?);
                Ok((container, address))
            }
        }
    }
}

/// The superuser's address of the database `postgres`.
async fn postgres(image: &str) -> Result<Started> {
    let request = named(image)
        .with_exposed_port(5432.tcp())
        // The line comes twice: from the server that sets the database up, on standard output, and
        // from the one that is to be used, on standard error.
        .with_wait_for(WaitFor::message_on_stderr(
            "database system is ready to accept connections",
        ))
        .with_env_var("POSTGRES_PASSWORD", "test");
    let container = run(request).await?;
    let place = address(&container, 5432).await?;
    Ok((container, superuser(&place)))
}

pub(crate) fn superuser(place: &str) -> String {
    format!("postgres://postgres:test@{place}/postgres")
}

/// `amqp://…` with the management interface's port as a query: `?management=PORT`.
async fn rabbitmq(image: &str) -> Result<Started> {
    let request = named(image)
        .with_exposed_port(5672.tcp())
        .with_exposed_port(15672.tcp())
        .with_wait_for(WaitFor::message_on_stdout("Server startup complete"));
    let container = run(request.into()).await?;
    let broker = address(&container, 5672).await?;
    let management = address(&container, 15672).await?;
    let port = management.rsplit(':').next().unwrap_or_default().to_owned();
    Ok((
        container,
        format!("amqp://guest:guest@{broker}/?management={port}"),
    ))
}

/// A single broker that is its own controller. It tells clients where it is, so its port is the
/// same inside and outside.
async fn kafka(image: &str) -> Result<Started> {
    let mut attempt = 1;
    loop {
        let port = free_port()?;
        let mut variables = kafka_variables();
        variables.extend([
            (
                "LISTENERS",
                format!("PLAINTEXT://:{port},CONTROLLER://localhost:9093"),
            ),
            (
                "ADVERTISED_LISTENERS",
                format!("PLAINTEXT://127.0.0.1:{port}"),
            ),
            (
                "LISTENER_SECURITY_PROTOCOL_MAP",
                "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT".to_owned(),
            ),
        ]);
        let ready = WaitFor::message_on_stdout("Kafka Server started");
        let mut request = named(image)
            .with_wait_for(ready)
            .with_mapped_port(port, port.tcp());
        for (name, value) in variables {
            request = request.with_env_var(format!("KAFKA_{name}"), value);
        }
        match run(request).await {
            Ok(container) => return Ok((container, format!("127.0.0.1:{port}"))),
            // Somebody was quicker to take the port; anything else will not heal.
            Err(error)
                if attempt < ATTEMPTS && format!("{error:#}").contains("port is already") =>
            {
                attempt += 1;
            }
            Err(error) => return Err(error),
        }
    }
}

/// What does not depend on where its clients find it.
pub(crate) fn kafka_variables() -> Vec<(&'static str, String)> {
    [
        ("NODE_ID", "1"),
        ("PROCESS_ROLES", "broker,controller"),
        ("CONTROLLER_LISTENER_NAMES", "CONTROLLER"),
        ("CONTROLLER_QUORUM_VOTERS", "1@localhost:9093"),
        ("OFFSETS_TOPIC_REPLICATION_FACTOR", "1"),
        ("OFFSETS_TOPIC_NUM_PARTITIONS", "1"),
        ("TRANSACTION_STATE_LOG_REPLICATION_FACTOR", "1"),
        ("TRANSACTION_STATE_LOG_MIN_ISR", "1"),
        ("GROUP_INITIAL_REBALANCE_DELAY_MS", "0"),
    ]
    .map(|(name, value)| (name, value.to_owned()))
    .to_vec()
}

pub(crate) fn named(image: &str) -> GenericImage {
    let (name, tag) = image.rsplit_once(':').unwrap_or((image, "latest"));
    GenericImage::new(name, tag)
}

pub(crate) async fn run(
    request: ContainerRequest<GenericImage>,
) -> Result<ContainerAsync<GenericImage>> {
    let request = request
        .with_label(crate::OWNER, owner::this_process())
        .with_startup_timeout(STARTUP);
    Ok(request.start().await?)
}

pub(crate) async fn address(container: &ContainerAsync<GenericImage>, port: u16) -> Result<String> {
    let host = container.get_host().await?.to_string();
    // Only the IPv4 port is asked for, and a name may lead to the other one.
    let host = if host == "localhost" {
        "127.0.0.1"
    } else {
        &host
    };
    Ok(format!(
        "{host}:{}",
        container.get_host_port_ipv4(port).await?
    ))
}

pub(crate) fn free_port() -> Result<u16> {
    let socket = TcpListener::bind("127.0.0.1:0").context("looking for a free port")?;
    let address = socket.local_addr().context("looking for a free port")?;
    Ok(address.port())
}
