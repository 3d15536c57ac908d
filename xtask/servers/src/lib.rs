//! Real servers for tests, in containers.
//!
//! `cargo xtask servers run` starts them once for many tests and hands over their addresses in
//! variables. A test that is run by itself finds no variable and starts just what it asks for.

mod images;
mod owner;
mod secure;
mod server;
mod standby;

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use anyhow::{Context, Result, anyhow};
use testcontainers::bollard::query_parameters::{
    ListContainersOptionsBuilder, RemoveContainerOptionsBuilder,
};
use testcontainers::core::client::docker_client_instance;
use testcontainers::{ContainerAsync, GenericImage};
use tokio::runtime::Handle;
use tokio::sync::Mutex;

pub use images::{Image, Images};
pub use secure::{Identity, Secure};
pub use server::Server;
pub use standby::{Role, Standby};

/// The label that says whose a container is, by the name of a process.
const OWNER: &str = "dev.xtask.owner";
/// What mends a machine that has no engine or no images.
const ADVICE: &str = "`cargo xtask setup` installs and starts what is missing";

/// A server in a container, which is removed with this value.
pub struct Running {
    pub server: Server,
    /// Where clients find it, as a URL; a host and port for Kafka.
    pub address: String,
    /// The image that it was started from.
    pub image: String,
    container: Option<ContainerAsync<GenericImage>>,
}

/// A server that a test uses, for as long as the test holds this.
#[derive(Clone)]
pub struct Lease {
    pub address: String,
    _container: Option<Arc<Running>>,
}

impl Running {
    /// From now on it says nothing, nor does it hang up.
    pub async fn pause(&self) -> Result<()> {
        let container = self.container.as_ref().context("the server is gone")?;
        container.pause().await.context("pausing a container")
    }

    /// It goes on as if nothing had been.
    pub async fn resume(&self) -> Result<()> {
        let container = self.container.as_ref().context("the server is gone")?;
        container.unpause().await.context("resuming a container")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let container = self.container.take();
        if Handle::try_current().is_ok() {
            drop(container);
        } else if let Ok(runtime) = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
        {
            // Removing a container takes a runtime, and the test's own may have ended.
            let _entered = runtime.enter();
            drop(container);
        }
    }
}

/// The server for a test: the one whose address `cargo xtask servers run` handed over, else one
/// that the tests of this process share and that ends with the last of them.
///
/// # Errors
/// Where there is no container engine or no image, with the line that mends it.
pub async fn lease(server: Server) -> Result<Lease> {
    static SHARED: Mutex<Vec<(Server, Weak<Running>)>> = Mutex::const_new(Vec::new());
    if let Ok(address) = std::env::var(server.variable()) {
        return Ok(Lease {
            address,
            _container: None,
        });
    }
    let mut shared = SHARED.lock().await;
    shared.retain(|(_, running)| running.strong_count() > 0);
    let found = shared.iter().find(|(other, _)| *other == server);
    let running = match found.and_then(|(_, running)| running.upgrade()) {
        Some(running) => running,
        None => {
            sweep().await?;
            let running = Arc::new(start(server, &Images::of_workspace()?).await?);
            shared.push((server, Arc::downgrade(&running)));
            running
        }
    };
    Ok(Lease {
        address: running.address.clone(),
        _container: Some(running),
    })
}

/// A server of a test's own, which the test may take away.
///
/// # Errors
/// As [`lease`].
pub async fn own(server: Server) -> Result<Running> {
    sweep().await?;
    start(server, &Images::of_workspace()?).await
}

/// The two addresses of RabbitMQ: of the broker, to which `/VIRTUAL-HOST` is added, and of the
/// management interface, through which virtual hosts are made.
pub fn rabbitmq(address: &str) -> Option<(String, String)> {
    let (broker, port) = address.split_once("/?management=")?;
    let (_, place) = broker.rsplit_once('@')?;
    let (host, _) = place.rsplit_once(':')?;
    Some((broker.to_owned(), format!("http://{host}:{port}")))
}

/// Starts a server and waits until it answers.
pub async fn start(server: Server, images: &Images) -> Result<Running> {
    let image = images.choose(server).await?;
    let (container, address) = server
        .start(&image)
        .await
        .with_context(|| format!("starting {} from {image}; {ADVICE}", server.name()))?;
    Ok(Running {
        server,
        address,
        image,
        container: Some(container),
    })
}

/// The image for a server of a test's own, once what other runs have left is gone.
async fn image_of(server: Server) -> Result<String> {
    sweep().await?;
    Images::of_workspace()?.choose(server).await
}

/// Starts several servers side by side.
pub async fn start_all(servers: &[Server], images: &Images) -> Result<Vec<Running>> {
    // A task each: containers that start within one task keep each other waiting.
    let mut tasks = Vec::new();
    for server in servers.iter().copied() {
        let images = images.clone();
        tasks.push(tokio::spawn(async move { start(server, &images).await }));
    }
    let mut running = Vec::new();
    let mut failed = Vec::new();
    for task in tasks {
        match task.await.context("starting a server")? {
            Ok(server) => running.push(server),
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    if failed.is_empty() {
        Ok(running)
    } else {
        Err(anyhow!("{}", failed.join("\n")))
    }
}

/// Removes the containers of this machine's runs that are gone, and nothing else. Returns how many.
pub async fn sweep() -> Result<usize> {
    let docker = docker_client_instance()
        .await
        .with_context(|| format!("reaching a container engine; {ADVICE}"))?;
    let filters = HashMap::from([("label", vec![OWNER])]);
    let list = ListContainersOptionsBuilder::new().all(true);
    let containers = docker
        .list_containers(Some(list.filters(&filters).build()))
        .await
        .with_context(|| format!("asking the container engine; {ADVICE}"))?;
    let mut removed = 0;
    for container in containers {
        let labels = container.labels.unwrap_or_default();
        let Some(id) = container.id else { continue };
        if labels
            .get(OWNER)
            .is_none_or(|owner| owner::lives(owner) != Some(false))
        {
            continue;
        }
        let remove = RemoveContainerOptionsBuilder::new().force(true).v(true);
        // Another sweep may be at it.
        if docker
            .remove_container(&id, Some(remove.build()))
            .await
            .is_ok()
        {
            removed += 1;
        }
    }
    Ok(removed)
}
