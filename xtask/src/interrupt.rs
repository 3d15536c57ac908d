//! The end of a command from outside: Ctrl-C, SIGTERM and SIGHUP.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio, exit};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

/// What a shell reports of a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

static ASKED: AtomicBool = AtomicBool::new(false);

/// From now on this program ends by doing that first. Whoever asks twice does not want to wait for it.
pub fn end_by(leave: impl FnOnce() + Send + 'static) -> Result<()> {
    let signals = Signals::new([SIGINT, SIGTERM, SIGHUP]);
    let mut signals = signals.context("watching for Ctrl-C")?;
    std::thread::spawn(move || {
        let mut asked = signals.forever();
        let Some(_) = asked.next() else { return };
        ASKED.store(true, Ordering::SeqCst);
        std::thread::spawn(move || {
            leave();
            exit(INTERRUPTED);
        });
        if asked.next().is_some() {
            exit(INTERRUPTED);
        }
    });
    Ok(())
}

/// Comes about when this program is asked to end; it no longer ends by itself.
#[cfg(feature = "rollout")]
pub async fn asked() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};

    let watch = |kind| signal(kind).context("watching for Ctrl-C");
    let mut interrupt = watch(SignalKind::interrupt())?;
    let mut terminate = watch(SignalKind::terminate())?;
    let mut hang_up = watch(SignalKind::hangup())?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
        _ = hang_up.recv() => {}
    }
    Ok(())
}

/// What a command comes to that was asked to end is of no interest any more: then this does not return.
pub fn check() {
    while ASKED.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

/// Runs a command that puts something away. Whoever ends this program's whole group, or loses patience
/// with it, does not keep that from its work.
pub fn put_away(mut command: Command) {
    // The exit code says what happened either way.
    let _ = command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
}
