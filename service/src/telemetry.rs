//! The log: on standard error and in files, at a level that can be changed while it runs. Nobody waits
//! for it: where lines are not taken for so long that too many wait, further ones are dropped and counted.

use std::io::{BufWriter, Write};
use std::path::Path;
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::Context;
use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_appender::rolling::{RollingFileAppender, Rotation};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::writer::{BoxMakeWriter, MakeWriterExt};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt, reload};

use crate::config::{LogFilter, LogFormat, Logging};
use crate::log_lines;

/// Lines that wait to be written, for standard error and for files each: a few MB.
const WAITING_LINES: usize = 4096;

/// A process has one log.
static LOG: OnceLock<Log> = OnceLock::new();

struct Log {
    dropped: Vec<ErrorCounter>,
    level: Mutex<LogFilter>,
    change: Box<dyn Fn(Targets) -> Result<(), reload::Error> + Send + Sync>,
}

/// Writes the last lines when it is dropped; it waits a second for that, and no longer.
#[must_use]
pub struct Writers(#[expect(dead_code, reason = "dropped")] Vec<WorkerGuard>);

/// Sends the process's log to standard error, and to files where the configuration names some, in the
/// format it asks for.
pub fn start(logging: &Logging) -> anyhow::Result<Writers> {
    let (level, handle) = reload::Layer::new(filter(&logging.level)?);
    let file = logging
        .file
        .as_deref()
        .map(|file| files(file, logging.keep_files.get()));
    let (errors, errors_end) = queued(std::io::stderr());
    let mut dropped = vec![errors.error_counter()];
    let mut ends = vec![errors_end];
    let writer = match file.transpose()? {
        Some(file) => {
            let (file, file_end) = queued(file);
            dropped.push(file.error_counter());
            ends.push(file_end);
            BoxMakeWriter::new(errors.and(file))
        }
        None => BoxMakeWriter::new(errors),
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
        .with(level)
        .with(lines)
        .try_init()
        .context("starting the log")?;
    let level = Mutex::new(logging.level.clone());
    let change = Box::new(move |filter| handle.reload(filter));
    let _ = LOG.set(Log {
        dropped,
        level,
        change,
    });
    Ok(Writers(ends))
}

/// A writer with a thread of its own: a full disk's or a stopped reader's time is not a request's. It writes
/// at once whatever waits for it.
fn queued(writer: impl Write + Send + 'static) -> (NonBlocking, WorkerGuard) {
    NonBlockingBuilder::default()
        .buffered_lines_limit(WAITING_LINES)
        .thread_name("log")
        .finish(BufWriter::new(writer))
}

/// Lines of the log that were dropped, since too many waited to be written.
pub fn lines_dropped() -> usize {
    let log = LOG.get().into_iter();
    log.flat_map(|log| &log.dropped)
        .map(ErrorCounter::dropped_lines)
        .sum()
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

/// A line on standard error, for a process whose log is not running.
pub fn tell(message: &str) {
    // Nothing is left to do where even standard error is gone.
    let _ = writeln!(std::io::stderr(), "{message}");
}
