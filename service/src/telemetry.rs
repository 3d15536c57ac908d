//! Logs on standard error and metrics in Prometheus' text format.

use std::io::Write;
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::Context;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::{EnvFilter, reload};

use crate::config::{LogFilter, LogFormat, Logging};

/// Upper bounds of the latency buckets, in seconds.
const LATENCY_BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// A process has one log.
static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    level: Mutex<LogFilter>,
    change: Box<dyn Fn(EnvFilter) -> Result<(), reload::Error> + Send + Sync>,
}

/// Sends the process's log to standard error in the format the configuration asks for.
pub fn logs(config: &Logging) -> anyhow::Result<()> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(&config.level)?)
        .with_writer(std::io::stderr);
    let (installed, change): (_, Box<dyn Fn(EnvFilter) -> _ + Send + Sync>) = match config.format {
        LogFormat::Text => {
            let builder = builder.with_ansi(false).with_filter_reloading();
            let handle = builder.reload_handle();
            let change = move |filter| handle.reload(filter);
            (builder.try_init(), Box::new(change))
        }
        LogFormat::Json => {
            let builder = builder.json().flatten_event(true).with_current_span(true);
            let builder = builder.with_filter_reloading();
            let handle = builder.reload_handle();
            let change = move |filter| handle.reload(filter);
            (builder.try_init(), Box::new(change))
        }
    };
    installed.map_err(|error| anyhow::anyhow!("starting the log: {error}"))?;
    let level = Mutex::new(config.level.clone());
    let _ = LOG.set(Log { level, change });
    Ok(())
}

fn filter(level: &LogFilter) -> anyhow::Result<EnvFilter> {
    let filter = EnvFilter::builder().parse(&level.0);
    filter.context("reading the log filter")
}

/// What the process logs now, where its log runs.
pub fn log_level() -> Option<LogFilter> {
    let level = LOG.get()?.level.lock();
    Some(level.unwrap_or_else(PoisonError::into_inner).clone())
}

/// Changes what the process logs until it ends, or until this is called again.
pub fn set_log_level(level: LogFilter) -> anyhow::Result<()> {
    let log = LOG.get().context("the log is not running")?;
    let mut current = log.level.lock().unwrap_or_else(PoisonError::into_inner);
    (log.change)(filter(&level)?).context("changing the log filter")?;
    *current = level;
    Ok(())
}

/// Installs the process's metrics recorder; what the handle renders is `/metrics`.
pub fn metrics() -> anyhow::Result<PrometheusHandle> {
    PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &LATENCY_BUCKETS)
        .and_then(PrometheusBuilder::install_recorder)
        .context("starting metrics")
}

/// A line on standard error, for a process whose log is not running.
pub fn tell(message: &str) {
    // Nothing is left to do where even standard error is gone.
    let _ = writeln!(std::io::stderr(), "{message}");
}
