//! Where an environment's journals, its writers' lock and its requests are: in files beside the
//! pipeline's other state, or in a cluster.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use async_trait::async_trait;

use super::engine::{Request, State};
use super::journal::{Journal, Keeper, Started};
use crate::files;

#[async_trait]
pub trait Desk: Send + Sync {
    /// Becomes the environment's one writer; `None` where another process is.
    async fn lock(&self) -> Result<Option<Writer>>;

    /// Whether a command is the environment's writer at the moment.
    async fn is_busy(&self) -> Result<bool>;

    /// Starts a rollout's journal, with the state that it begins in.
    async fn create(&self, writer: &Writer, started: Started, state: State) -> Result<Journal>;

    /// The journal of the newest rollout, ended or not, to be read.
    async fn newest(&self) -> Result<Option<Journal>>;

    /// The journal of the rollout of that name, to be read.
    async fn read(&self, rollout: &str) -> Result<Journal>;

    /// Makes a journal ready for more. It is read once more: nobody else writes it now.
    async fn for_writing(&self, writer: &Writer, journal: Journal) -> Result<Journal>;

    /// Leaves a request for whoever drives the rollout.
    async fn ask(&self, request: Request) -> Result<()>;

    /// The newest request; requests are numbered, so one that was heard before does no harm.
    async fn request(&self) -> Result<Option<Request>>;

    /// The journal of the rollout that has not ended, to be read, where there is one.
    async fn unfinished(&self) -> Result<Option<Journal>> {
        Ok(self
            .newest()
            .await?
            .filter(|journal| journal.state().outcome().is_none()))
    }

    /// The same, to be written.
    async fn unfinished_to_write(&self, writer: &Writer) -> Result<Option<Journal>> {
        match self.unfinished().await? {
            Some(journal) => self.for_writing(writer, journal).await.map(Some),
            None => Ok(None),
        }
    }
}

/// The right to write.
pub struct Writer {
    /// Higher than every writer's before.
    pub token: u64,
    lock: Box<dyn Lock>,
}

/// Held as long as it lives.
#[async_trait]
pub trait Lock: Send + Sync {
    /// Gives it back at once. One that is only dropped may be taken for held for a while.
    async fn release(self: Box<Self>);
}

impl Writer {
    pub fn new(token: u64, lock: Box<dyn Lock>) -> Self {
        Self { token, lock }
    }

    /// Lets the next writer in.
    pub async fn release(self) {
        self.lock.release().await;
    }
}

/// A directory for each environment: one file of JSON lines for each rollout, a lock, a request.
#[derive(Debug, Clone)]
pub struct Files {
    dir: PathBuf,
}

impl Files {
    pub fn new(state_dir: &Path, environment: &str) -> Self {
        Self {
            dir: state_dir.join("rollouts").join(environment),
        }
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

    fn path(&self, rollout: &str) -> PathBuf {
        self.dir.join(format!("{rollout}.jsonl"))
    }

    fn request_path(&self) -> PathBuf {
        self.dir.join("request.json")
    }
}

#[async_trait]
impl Desk for Files {
    async fn lock(&self) -> Result<Option<Writer>> {
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
        Ok(Some(Writer::new(last + 1, Box::new(FileLock(lock)))))
    }

    async fn is_busy(&self) -> Result<bool> {
        let lock = File::open(self.dir.join("lock"));
        let tried = lock.map(|lock| lock.try_lock_shared());
        Ok(matches!(tried, Ok(Err(fs::TryLockError::WouldBlock))))
    }

    async fn create(&self, _writer: &Writer, started: Started, state: State) -> Result<Journal> {
        let path = self.path(&started.plan.rollout);
        let file = OpenOptions::new()
            .create_new(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("creating the journal {}", path.display()))?;
        let place = path.display().to_string();
        let journal = Journal::begin(place, Box::new(Lines(file)), started, state).await?;
        // The file itself is durable only when the directory is.
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .with_context(|| format!("writing {}", self.dir.display()))?;
        Ok(journal)
    }

    async fn newest(&self) -> Result<Option<Journal>> {
        for path in self.journals()?.iter().rev() {
            if let Some(journal) = read(path)? {
                return Ok(Some(journal));
            }
        }
        Ok(None)
    }

    async fn read(&self, rollout: &str) -> Result<Journal> {
        let path = self.path(rollout);
        read(&path)?.with_context(|| format!("the journal {} is gone", path.display()))
    }

