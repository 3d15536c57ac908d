//! Logs on standard error and metrics in Prometheus' text format.

use std::io::Write;

use anyhow::Context;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use tracing_subscriber::EnvFilter;

use crate::config::{LogFormat, Logging};

/// Upper bounds of the latency buckets, in seconds.
const LATENCY_BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// Sends the process's log to standard error in the format the configuration asks for.
pub fn logs(config: &Logging) -> anyhow::Result<()> {
    let filter = EnvFilter::builder()
        .parse(&config.level.0)
        .context("reading the log filter")?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    let installed = match config.format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .try_init(),
    };
    installed.map_err(|error| anyhow::anyhow!("starting the log: {error}"))
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
