//! The database of RustSec's advisories: where it is, what state it is in, and how old.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use xshell::{Shell, cmd};

use crate::cargo;
use crate::files;
use crate::setup;

/// Where the advisories are published.
const PUBLISHED: &str = "https://github.com/RustSec/advisory-db";
/// The directory that cargo-deny looks for: a name and a hash made from the address above.
const CLONE: &str = "advisory-db-3157b0e258782691";
/// How long a fetched copy is new enough not to fetch again.
const FRESH: Duration = Duration::from_secs(24 * 3600);
/// Days after which advisories say too little to rely on.
const MAX_AGE_DAYS: i64 = 180;
/// Says when the database beside it was fetched. (git touches its own FETCH_HEAD even in vain.)
const FETCHED: &str = "fetched";

/// A database that cargo-deny can use.
pub struct Database {
    /// cargo-deny's `db-path`.
    pub path: PathBuf,
    pub commit: String,
    /// When the advisories were last changed.
    pub date: jiff::Timestamp,
    /// Why they could not be fetched anew, where that was tried in vain.
    pub not_refreshed: Option<String>,
}

pub enum Found {
    Ready(Database),
    Unavailable(String),
}

impl Database {
    pub fn age_days(&self) -> i64 {
        jiff::Timestamp::now().duration_since(self.date).as_hours() / 24
    }

    /// Why the advisories are too old, if they are.
    pub fn stale(&self) -> Option<String> {
        let age = self.age_days();
        let refresh = self.not_refreshed.as_deref().unwrap_or("take a newer copy");
        (age > MAX_AGE_DAYS).then(|| {
            format!(
                "the advisories are stale: {age} days old, more than {MAX_AGE_DAYS} ({refresh})"
            )
        })
    }
}

/// What names the state of the advisories that a run would use, without any network; `None` where
/// there are none. Part of the key of the step `audit`.
pub fn identity(given: Option<&str>) -> Result<Option<String>> {
    let given = match given {
        Some(given) => Some(given.to_owned()),
        None => std::env::var("XTASK_ADVISORY_DB").ok(),
    };
    if let Some(dir) = given.as_deref().map(Path::new).filter(|dir| dir.is_dir()) {
        return source(dir).map(|(commit, _)| Some(commit));
    }
    let clone = place(given.as_deref().unwrap_or(PUBLISHED))?.join(CLONE);
    Ok(clone.is_dir().then(|| head(&clone)).flatten())
}

/// Makes the database ready: from a directory, or from a git address, by default the published one.
pub fn prepare(given: Option<&str>) -> Result<Found> {
    if let Some(dir) = given.map(Path::new).filter(|dir| dir.is_dir()) {
        return from_directory(dir);
    }
    let address = given.unwrap_or(PUBLISHED);
    if !address.contains(':') {
        bail!("--advisory-db {address}: there is no such directory, and it is no git address");
    }
    from_address(address)
}

/// A plain copy or a clone on this machine. cargo-deny wants a clone, so one is made of it.
fn from_directory(dir: &Path) -> Result<Found> {
    let (commit, date) = source(dir)?;
    let path = place(&format!("{commit} {date}"))?;
    let clone = path.join(CLONE);
    if !clone.is_dir() {
        let making = path.join(format!(".making.{}", std::process::id()));
        let made = copy(dir, &making, date).and_then(|()| match fs::rename(&making, &clone) {
            Ok(()) => Ok(()),
            // Another audit was quicker.
            Err(_) if clone.is_dir() => Ok(()),
            Err(error) => Err(error).context("putting the advisories in place"),
        });
        let _ = fs::remove_dir_all(&making);
        made?;
    }
    Ok(Found::Ready(Database {
        path,
        commit,
        date,
        not_refreshed: None,
    }))
}

fn copy(dir: &Path, to: &Path, date: jiff::Timestamp) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("creating {}", to.display()))?;
    let shell = cargo::shell()?;
    if dir.join(".git").exists() {
        cmd!(shell, "git clone --quiet {dir} {to}").quiet().run()?;
    } else {
        let content = dir.join(".");
        cmd!(shell, "cp -r {content} {to}").quiet().run()?;
        let when = date.to_string();
        let git = |words: &[&str]| {
            cmd!(shell, "git -C {to} -c user.name=audit -c user.email=audit@localhost -c commit.gpgsign=false {words...}")
                .env("GIT_AUTHOR_DATE", &when)
                .env("GIT_COMMITTER_DATE", &when)
                .quiet()
                .run()
        };
        git(&["init", "--quiet"])?;
        git(&["add", "--all"])?;
        git(&["commit", "--quiet", "--message", "copy"])?;
    }
    // cargo-deny takes this file's time for the age of what was fetched.
    let fetched = to.join(".git/FETCH_HEAD");
    let file = fs::File::create(&fetched).context("dating the copy")?;
    let seconds = u64::try_from(date.as_second()).unwrap_or(0);
    let when = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    file.set_modified(when).context("dating the copy")
}

