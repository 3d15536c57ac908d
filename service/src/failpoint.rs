//! Places in which tests end the process as a kill does. `SERVICE_FAILPOINT=NAME` names one, and
//! `NAME:3` its third time. Release builds have none.

/// Ends the process here, where the environment says so: nothing is closed, flushed or rolled back.
#[cfg(debug_assertions)]
pub fn reached(name: &str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static WANTED: LazyLock<Option<(String, AtomicU64)>> = LazyLock::new(|| {
        let wanted = std::env::var("SERVICE_FAILPOINT").ok()?;
        let (name, times) = wanted.split_once(':').unwrap_or((&wanted, "1"));
        Some((name.to_owned(), AtomicU64::new(times.parse().ok()?)))
    });
    if let Some((wanted, times)) = &*WANTED
        && wanted == name
        && times.fetch_sub(1, Ordering::SeqCst) == 1
    {
        let own = rustix::process::getpid();
        // Nobody can refuse that to oneself.
        let _ = rustix::process::kill_process(own, rustix::process::Signal::KILL);
    }
}

#[cfg(not(debug_assertions))]
pub fn reached(_: &str) {}
