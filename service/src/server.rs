//! The two ports, and an end that loses no request.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use rustix::net::sockopt;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::app::App;
use crate::config::Config;
use crate::connections::{self, Limits};
use crate::consumers::{self, CONSUMERS};
use crate::tls::{self, Certificates};
use crate::{audit, duty, feed, relay, router};

const UPKEEP: Duration = Duration::from_secs(5);
const HOUSEKEEPING: Duration = Duration::from_secs(3600);
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection that is silent for so long is asked after, this often and so many times.
const SILENT: Duration = Duration::from_secs(60);
const PROBED_EVERY: Duration = Duration::from_secs(15);
const PROBES: u32 = 4;
/// Files besides the public port's connections: databases, brokers, logs.
const OTHER_FILES: u64 = 1024;
/// Connections to the operators' port: probes, scrapes and a few people.
const MOST_OPERATORS: usize = 256;

/// The listening sockets of the service and of its operators, and what clients know the service by.
pub struct Sockets {
    certificates: Option<Certificates>,
    public: TcpListener,
    admin: TcpListener,
}

impl Sockets {
    /// Takes the sockets that a supervisor passed (`LISTEN_FDS`, as systemd does: first the
    /// service's, then the operators'), or else binds those the configuration names.
    pub fn bind(config: &Config) -> anyhow::Result<Self> {
        let certificates = config.tls.as_ref().map(Certificates::open).transpose()?;
        let config = &config.server;
        let mut passed = listenfd::ListenFd::from_env();
        let mut socket = |index, address: SocketAddr, key: &str| match passed
            .take_tcp_listener(index)
            .context("taking a socket from LISTEN_FDS")?
        {
            Some(listener) => Ok(listener),
            None => TcpListener::bind(address)
                .with_context(|| format!("listening on server.{key} = {address}; is it in use?")),
        };
        let mut prepared = |index, address, key| {
            let socket = socket(index, address, key)?;
            prepare(&socket)?;
            anyhow::Ok(socket)
        };
        Ok(Self {
            certificates,
            public: prepared(0, config.listen, "listen")?,
            admin: prepared(1, config.admin_listen, "admin_listen")?,
        })
    }

    /// Where the service and its operators' port are.
    pub fn addresses(&self) -> std::io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.public.local_addr()?, self.admin.local_addr()?))
    }
}