    async fn for_writing(&self, _writer: &Writer, journal: Journal) -> Result<Journal> {
        let path = self.path(&journal.plan().rollout);
        let context = || format!("opening the journal {}", path.display());
        let file = OpenOptions::new()
            .append(true)
            .open(&path)
            .with_context(context)?;
        let text = fs::read(&path).with_context(context)?;
        let whole = whole(&text);
        if whole.len() < text.len() {
            file.set_len(whole.len() as u64)
                .context("dropping a line that was cut short")?;
        }
        let journal = Journal::parse(path.display().to_string(), whole)?.with_context(context)?;
        Ok(journal.kept_by(Box::new(Lines(file))))
    }

    async fn ask(&self, request: Request) -> Result<()> {
        files::write_json(&self.request_path(), &request)
    }

    async fn request(&self) -> Result<Option<Request>> {
        let path = self.request_path();
        if path.exists() {
            files::read_json(&path).map(Some)
        } else {
            Ok(None)
        }
    }
}

/// The kernel takes it back when the process ends, however it ends.
struct FileLock(File);

#[async_trait]
impl Lock for FileLock {
    async fn release(self: Box<Self>) {
        drop(self.0);
    }
}

/// Reads a journal as far as it has whole lines: its writer may be adding one at this moment, and
/// one that a crash cut short is none.
fn read(path: &Path) -> Result<Option<Journal>> {
    let text = fs::read(path).with_context(|| format!("reading the journal {}", path.display()))?;
    Journal::parse(path.display().to_string(), whole(&text))
}

fn whole(text: &[u8]) -> &[u8] {
    let end = text.iter().rposition(|byte| *byte == b'\n');
    &text[..end.map_or(0, |end| end + 1)]
}

/// A file that only grows.
struct Lines(File);

#[async_trait]
impl Keeper for Lines {
    async fn append(&mut self, text: &str) -> Result<()> {
        let file = &mut self.0;
        let length = file.metadata().map(|file| file.len());
        let written = file
            .write_all(text.as_bytes())
            .and_then(|()| file.sync_data());
        if let (Err(_), Ok(length)) = (&written, length) {
            // A full disk may have taken half a line; the next one must not be glued to it.
            let _ = file.set_len(length);
        }
        Ok(written?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::rollout::journal::Entry;
    use crate::rollout::torture::started;

    #[tokio::test]
    async fn a_line_cut_short_is_dropped_and_other_damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let desk = Files::new(dir.path(), "production");
        let writer = desk.lock().await.unwrap().unwrap();
        let state = State::start(7);
        let journal = desk
            .create(&writer, started(), state.clone())
            .await
            .unwrap();
        let path = PathBuf::from(journal.place());
        let whole = fs::read_to_string(&path).unwrap();
        let read = || read(&path).map(|journal| journal.unwrap());

        // Whoever only reads leaves a line that is being written alone.
        let cut = format!("{whole}{{\"seq\":3,\"at\"");
        fs::write(&path, &cut).unwrap();
        assert_eq!(read().unwrap().state(), state);
        assert_eq!(fs::read_to_string(&path).unwrap(), cut);
        let resumed = [Entry::Resumed { token: 2 }];
        assert!(read().unwrap().append(resumed.clone()).await.is_err());
        let mut journal = desk.for_writing(&writer, read().unwrap()).await.unwrap();
        journal.append(resumed).await.unwrap();
        assert_eq!(read().unwrap().lines().len(), 3);

        fs::write(&path, whole.replacen("\"since\":7", "\"since\":x", 1)).unwrap();
        let error = read().map(|_| ()).unwrap_err();
        assert!(format!("{error:#}").contains("line 2"), "{error:#}");
        let second = whole.lines().nth(1).unwrap();
        fs::write(&path, format!("{whole}{second}\n")).unwrap();
        assert!(read().is_err(), "a line twice");

        // A start that was cut short is none.
        fs::write(&path, &whole[..100]).unwrap();
        assert!(desk.unfinished().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn one_writer_at_a_time_and_tokens_rise() {
        let dir = tempfile::tempdir().unwrap();
        let desk = Files::new(dir.path(), "production");
        let first = desk.lock().await.unwrap().unwrap();
        assert!(desk.lock().await.unwrap().is_none());
        assert!(desk.is_busy().await.unwrap());
        let token = first.token;
        first.release().await;
        assert!(!desk.is_busy().await.unwrap());
        assert!(desk.lock().await.unwrap().unwrap().token > token);
    }
}
