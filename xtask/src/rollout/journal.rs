//! The append-only record of a rollout, from which it is resumed and replayed.
//!
//! Numbered lines of JSON. A line is kept for good, by whoever keeps the journal ([`Keeper`]),
//! before what it announces is done.

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::engine::{Action, Phase, Plan, Reason, State};
use super::judge::{Judge, Judgement};
use super::windows::WindowLine;
use crate::config::Judge as JudgeSettings;
use crate::platform::InstanceCounts;

/// Entries besides windows that a journal keeps when it is made shorter.
const KEPT: usize = 200;

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
    /// The judge after all windows so far, instead of those: a journal that has grown long.
    Snapshot {
        judge: Box<Judge>,
        windows: u64,
    },
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
    /// Where it is, for people.
    place: String,
    /// Only the environment's writer can add to it.
    keeper: Option<Box<dyn Keeper>>,
    lines: Vec<Line>,
}

/// Keeps a journal's lines, in a file or in a cluster.
#[async_trait]
pub trait Keeper: Send + Sync {
    /// Adds `text`, which is whole lines; they are kept for good when this returns.
    async fn append(&mut self, text: &str) -> Result<()>;

    /// Whether it is time to make it shorter.
    fn is_full(&self) -> bool {
        false
    }

    /// Keeps `text` instead of all that was kept before.
    async fn replace(&mut self, _text: &str) -> Result<()> {
        Ok(())
    }
}

