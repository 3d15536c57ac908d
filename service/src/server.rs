//! The two ports, and an end that loses no request.

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::app::App;
use crate::config::Server;
use crate::consumers::{self, CONSUMERS};
use crate::{audit, feed, relay, router};

const UPKEEP: Duration = Duration::from_secs(5);
const HOUSEKEEPING: Duration = Duration::from_secs(3600);

/// The listening sockets of the service and of its operators.
pub struct Sockets {
    public: TcpListener,
    admin: TcpListener,
}

impl Sockets {
    /// Takes the sockets that a supervisor passed (`LISTEN_FDS`, as systemd does: first the
    /// service's, then the operators'), or else binds those the configuration names.
    pub fn bind(config: &Server) -> anyhow::Result<Self> {
        let mut passed = listenfd::ListenFd::from_env();
        let mut socket = |index, address: SocketAddr, key: &str| match passed
            .take_tcp_listener(index)
            .context("taking a socket from LISTEN_FDS")?
        {
            Some(listener) => Ok(listener),
            None => TcpListener::bind(address)
                .with_context(|| format!("listening on server.{key} = {address}; is it in use?")),
        };
        Ok(Self {
            public: socket(0, config.listen, "listen")?,
            admin: socket(1, config.admin_listen, "admin_listen")?,
        })
    }

    /// Where the service and its operators' port are.
    pub fn addresses(&self) -> std::io::Result<(SocketAddr, SocketAddr)> {
        Ok((self.public.local_addr()?, self.admin.local_addr()?))
    }
}

/// Serves until `stop` resolves, then takes no more requests, finishes those in flight and
/// returns; after `drain_timeout` it returns with an error that says so.
pub async fn serve(
    app: Arc<App>,
    sockets: Sockets,
    stop: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let (public, admin) = sockets.addresses()?;
    let (stopping, stopped) = watch::channel(false);
    let mut servers = tokio::task::JoinSet::new();
    for (listener, routes) in [
        (sockets.public, router::public(&app)?),
        (sockets.admin, router::admin(&app)),
    ] {
        listener.set_nonblocking(true)?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let mut stopped = stopped.clone();
        servers.spawn(async move {
            let routes = routes.into_make_service_with_connect_info::<SocketAddr>();
            axum::serve(listener, routes)
                .with_graceful_shutdown(async move {
                    // An error means that the sender is gone, which also ends the service.
                    let _ = stopped.wait_for(|stopping| *stopping).await;
                })
                .await
        });
    }
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
    // Samples are kept until they are folded into buckets, and perhaps nobody scrapes; clients until
    // they are forgotten.
    let kept = Arc::clone(&app);
    let upkeep = tokio::spawn(async move {
        let mut interval = tokio::time::interval(UPKEEP);
        loop {
            interval.tick().await;
            kept.metrics.run_upkeep();
            kept.limits.forget_quiet_clients();
        }
    });
    tracing::info!(%public, %admin, config_hash = app.config.hash(), "serving");

    stop.await?;
    app.drain();
    tracing::info!(deadline = ?app.config.server.drain_timeout.0, "draining");
    stopping.send_replace(true);
    let drained = async {
        app.sessions.end().await;
        while servers.join_next().await.is_some() {}
    };
    let drained = tokio::time::timeout(app.config.server.drain_timeout.0, drained).await;
    workers.shutdown().await;
    if !app.config.database.read_only {
        relay::give_up(&app).await;
        audit::give_up(&app).await;
    }
    app.close().await;
    upkeep.abort();
    drained.context("requests were still running at server.drain_timeout")?;
    tracing::info!("stopped");
    Ok(())
}

/// Forgets, now and then, what was kept for those who repeat themselves.
async fn housekeeping(app: Arc<App>) {
    let mut interval = tokio::time::interval(HOUSEKEEPING);
    loop {
        interval.tick().await;
        let days = i64::from(app.config.events.keep_days.get());
        if let Err(error) = app.storage().forget(days).await {
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