fn from_address(address: &str) -> Result<Found> {
    let path = place(address)?;
    let clone = path.join(CLONE);
    let shell = cargo::shell()?;
    let fetched = fs::metadata(path.join(FETCHED)).and_then(|m| m.modified());
    let fresh = fetched.is_ok_and(|at| at.elapsed().is_ok_and(|age| age < FRESH));
    let mut not_refreshed = None;
    if !fresh && let Err(error) = fetch(&shell, address, &path) {
        if !clone.is_dir() {
            return Ok(Found::Unavailable(format!(
                "no advisories: {error:#}; without a network, --advisory-db DIR names a copy"
            )));
        }
        not_refreshed = Some(format!("{error:#}"));
    }
    let commit = head(&clone).context("reading the advisories' commit")?;
    let date = commit_date(&shell, &clone)?;
    Ok(Found::Ready(Database {
        path,
        commit,
        date,
        not_refreshed,
    }))
}

fn fetch(shell: &Shell, address: &str, path: &Path) -> Result<()> {
    let clone = path.join(CLONE);
    if clone.is_dir() {
        cmd!(shell, "git -C {clone} fetch --quiet --depth 1 origin HEAD")
            .quiet()
            .ignore_stderr()
            .run()?;
        cmd!(shell, "git -C {clone} reset --quiet --hard FETCH_HEAD")
            .quiet()
            .run()?;
        return files::replace(&path.join(FETCHED), b"");
    }
    fs::create_dir_all(path).with_context(|| format!("creating {}", path.display()))?;
    let making = path.join(format!(".making.{}", std::process::id()));
    let made = cmd!(shell, "git clone --quiet --depth 1 {address} {making}")
        // A program asks nobody for a password.
        .env("GIT_TERMINAL_PROMPT", "0")
        .quiet()
        .ignore_stderr()
        .run();
    let placed = made.map_err(anyhow::Error::from).and_then(|()| {
        fs::rename(&making, &clone).context("putting the advisories in place")?;
        files::replace(&path.join(FETCHED), b"")
    });
    let _ = fs::remove_dir_all(&making);
    placed.with_context(|| format!("fetching {address}"))
}

/// The commit and date of the advisories in `dir`: a clone's own, or what the file SOURCE of a
/// plain copy says in its lines `commit …` and `date …`.
fn source(dir: &Path) -> Result<(String, jiff::Timestamp)> {
    if dir.join(".git").exists() {
        let shell = cargo::shell()?;
        let commit = head(dir).context("reading the advisories' commit")?;
        return Ok((commit, commit_date(&shell, dir)?));
    }
    let path = dir.join("SOURCE");
    let text = fs::read_to_string(&path).with_context(|| {
        format!(
            "{} is neither a git clone nor a copy with a file SOURCE that has its commit and date",
            dir.display()
        )
    })?;
    let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name));
    let commit = field("commit ").with_context(|| format!("{} names no commit", path.display()))?;
    let date = field("date ").with_context(|| format!("{} names no date", path.display()))?;
    let date = date
        .trim()
        .parse()
        .with_context(|| format!("in the date of {}", path.display()))?;
    Ok((commit.trim().to_owned(), date))
}

fn head(clone: &Path) -> Option<String> {
    let shell = cargo::shell().ok()?;
    let clone = clone.to_string_lossy();
    cargo::git(&shell, &["-C", &clone, "rev-parse", "HEAD"])
}

fn commit_date(shell: &Shell, clone: &Path) -> Result<jiff::Timestamp> {
    let clone = clone.to_string_lossy();
    let date = cargo::git(shell, &["-C", &clone, "log", "-1", "--format=%ct"]);
    let seconds: i64 = date
        .and_then(|text| text.trim().parse().ok())
        .context("reading the date of the advisories")?;
    jiff::Timestamp::from_second(seconds).context("reading the date of the advisories")
}

fn place(what: &str) -> Result<PathBuf> {
    let name = files::sha256(what.as_bytes())[..16].to_owned();
    Ok(setup::cache_dir()?.join("advisories").join(name))
}
