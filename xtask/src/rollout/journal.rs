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
    /// Only the environment's writer has it open for more.
    file: Option<File>,
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
        let Some(lock) = files::try_lock(&self.dir.join("lock"))? else {
            return Ok(None);
        };
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

    /// Whether another command is the environment's writer at the moment.
    pub fn is_busy(&self) -> bool {
        let lock = File::open(self.dir.join("lock"));
        lock.is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(fs::TryLockError::WouldBlock)))
    }

    /// Starts a rollout's journal, with the state that it begins in.
    pub fn create(&self, _writer: &Writer, started: Started, state: State) -> Result<Journal> {
        let path = self.dir.join(format!("{}.jsonl", started.plan.rollout));
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("creating the journal {}", path.display()))?;
        let mut journal = Journal {
            path,
            file: Some(file),
            lines: Vec::new(),
        };
        journal.append([Entry::Started(Box::new(started)), Entry::State { state }])?;
        // The file itself is durable only when the directory is.
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .with_context(|| format!("writing {}", self.dir.display()))?;
        Ok(journal)
    }

    /// The journal of the newest rollout, ended or not, to be read.
    pub fn newest(&self) -> Result<Option<Journal>> {
        for path in self.journals()?.iter().rev() {
            if let Some(journal) = Journal::read(path)? {
                return Ok(Some(journal));
            }
        }
        Ok(None)
    }

    /// The journal of the rollout that has not ended, to be read, where there is one.
    pub fn unfinished(&self) -> Result<Option<Journal>> {
        Ok(self
            .newest()?
            .filter(|journal| journal.state().outcome().is_none()))
    }

    /// The same, to be written.
    pub fn unfinished_to_write(&self, writer: &Writer) -> Result<Option<Journal>> {
        self.unfinished()?
            .map(|journal| journal.for_writing(writer))
            .transpose()
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
    /// Reads a journal as far as it has whole lines: its writer may be adding one at this moment.
    /// `None` where not even the first line is whole, so that nothing can have been done.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let text =
            fs::read(path).with_context(|| format!("reading the journal {}", path.display()))?;
        let whole = text
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        let mut lines: Vec<Line> = Vec::new();
        for (number, line) in (1u64..).zip(text[..whole].split_inclusive(|byte| *byte == b'\n')) {
            let damaged = || {
                format!(
                    "the journal is damaged: {} line {number}; restore the file, or move it away \
                     to give this rollout up and start another",
                    path.display()
                )
            };
            let line: Line = serde_json::from_slice(line).with_context(damaged)?;
            if line.seq != number {
                bail!("{} (it has the number {})", damaged(), line.seq);
            }
            lines.push(line);
        }
        match lines.first() {
            None => Ok(None),
            Some(Line {
                entry: Entry::Started(_),
                ..
            }) => Ok(Some(Self {
                path: path.to_owned(),
                file: None,
                lines,
            })),
            Some(_) => bail!(
                "the journal {} does not begin with the start of a rollout; move it away",
                path.display()
            ),
        }
    }

    /// Makes the journal ready for more. It is read once more: nobody else writes it now.
    pub fn for_writing(self, _writer: &Writer) -> Result<Self> {
        let context = || format!("opening the journal {}", self.path.display());
        let mut journal = Self::read(&self.path)?.with_context(context)?;
        let file = OpenOptions::new()
            .append(true)
            .open(&self.path)
            .with_context(context)?;
        let text = fs::read(&self.path).with_context(context)?;
        let whole = text
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        if whole < text.len() {
            file.set_len(whole as u64)
                .context("dropping a line that was cut short")?;
        }
        journal.file = Some(file);
        Ok(journal)
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
        let Some(file) = &mut self.file else {
            bail!(
                "the journal {} was opened to be read only",
                self.path.display()
            );
        };
        let length = file.metadata().map(|file| file.len());
        let written = file
            .write_all(text.as_bytes())
            .and_then(|()| file.sync_data());
        if let (Err(_), Ok(length)) = (&written, length) {
            // A full disk may have taken half a line; the next one must not be glued to it.
            let _ = file.set_len(length);
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
        let writer = desk.lock().unwrap().unwrap();
        let state = State::start(7);
        let journal = desk.create(&writer, started(), state.clone()).unwrap();
        let path = journal.path().to_owned();
        let whole = fs::read_to_string(&path).unwrap();
        let read = || Journal::read(&path).map(|journal| journal.unwrap());

        // Whoever only reads leaves a line that is being written alone.
        let cut = format!("{whole}{{\"seq\":3,\"at\"");
        fs::write(&path, &cut).unwrap();
        assert_eq!(read().unwrap().state(), state);
        assert_eq!(fs::read_to_string(&path).unwrap(), cut);
        assert!(
            read()
                .unwrap()
                .append([Entry::Resumed { token: 2 }])
                .is_err()
        );
        let mut journal = read().unwrap().for_writing(&writer).unwrap();
        journal.append([Entry::Resumed { token: 2 }]).unwrap();
        assert_eq!(read().unwrap().lines().len(), 3);

        fs::write(&path, whole.replacen("\"since\":7", "\"since\":x", 1)).unwrap();
        let error = read().map(|_| ()).unwrap_err();
        assert!(format!("{error:#}").contains("line 2"), "{error:#}");
        let second = whole.lines().nth(1).unwrap();
        fs::write(&path, format!("{whole}{second}\n")).unwrap();
        assert!(read().is_err(), "a line twice");

        // A start that was cut short is none.
        fs::write(&path, &whole[..100]).unwrap();
        assert!(desk.unfinished().unwrap().is_none());
    }

    #[test]
    fn one_writer_at_a_time_and_tokens_rise() {
        let dir = tempfile::tempdir().unwrap();
        let desk = Desk::new(dir.path(), "production");
        let first = desk.lock().unwrap().unwrap();
        assert!(desk.lock().unwrap().is_none());
        assert!(desk.is_busy());
        let token = first.token;
        drop(first);
        assert!(!desk.is_busy());
        assert!(desk.lock().unwrap().unwrap().token > token);
    }
}
