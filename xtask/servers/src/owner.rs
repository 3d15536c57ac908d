//! Whose a container is: a label that names the machine, its boot, the process and its start.

use std::fs;

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

/// The label's name.
pub(crate) const LABEL: &str = "dev.xtask.owner";

/// The label's value for this process: `MACHINE BOOT PID START`.
pub(crate) fn this_process() -> String {
    let pid = std::process::id();
    format!(
        "{} {} {pid} {}",
        machine(),
        boot(),
        start(pid).unwrap_or_default()
    )
}

/// Whether the owner was a process of this machine and is there no more.
pub(crate) fn is_gone(owner: &str) -> bool {
    let words: Vec<&str> = owner.split(' ').collect();
    let [machine_then, boot_then, pid, start_then] = words[..] else {
        return false;
    };
    if machine_then != machine() {
        return false;
    }
    let Ok(pid) = pid.parse::<u32>() else {
        return false;
    };
    if boot_then != boot() {
        return true;
    }
    match start(pid) {
        // A number that another process has by now.
        Some(start) => start != start_then,
        None => !is_alive(pid),
    }
}

fn is_alive(pid: u32) -> bool {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    // Whoever may not be asked is there.
    pid.is_some_and(|pid| test_kill_process(pid) != Err(Errno::SRCH))
}

/// Where process numbers mean the same: the machine, its name, and the namespace of its processes.
fn machine() -> String {
    let id = fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let name = rustix::system::uname();
    let namespace = fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let text = format!(
        "{}/{}/{}",
        id.trim(),
        name.nodename().to_string_lossy(),
        namespace.display()
    );
    text.replace(' ', "-")
}

/// Which start of the machine this is, where the system tells.
fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map_or_else(|_| "unknown".to_owned(), |id| id.trim().to_owned())
}

/// When the process began, in clock ticks; `None` where it is gone or the system does not tell.
fn start(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc_pid_stat(5): the name, in parentheses, may hold spaces; field 22 is wanted.
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(19).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_surely_gone_is_gone() {
        let own = this_process();
        assert!(!is_gone(&own));
        let words: Vec<&str> = own.split(' ').collect();
        let with = |at: usize, word: &str| {
            let mut words = words.clone();
            words[at] = word;
            words.join(" ")
        };
        assert!(!is_gone(&with(0, "elsewhere")), "another machine's");
        assert!(is_gone(&with(1, "before")), "of an earlier boot");
        assert!(is_gone(&with(3, "1")), "another process has its number");
        assert!(!is_gone("something else"));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id().to_string();
        child.wait().unwrap();
        assert!(is_gone(&with(2, &pid)), "a process that ended");
    }
}
