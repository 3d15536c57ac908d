//! Commands of a run that was killed: each running command's process group is written down, and
//! the next run stops those whose run is gone.

use std::fs;
use std::path::Path;

use rustix::process::{Pid, Signal, kill_process_group};

use crate::files;

const DIR: &str = "running";

/// Writes down that this process started the group.
pub fn note(dir: &Path, group: i32) {
    let (Ok(owner), Some(started)) = (i32::try_from(std::process::id()), started(group)) else {
        return;
    };
    let owner_started = self::started(owner).unwrap_or_default();
    let text = format!("{started} {owner} {owner_started}");
    // Without the note a killed run leaves its commands to the user; the run itself is as good.
    let _ = files::write_atomically(&dir.join(DIR).join(group.to_string()), text.as_bytes());
}

/// The group has ended.
pub fn forget(dir: &Path, group: i32) {
    let _ = fs::remove_file(dir.join(DIR).join(group.to_string()));
}

/// Kills the groups whose run is gone; returns their number.
pub fn sweep(dir: &Path) -> usize {
    let mut killed = 0;
    let notes = fs::read_dir(dir.join(DIR)).into_iter().flatten();
    for note in notes.filter_map(Result::ok) {
        let Some((group, leader, owner, owner_started)) = parse(&note.path()) else {
            continue;
        };
        if started(owner).is_some_and(|started| started == owner_started) {
            continue;
        }
        // The number may belong to another process by now; the start tells. Where its first process
        // is gone but others of the group are there, the system keeps the number from being reused.
        if started(group).is_none_or(|started| started == leader)
            && let Some(group) = Pid::from_raw(group)
            && kill_process_group(group, Signal::KILL).is_ok()
        {
            killed += 1;
        }
        let _ = fs::remove_file(note.path());
    }
    killed
}

fn parse(path: &Path) -> Option<(i32, u64, i32, u64)> {
    let group = path.file_name()?.to_str()?.parse().ok()?;
    let text = fs::read_to_string(path).ok()?;
    let mut words = text.split(' ');
    let leader = words.next()?.parse().ok()?;
    let owner = words.next()?.parse().ok()?;
    Some((group, leader, owner, words.next()?.parse().ok()?))
}

/// When the process began, in clock ticks since the machine did; `None` where it is gone. On
/// systems without `/proc` nothing is known, and so nothing is killed.
pub fn started(pid: i32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc_pid_stat(5): the command's name, in parentheses, may hold spaces; field 22 is wanted.
    let fields = stat.rsplit_once(") ")?.1;
    fields.split(' ').nth(19)?.parse().ok()
}
