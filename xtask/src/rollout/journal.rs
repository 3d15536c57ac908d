//! The append-only record of a rollout, from which it is resumed and replayed.
//!
//! One file of JSON lines for each rollout. A line is on disk before what it announces is done.
//! A line that a crash cut short is dropped; any other damage is an error that names it.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::engine::{Action, Plan, Request, State};
use super::judge::Judgement;
use super::windows::WindowLine;
use crate::config::Judge as JudgeSettings;
use crate::files;
use crate::platform::InstanceCounts;

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Entry {
    Started(Box<Started>),
    /// A new state of the engine; what it asks for has not been done yet.
    State {
        state: State,
    },
    /// About to be done.
    Intent {
        action: Action,
    },
    Done {
        action: Action,
    },
    Failed {
        action: Action,
        error: String,
    },
    Window(WindowLine),
    Judged(Judgement),
    Resumed {
        token: u64,
    },
    Ended {
        totals: Totals,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Started {
    pub plan: Plan,
    pub judge: JudgeSettings,
    /// Latencies in seconds at which requests count as slow; `None` where too little was seen.
    pub bounds: Option<Vec<f64>>,
    /// The proxy's counts before anything was done.
    pub counts: Vec<InstanceCounts>,
    /// The names that people know the releases by.
    pub stable_name: Option<String>,
    pub candidate_name: String,
    pub token: u64,
}

/// Requests and failures from start to end, per arm.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    pub stable: ArmTotals,
    pub candidate: ArmTotals,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArmTotals {
    pub requests: u64,
    pub failed: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    pub seq: u64,
    pub at: jiff::Timestamp,
    #[serde(flatten)]
    pub entry: Entry,
}

pub struct Journal {
    path: PathBuf,
    file: File,
    lines: Vec<Line>,
}

/// Where an environment's journals, its writers' lock and its requests are.
#[derive(Debug, Clone)]
pub struct Desk {
    dir: PathBuf,
}

/// The right to write; the kernel takes it back when the process ends, however it ends.
pub struct Writer {
    _lock: File,
    /// Higher than every writer's before.
    pub token: u64,
}

impl Desk {
    pub fn new(state_dir: &Path, environment: &str) -> Self {
        Self {
            dir: state_dir.join("rollouts").join(environment),
        }
    }

    /// Becomes the environment's one writer; `None` where another process is.
    pub fn lock(&self) -> Result<Option<Writer>> {
        fs::create_dir_all(&self.dir)
            .with_context(|| format!("creating {}", self.dir.display()))?;
        let path = self.dir.join("lock");
        let context = || format!("locking {}", path.display());
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(context)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Ok(None),
            Err(fs::TryLockError::Error(error)) => return Err(error).with_context(context),
        }
        let counter = self.dir.join("token");
        let last: u64 = if counter.exists() {
            files::read_json(&counter)?
        } else {
            0
        };
        files::write_json(&counter, &(last + 1))?;
        Ok(Some(Writer {
            _lock: lock,
            token: last + 1,
        }))
    }

    /// Starts a rollout's journal.
    pub fn create(&self, started: Started) -> Result<Journal> {
        let path = self.dir.join(format!("{}.jsonl", started.plan.rollout));
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("creating the journal {}", path.display()))?;
        let mut journal = Journal {
            path,
            file,
            lines: Vec::new(),
        };
        journal.append([Entry::Started(Box::new(started))])?;
        Ok(journal)
    }

    /// The journal of the newest rollout, ended or not.
    pub fn newest(&self) -> Result<Option<Journal>> {
        let mut journals = self.journals()?;
        journals.pop().map(|path| Journal::open(&path)).transpose()
    }

    /// The journal of the rollout that has not ended, where there is one.
    pub fn unfinished(&self) -> Result<Option<Journal>> {
        Ok(self
            .newest()?
            .filter(|journal| journal.state().outcome().is_none()))
    }

    /// The files of all rollouts, oldest first.
    fn journals(&self) -> Result<Vec<PathBuf>> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let entries =
            fs::read_dir(&self.dir).with_context(|| format!("reading {}", self.dir.display()))?;
        let mut paths = Vec::new();
        for entry in entries {
            let path = entry.context("listing the journals")?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "jsonl")
                && fs::metadata(&path).is_ok_and(|file| file.len() > 0)
            {
                paths.push(path);
            }
        }
        paths.sort();
        Ok(paths)
    }

    /// Leaves a request for whoever drives the rollout.
    pub fn ask(&self, request: Request) -> Result<()> {
        files::write_json(&self.request_path(), &request)
    }

    /// The newest request; requests are numbered, so one that was heard before does no harm.
    pub fn request(&self) -> Result<Option<Request>> {
        let path = self.request_path();
        if path.exists() {
            files::read_json(&path).map(Some)
        } else {
            Ok(None)
        }
    }

    fn request_path(&self) -> PathBuf {
        self.dir.join("request.json")
    }
}

