//! A PostgreSQL server and its standby, for tests of what happens when one takes over from the other.

use anyhow::{Context, Result};
use testcontainers::core::{CmdWaitFor, ExecCommand, IntoContainerPort, WaitFor};
use testcontainers::{ContainerAsync, GenericImage, ImageExt};

use crate::server::{address, named, run, superuser};
use crate::{ADVICE, Images, Server, sweep};

const SCRIPT: &str = include_str!("standby.sh");

/// Two servers of a test's own, which end with this value.
pub struct Standby {
    pub primary_address: String,
    /// Takes no writes until it is promoted.
    pub standby_address: String,
    container: ContainerAsync<GenericImage>,
}

impl Standby {
    /// # Errors
    /// As [`lease`](crate::lease).
    pub async fn start() -> Result<Self> {
        sweep().await?;
        let image = Images::of_workspace()?.choose(Server::Postgres).await?;
        let request = named(&image)
            .with_entrypoint("sh")
            .with_exposed_port(5432.tcp())
            .with_exposed_port(5433.tcp())
            .with_wait_for(WaitFor::message_on_stderr("started streaming WAL"))
            .with_user("postgres")
            .with_cmd(["-c", SCRIPT]);
        let container = run(request)
            .await
            .with_context(|| format!("starting two servers from {image}; {ADVICE}"))?;
        Ok(Self {
            primary_address: superuser(&address(&container, 5432).await?),
            standby_address: superuser(&address(&container, 5433).await?),
            container,
        })
    }

    /// From now on the primary says nothing, nor does it hang up.
    pub async fn pause_primary(&self) -> Result<()> {
        self.signal_primary("STOP").await
    }

    /// It goes on as if nothing had been.
    pub async fn resume_primary(&self) -> Result<()> {
        self.signal_primary("CONT").await
    }

    async fn signal_primary(&self, signal: &str) -> Result<()> {
        // Every process of a server is in the directory of its data.
        let script = format!(
            "for process in /proc/[0-9]*; do
               [ \"$(readlink $process/cwd)\" != /tmp/primary ] || kill -{signal} ${{process#/proc/}}
             done"
        );
        let signal = ExecCommand::new(["sh", "-c", &script])
            .with_cmd_ready_condition(CmdWaitFor::exit_code(0));
        self.container.exec(signal).await?;
        Ok(())
    }
}
