//! A PostgreSQL server and its standby, for tests of what happens when one takes over from the other.

use anyhow::{Context, Result};
use testcontainers::core::{CmdWaitFor, ExecCommand, IntoContainerPort, WaitFor};
use testcontainers::{ContainerAsync, GenericImage, ImageExt};

use crate::server::{address, named, run, superuser};
use crate::{ADVICE, Server, image_of};

const SCRIPT: &str = include_str!("standby.sh");

/// Two servers of a test's own, which end with this value.
pub struct Standby {
    pub primary_address: String,
    /// Takes no writes until it is promoted.
    pub standby_address: String,
    container: ContainerAsync<GenericImage>,
}

/// What a server was at first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Primary,
    Standby,
}

impl Standby {
    /// # Errors
    /// As [`lease`](crate::lease).
    pub async fn start() -> Result<Self> {
        let image = image_of(Server::Postgres).await?;
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

    /// From now on it says nothing, nor does it hang up.
    pub async fn pause(&self, which: Role) -> Result<()> {
        self.signal(which, "STOP").await
    }

    /// It goes on as if nothing had been.
    pub async fn resume(&self, which: Role) -> Result<()> {
        self.signal(which, "CONT").await
    }

    async fn signal(&self, which: Role, signal: &str) -> Result<()> {
        // Where its data is, and each of its processes.
        let directory = match which {
            Role::Primary => "/tmp/primary",
            Role::Standby => "/tmp/standby",
        };
        // The first one makes the others, so it is first.
        let script = format!(
            "kill -{signal} $(head -n 1 {directory}/postmaster.pid)
             for process in /proc/[0-9]*; do
               [ \"$(readlink $process/cwd)\" != {directory} ] || kill -{signal} ${{process#/proc/}}
             done
             true"
        );
        let signal = ExecCommand::new(["sh", "-c", &script])
            .with_cmd_ready_condition(CmdWaitFor::exit_code(0));
        self.container.exec(signal).await?;
        Ok(())
    }
}