impl Journal {
    /// Reads a journal and makes it ready for more.
    pub fn open(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("reading the journal {}", path.display()))?;
        let whole = text.rfind('\n').map_or(0, |end| end + 1);
        let mut lines: Vec<Line> = Vec::new();
        for (number, line) in (1u64..).zip(text[..whole].lines()) {
            let damaged = || {
                format!(
                    "the journal is damaged: {} line {number}; restore the file, or move it away \
                     to give this rollout up and start another",
                    path.display()
                )
            };
            let line: Line = serde_json::from_str(line).with_context(damaged)?;
            if line.seq != number {
                bail!("{} (it has the number {})", damaged(), line.seq);
            }
            lines.push(line);
        }
        if !matches!(
            lines.first(),
            Some(Line {
                entry: Entry::Started(_),
                ..
            })
        ) {
            bail!(
                "the journal {} does not begin with the start of a rollout; move it away",
                path.display()
            );
        }
        let file = OpenOptions::new()
            .append(true)
            .open(path)
            .with_context(|| format!("opening the journal {}", path.display()))?;
        if whole < text.len() {
            file.set_len(whole as u64)
                .context("dropping a line that was cut short")?;
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            lines,
        })
    }

    /// Appends entries; they are on disk when this returns.
    pub fn append(&mut self, entries: impl IntoIterator<Item = Entry>) -> Result<()> {
        let mut text = String::new();
        let mut lines = Vec::new();
        let at = jiff::Timestamp::now();
        for (seq, entry) in (self.lines.len() as u64 + 1..).zip(entries) {
            let line = Line { seq, at, entry };
            text.push_str(&serde_json::to_string(&line).context("describing a journal entry")?);
            text.push('\n');
            lines.push(line);
        }
        let length = self.file.metadata().map(|file| file.len());
        let written = self
            .file
            .write_all(text.as_bytes())
            .and_then(|()| self.file.sync_data());
        if let (Err(_), Ok(length)) = (&written, length) {
            // A full disk may have taken half a line; the next one must not be glued to it.
            let _ = self.file.set_len(length);
        }
        written.with_context(|| format!("writing the journal {}", self.path.display()))?;
        self.lines.extend(lines);
        Ok(())
    }

    pub fn started(&self) -> &Started {
        match &self.lines[0].entry {
            Entry::Started(started) => started,
            _ => unreachable!("a journal begins with the start; `open` and `create` see to it"),
        }
    }

    pub fn plan(&self) -> &Plan {
        &self.started().plan
    }

    /// The newest state.
    pub fn state(&self) -> State {
        let newest = self.lines.iter().rev().find_map(|line| match &line.entry {
            Entry::State { state } => Some(state.clone()),
            _ => None,
        });
        newest.unwrap_or_else(|| State::start(millis(self.lines[0].at)))
    }

    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn judgements(&self) -> impl DoubleEndedIterator<Item = (jiff::Timestamp, &Judgement)> {
        self.lines.iter().filter_map(|line| match &line.entry {
            Entry::Judged(judgement) => Some((line.at, judgement)),
            _ => None,
        })
    }

    pub fn totals(&self) -> Option<Totals> {
        self.lines.iter().rev().find_map(|line| match &line.entry {
            Entry::Ended { totals } => Some(*totals),
            _ => None,
        })
    }
}

/// Milliseconds since the Unix epoch.
pub fn millis(at: jiff::Timestamp) -> u64 {
    u64::try_from(at.as_millisecond()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::torture::started;

    #[test]
    fn a_line_cut_short_is_dropped_and_other_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let desk = Desk::new(dir.path(), "production");
        let _writer = desk.lock().unwrap().unwrap();
        let mut journal = desk.create(started()).unwrap();
        let state = State::start(7);
        journal
            .append([Entry::State {
                state: state.clone(),
            }])
            .unwrap();
        let path = journal.path().to_owned();
        let whole = fs::read_to_string(&path).unwrap();

        fs::write(&path, format!("{whole}{{\"seq\":3,\"at\"")).unwrap();
        let mut journal = Journal::open(&path).unwrap();
        assert_eq!(journal.state(), state);
        journal.append([Entry::Resumed { token: 2 }]).unwrap();
        assert_eq!(Journal::open(&path).unwrap().lines().len(), 3);

        fs::write(&path, whole.replacen("\"since\":7", "\"since\":x", 1)).unwrap();
        let error = Journal::open(&path).map(|_| ()).unwrap_err();
        assert!(format!("{error:#}").contains("line 2"), "{error:#}");
        let second = whole.lines().nth(1).unwrap();
        fs::write(&path, format!("{whole}{second}\n")).unwrap();
        assert!(Journal::open(&path).is_err(), "a line twice");
    }

    #[test]
    fn one_writer_at_a_time_and_tokens_rise() {
        let dir = tempfile::tempdir().unwrap();
        let desk = Desk::new(dir.path(), "production");
        let first = desk.lock().unwrap().unwrap();
        assert!(desk.lock().unwrap().is_none());
        let token = first.token;
        drop(first);
        assert!(desk.lock().unwrap().unwrap().token > token);
    }
}
