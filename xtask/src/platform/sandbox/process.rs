//! Child processes: two listening sockets handed over, output to a log, and death together with
//! the sandbox. All that is particular to Linux is here.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result};
use rustix::process::{Pid, Resource, Signal, getrlimit, kill_process_group, setrlimit};
use tokio::sync::oneshot;

use super::protocol::Run;

/// Where a log is put aside and another one begun.
const LOG_LIMIT: u64 = 8 << 20;
/// The lines kept for messages about a process that ended.
const TAIL: usize = 12;
/// Passed sockets begin here (sd_listen_fds(3)).
const FIRST_SOCKET: i32 = 3;

/// The last lines of a process's output.
pub type Tail = Arc<Mutex<VecDeque<String>>>;

pub struct Child {
    pub pid: u32,
    pub ended: oneshot::Receiver<ExitStatus>,
}

/// Starts a process. It dies with the thread that started it, so that thread does nothing but
/// wait for its end.
pub async fn start(
    run: &Run,
    extra: Vec<(String, String)>,
    sockets: [TcpListener; 2],
    log: PathBuf,
    tail: Tail,
) -> Result<Child> {
    let (reader, writer) = std::io::pipe().context("making a pipe for the output")?;
    let mut command = Command::new(&run.program);
    command
        .args(&run.arguments)
        .current_dir(&run.directory)
        .env_clear()
        .envs(&run.variables)
        .envs(extra)
        .env("LISTEN_FDS", sockets.len().to_string())
        .env("LISTEN_FDNAMES", "service:operators")
        .stdin(Stdio::null())
        .stdout(writer.try_clone().context("sharing the pipe")?)
        .stderr(writer)
        .process_group(0);
    hand_over(&mut command, sockets)?;

    let (started, start) = oneshot::channel();
    let (ending, ended) = oneshot::channel();
    std::thread::spawn(move || {
        let spawned = command.spawn();
        // The parent's ends of the pipe and the sockets close here.
        drop(command);
        match spawned {
            Ok(mut child) => {
                // Nobody may be waiting any more; the process is looked after all the same.
                let _ = started.send(Ok(child.id()));
                std::thread::spawn(move || copy_output(reader, &log, &tail));
                if let Ok(status) = child.wait() {
                    let _ = ending.send(status);
                }
            }
            Err(error) => drop(started.send(Err(error))),
        }
    });
    let pid = start
        .await
        .context("the thread that starts the process is gone")?
        .with_context(|| format!("starting {}", run.program.display()))?;
    Ok(Child { pid, ended })
}

/// Makes `sockets` the descriptors 3 and 4 of the child and lets the child die with this process.
fn hand_over(command: &mut Command, sockets: [TcpListener; 2]) -> Result<()> {
    // High numbers first, so that no copy overwrites a socket that is still to be copied.
    let sockets = sockets
        .iter()
        .map(|socket| rustix::io::fcntl_dupfd_cloexec(socket, 64).map_err(std::io::Error::from))
        .collect::<std::io::Result<Vec<OwnedFd>>>()
        .context("copying the sockets")?;
    let parent = rustix::process::getpid();
    let prepare = move || {
        for (number, socket) in (FIRST_SOCKET..).zip(&sockets) {
            copy_descriptor(socket, number)?;
        }
        die_with(parent)
    };
    #[expect(
        unsafe_code,
        reason = "between fork and exec only system calls are made"
    )]
    // SAFETY: `prepare` allocates nothing and takes no lock; it only calls dup2, prctl, getppid.
    unsafe {
        command.pre_exec(prepare);
    }
    Ok(())
}

fn copy_descriptor(from: &OwnedFd, to: i32) -> std::io::Result<()> {
    if from.as_raw_fd() == to {
        return Ok(());
    }
    #[expect(
        unsafe_code,
        reason = "dup2 wants an owner for the number it writes to"
    )]
    // SAFETY: the child has one thread; the sandbox holds 3 and 4 open from its start (lock and
    // event queue), so nothing that exec still needs can be there. The owner is never dropped.
    let mut target = std::mem::ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(to) });
    Ok(rustix::io::dup2(from, &mut target)?)
}

#[cfg(target_os = "linux")]
fn die_with(parent: Pid) -> std::io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have died before the line above.
    if rustix::process::getppid() == Some(parent) {
        Ok(())
    } else {
        Err(std::io::Error::other("the sandbox is gone"))
    }
}

/// Elsewhere a process outlives a killed sandbox; the next one finds its ports taken and says so.
#[cfg(not(target_os = "linux"))]
fn die_with(_parent: Pid) -> std::io::Result<()> {
    Ok(())
}

/// Asks a process and its children to end.
pub fn terminate(pid: u32) {
    signal(pid, Signal::TERM);
}

pub fn kill(pid: u32) {
    signal(pid, Signal::KILL);
}

fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // The only error there can be is that it has ended already.
        let _ = kill_process_group(pid, signal);
    }
}

/// Leaves the terminal that the command was started from.
pub fn detach() {
    // It fails where the process leads a group already, which is as good.
    let _ = rustix::process::setsid();
}

/// Each client and each process behind the proxy takes a descriptor.
pub fn allow_many_files() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // With the usual limit it works as well, for fewer clients.
    let _ = setrlimit(Resource::Nofile, limit);
}

fn copy_output(reader: impl std::io::Read, path: &Path, tail: &Tail) {
    let mut log = open_log(path);
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        // A line without an end is cut, so that memory stays bounded.
        let mut limited = std::io::Read::take(&mut reader, 64 << 10);
        match limited.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let text = String::from_utf8_lossy(&line).trim_end().to_owned();
        if let Some((file, length)) = &mut log {
            // A full disk must not stop the service; its last lines are still in memory.
            let _ = file.write_all(&line);
            *length += line.len() as u64;
            if *length > LOG_LIMIT {
                let _ = std::fs::rename(path, path.with_extension("log.1"));
                log = open_log(path);
            }
        }
        let mut tail = tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.push_back(text);
        if tail.len() > TAIL {
            tail.pop_front();
        }
    }
}

fn open_log(path: &Path) -> Option<(File, u64)> {
    let file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .ok()?;
    let length = file.metadata().ok()?.len();
    Some((file, length))
}