/// Serves until `stop` resolves and, with `linger`, until its clients have noticed; then takes no more
/// requests, finishes those in flight and returns. After `drain_timeout` it returns with an error that
/// says so.
pub async fn serve(
    app: Arc<App>,
    sockets: Sockets,
    stop: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let (public, admin) = sockets.addresses()?;
    let (stopping, stopped) = watch::channel(false);
    let certificates = sockets.certificates.map(Arc::new);
    let mut servers = tokio::task::JoinSet::new();
    let (listener, routes) = (listener(sockets.public)?, router::public(&app)?);
    let settings = &app.config.server;
    allow_open_files(settings.max_connections.get());
    let limits = Limits {
        port: "public",
        most: settings.max_connections.get(),
        head_timeout: settings.head_timeout.0,
    };
    match &certificates {
        Some(certificates) => {
            let listener = tls::Listener::new(listener, Arc::clone(certificates))?;
            servers.spawn(connections::serve(
                listener,
                routes,
                limits,
                stopped.clone(),
            ));
        }
        None => {
            servers.spawn(connections::serve(
                listener,
                routes,
                limits,
                stopped.clone(),
            ));
        }
    }
    let limits = Limits {
        port: "admin",
        most: MOST_OPERATORS,
        ..limits
    };
    let (listener, routes) = (self::listener(sockets.admin)?, router::admin(&app));
    servers.spawn(connections::serve(listener, routes, limits, stopped));
    // Requests in flight may still have something to tell, so these end last. They may be cut off
    // anywhere: what they were at is done again.
    let mut workers = tokio::task::JoinSet::new();
    workers.spawn(feed::run(Arc::clone(&app)));
    if !app.config.database.read_only {
        workers.spawn(relay::run(Arc::clone(&app)));
        workers.spawn(audit::run(Arc::clone(&app)));
        workers.spawn(housekeeping(Arc::clone(&app)));
        for consumer in &CONSUMERS {
            workers.spawn(consumers::run(Arc::clone(&app), consumer));
        }
    }
    // Clients are kept until they are forgotten.
    let kept = Arc::clone(&app);
    let upkeep = tokio::spawn(async move {
        let mut interval = tokio::time::interval(UPKEEP);
        loop {
            interval.tick().await;
            kept.limits.forget_quiet_clients();
            kept.count_backlog().await;
            if let Some(certificates) = &certificates {
                certificates.renew();
            }
        }
    });
    tracing::info!(%public, %admin, config_hash = app.config.hash(), "serving");

    stop.await?;
    app.drain.begin();
    let deadline = app.config.server.drain_timeout.0;
    tracing::info!(?deadline, "draining");
    let drained = async {
        if let Some(linger) = app.config.server.linger {
            // Whoever never notices must leave some time to those whose requests are in flight.
            let longest = deadline / 2;
            if tokio::time::timeout(longest, app.drain.quiet(linger.0))
                .await
                .is_err()
            {
                tracing::warn!(after = ?longest, "requests still come, and will be lost");
            }
        }
        stopping.send_replace(true);
        app.sessions.end().await;
        while servers.join_next().await.is_some() {}
    };
    let drained = tokio::time::timeout(deadline, drained).await;
    workers.shutdown().await;
    if !app.config.database.read_only {
        let relay = duty::give_up(&app, relay::RELAY);
        tokio::join!(relay, duty::give_up(&app, audit::AUDIT));
    }
    // A database that is silent is not waited for.
    let _ = tokio::time::timeout(CLOSE_TIMEOUT, app.close()).await;
    upkeep.abort();
    drained.context("requests were still running at server.drain_timeout")?;
    tracing::info!("stopped");
    Ok(())
}

/// What connections inherit from then on: what is written is sent, though a part before it is still on its way,
/// and one whose other end is gone without a word does not keep its place for ever.
fn prepare(socket: &TcpListener) -> std::io::Result<()> {
    sockopt::set_tcp_nodelay(socket, true)?;
    sockopt::set_socket_keepalive(socket, true)?;
    sockopt::set_tcp_keepidle(socket, SILENT)?;
    sockopt::set_tcp_keepintvl(socket, PROBED_EVERY)?;
    sockopt::set_tcp_keepcnt(socket, PROBES)?;
    Ok(())
}

fn listener(socket: TcpListener) -> anyhow::Result<tokio::net::TcpListener> {
    socket.set_nonblocking(true)?;
    Ok(tokio::net::TcpListener::from_std(socket)?)
}

/// Lets the process have a file for each connection, where its system allows it: what it gets without
/// asking is for programs that use `select`.
fn allow_open_files(connections: usize) {
    let wanted = connections as u64 + OTHER_FILES;
    let limits = getrlimit(Resource::Nofile);
    if limits.current.is_none_or(|current| current >= wanted) {
        return;
    }
    let allowed = limits.maximum.map_or(wanted, |most| most.min(wanted));
    let raised = Rlimit {
        current: Some(allowed),
        ..limits
    };
    let result = setrlimit(Resource::Nofile, raised);
    if allowed < wanted || result.is_err() {
        tracing::warn!(
            wanted,
            allowed,
            "there may be fewer open files than server.max_connections needs; raise `ulimit -n`"
        );
    }
}

/// Forgets, now and then, what was kept for those who repeat themselves.
async fn housekeeping(app: Arc<App>) {
    let mut interval = tokio::time::interval(HOUSEKEEPING);
    loop {
        interval.tick().await;
        let days = i64::from(app.config.events.keep_days.get());
        let forgotten = tokio::time::timeout(HOUSEKEEPING, app.storage().forget(days)).await;
        if let Ok(Err(error)) = forgotten {
            tracing::warn!(%error, "forgetting what is old failed");
        }
    }
}

/// Resolves on SIGTERM or Ctrl-C.
pub async fn terminated() -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("watching for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("watching for Ctrl-C")?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