impl Journal {
    /// A journal of these lines. `None` where there is none, so that nothing can have been done.
    /// `text` must be whole lines.
    pub fn parse(place: String, text: &[u8]) -> Result<Option<Self>> {
        let mut lines: Vec<Line> = Vec::new();
        for (number, line) in (1u64..).zip(text.split_inclusive(|byte| *byte == b'\n')) {
            let damaged = || {
                format!(
                    "the journal is damaged: {place} line {number}; restore it, or move it away \
                     to give this rollout up and start another"
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
                place,
                keeper: None,
                lines,
            })),
            Some(_) => bail!(
                "the journal {place} does not begin with the start of a rollout; move it away"
            ),
        }
    }

    /// A journal that begins now.
    pub async fn begin(
        place: String,
        keeper: Box<dyn Keeper>,
        started: Started,
        state: State,
    ) -> Result<Self> {
        let mut journal = Self {
            place,
            keeper: Some(keeper),
            lines: Vec::new(),
        };
        journal
            .append([Entry::Started(Box::new(started)), Entry::State { state }])
            .await?;
        Ok(journal)
    }

    /// The same journal for its writer.
    #[must_use]
    pub fn kept_by(self, keeper: Box<dyn Keeper>) -> Self {
        Self {
            keeper: Some(keeper),
            ..self
        }
    }

    /// Appends entries; they are kept for good when this returns.
    pub async fn append(&mut self, entries: impl IntoIterator<Item = Entry>) -> Result<()> {
        let mut text = String::new();
        let mut lines = Vec::new();
        let at = jiff::Timestamp::now();
        for (seq, entry) in (self.lines.len() as u64 + 1..).zip(entries) {
            let line = Line { seq, at, entry };
            text.push_str(&serde_json::to_string(&line).context("describing a journal entry")?);
            text.push('\n');
            lines.push(line);
        }
        let Some(keeper) = &mut self.keeper else {
            bail!("the journal {} was opened to be read only", self.place);
        };
        keeper
            .append(&text)
            .await
            .with_context(|| format!("writing the journal {}", self.place))?;
        self.lines.extend(lines);
        Ok(())
    }

    /// Makes a long journal shorter: the judge itself takes the place of the windows that it was
    /// told, so that whoever resumes judges the same.
    pub async fn compact(&mut self, judge: &Judge, windows: u64) -> Result<()> {
        let Some(keeper) = self.keeper.as_mut().filter(|keeper| keeper.is_full()) else {
            return Ok(());
        };
        let mut rest: Vec<Line> = self.lines[1..]
            .iter()
            .filter(|line| !matches!(line.entry, Entry::Window(_) | Entry::Snapshot { .. }))
            .cloned()
            .collect();
        let newest = |lines: &[Line]| {
            let is_state = |line: &&Line| matches!(line.entry, Entry::State { .. });
            lines.iter().rfind(is_state).cloned()
        };
        let state = newest(&rest);
        rest.drain(..rest.len().saturating_sub(KEPT));
        // However old the newest state is, it is where the rollout stands.
        if newest(&rest).is_none() {
            rest.splice(0..0, state);
        }
        let mut lines = vec![self.lines[0].clone()];
        lines.append(&mut rest);
        lines.push(Line {
            seq: 0,
            at: jiff::Timestamp::now(),
            entry: Entry::Snapshot {
                judge: Box::new(judge.clone()),
                windows,
            },
        });
        let mut text = String::new();
        for (seq, line) in (1..).zip(&mut lines) {
            line.seq = seq;
            text.push_str(&serde_json::to_string(line).context("describing a journal entry")?);
            text.push('\n');
        }
        keeper
            .replace(&text)
            .await
            .with_context(|| format!("writing the journal {}", self.place))?;
        self.lines = lines;
        Ok(())
    }

    pub fn started(&self) -> &Started {
        match &self.lines[0].entry {
            Entry::Started(started) => started,
            _ => unreachable!("a journal begins with the start; `parse` and `begin` see to it"),
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

    /// Why it has turned back, if it has.
    pub fn turned_back(&self) -> Option<&Reason> {
        self.lines.iter().rev().find_map(|line| match &line.entry {
            Entry::State {
                state:
                    State {
                        phase: Phase::Back { reason },
                        ..
                    },
            } => Some(reason),
            _ => None,
        })
    }

    pub fn lines(&self) -> &[Line] {
        &self.lines
    }

    /// Where it is, for people.
    pub fn place(&self) -> &str {
        &self.place
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
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::rollout::torture::started;

    /// Keeps lines in memory, and is always full.
    struct Memory(Arc<Mutex<String>>);

    #[async_trait]
    impl Keeper for Memory {
        async fn append(&mut self, text: &str) -> Result<()> {
            self.0.lock().unwrap().push_str(text);
            Ok(())
        }

        fn is_full(&self) -> bool {
            true
        }

        async fn replace(&mut self, text: &str) -> Result<()> {
            *self.0.lock().unwrap() = text.to_owned();
            Ok(())
        }
    }

    /// However long a stage is watched, the state stays, and with it how far the rollout is.
    #[tokio::test]
    async fn a_journal_that_was_made_shorter_says_the_same() {
        let kept = Arc::new(Mutex::new(String::new()));
        let keeper = Box::new(Memory(Arc::clone(&kept)));
        let state = State {
            stage: 1,
            request: 42,
            exposed: true,
            ..State::start(7)
        };
        let mut journal = Journal::begin("here".to_owned(), keeper, started(), state.clone())
            .await
            .unwrap();
        let mut judge = Judge::new(&journal.started().judge, Some(&[]));
        for number in 1..=500 {
            let window = crate::rollout::windows::Window {
                number,
                ..Default::default()
            };
            let judged = Entry::Judged(judge.window(&window));
            journal.append([judged]).await.unwrap();
            journal.compact(&judge, number).await.unwrap();
        }
        let text = kept.lock().unwrap().clone();
        let again = Journal::parse("here".to_owned(), text.as_bytes());
        let again = again.unwrap().unwrap();
        assert_eq!(again.state(), state);
        assert!(again.lines().len() < 300, "{} lines", again.lines().len());
        let (replayed, windows) = crate::rollout::driver::replay(&again);
        assert_eq!((replayed, windows), (judge, 500));
    }
}
