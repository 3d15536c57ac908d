//! A process by a name that is its own: the machine, its boot, the number, and when it began. Whoever
//! keeps that name can tell later whether the process is still there. Containers of tests carry it
//! (`test-servers`); leases and the cluster do so too, for which xtask compiles this file as well.

use std::fs;

use rustix::io::Errno;
use rustix::process::{Pid, test_kill_process};

/// The name of this process: `MACHINE BOOT PID START`.
pub(crate) fn this_process() -> String {
    of(std::process::id())
}

/// The name of the process that has this number now.
pub(crate) fn of(pid: u32) -> String {
    format!(
        "{} {} {pid} {}",
        machine(),
        boot(),
        start(pid).unwrap_or_default()
    )
}

/// Whether the process is still there; `None` where that cannot be told on this machine.
pub(crate) fn lives(owner: &str) -> Option<bool> {
    let words: Vec<&str> = owner.split(' ').collect();
    let [machine_then, boot_then, pid, start_then] = words[..] else {
        return None;
    };
    if machine_then != machine() {
        return None;
    }
    let pid = pid.parse::<u32>().ok()?;
    if boot_then != boot() {
        return Some(false);
    }
    Some(match start(pid) {
        // Otherwise another process has the number by now.
        Some(start) => start == start_then,
        None => is_alive(pid),
    })
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
    // proc_pid_stat(5): the name, in parentheses, may hold spaces; fields 3 and 22 are wanted.
    let (_, fields) = stat.rsplit_once(") ")?;
    let mut fields = fields.split(' ');
    match fields.next()? {
        // It has ended, and only its exit code is waited for.
        "Z" | "X" => Some("ended".to_owned()),
        _ => fields.nth(18).map(str::to_owned),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_surely_gone_is_gone() {
        let own = this_process();
        assert_eq!(lives(&own), Some(true));
        let words: Vec<&str> = own.split(' ').collect();
        let with = |at: usize, word: &str| {
            let mut words = words.clone();
            words[at] = word;
            words.join(" ")
        };
        assert_eq!(lives(&with(0, "elsewhere")), None, "another machine's");
        let gone = Some(false);
        assert_eq!(lives(&with(1, "before")), gone, "of an earlier boot");
        assert_eq!(lives(&with(3, "1")), gone, "another process has its number");
        assert_eq!(lives("something else"), None);
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let ended = of(child.id());
        child.wait().unwrap();
        assert_eq!(lives(&ended), gone, "a process that ended");
    }
}
