//! Logs on standard error and in files, spans to a collector, and metrics in Prometheus' text format.

use std::io::Write;
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::Context;
use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};
use opentelemetry::trace::TracerProvider;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_appender::rolling::{RollingFileAppender, Rotation};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::writer::{BoxMakeWriter, MakeWriterExt};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, reload};

use crate::config::{Config, LogFilter, LogFormat};
use crate::{log_lines, traces};

/// Upper bounds of the latency buckets, in seconds.
const LATENCY_BUCKETS: [f64; 14] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// A process has one log.
static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    level: Mutex<LogFilter>,
    change: Box<dyn Fn(Targets) -> Result<(), reload::Error> + Send + Sync>,
}

/// Sends the process's log to standard error, and to files where the configuration names some, in the
/// format it asks for; and its spans to a collector. What is returned sends the last spans when it is
/// shut down.
pub fn start(config: &Config) -> anyhow::Result<SdkTracerProvider> {
    let provider = traces::provider(&config.tracing)?;
    // Where in the code and on which thread says little of a request, and is sent with each.
    let spans = tracing_opentelemetry::layer()
        .with_tracer(provider.tracer(env!("CARGO_PKG_NAME")))
        .with_location(false)
        .with_threads(false)
        .with_tracked_inactivity(false);
    // What the service does itself; libraries' own spans are many, and nobody asked for them.
    let own = Targets::new().with_target(env!("CARGO_CRATE_NAME"), LevelFilter::INFO);
    let logging = &config.logging;
    let (level, handle) = reload::Layer::new(filter(&logging.level)?);
    let file = logging
        .file
        .as_deref()
        .map(|file| files(file, logging.keep_files.get()));
    let writer = match file.transpose()? {
        Some(file) => BoxMakeWriter::new(std::io::stderr.and(file)),
        None => BoxMakeWriter::new(std::io::stderr),
    };
    let lines = match logging.format {
        LogFormat::Text => fmt::layer().with_ansi(false).with_writer(writer).boxed(),
        LogFormat::Json => fmt::layer()
            .fmt_fields(log_lines::Fields)
            .event_format(log_lines::Lines)
            .with_writer(writer)
            .boxed(),
    };
    tracing_subscriber::registry()
        .with(lines.with_filter(level))
        .with(spans.with_filter(own))
        .try_init()
        .context("starting the log")?;
    let level = Mutex::new(logging.level.clone());
    let change = Box::new(move |filter| handle.reload(filter));
    let _ = LOG.set(Log { level, change });
    Ok(provider)
}

/// A file for each day: `DIR/NAME.2026-01-31.log`.
fn files(path: &Path, keep: usize) -> anyhow::Result<RollingFileAppender> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty());
    let dir = dir.unwrap_or(Path::new("."));
    RollingFileAppender::builder()
        .rotation(Rotation::DAILY)
        .filename_prefix(name)
        .filename_suffix("log")
        .max_log_files(keep)
        .build(dir)
        .with_context(|| format!("opening logging.file = {}", path.display()))
}

fn filter(level: &LogFilter) -> anyhow::Result<Targets> {
    level.0.parse().context("reading the log filter")
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
