//! What people do about a rollout that another command may be driving, and to what it has left.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use serde_json::json;

use super::session::Session;
use crate::output::{Exit, Finished};
use crate::platform;
use crate::release::ReleaseId;
use crate::rollout::desk::Writer;
use crate::rollout::driver::view;
use crate::rollout::engine::{Kind, Outcome, Request, RequestKind};
use crate::rollout::{plan, status};

/// How often a journal that another command writes is read.
const POLL: Duration = Duration::from_millis(200);
/// How long `promote` waits to be heard.
const HEARD_WITHIN: Duration = Duration::from_secs(10);

impl Session<'_> {
    pub async fn promote(&self) -> Result<Finished> {
        let Some(journal) = self.desk.unfinished().await? else {
            bail!(
                "there is nothing to promote in {}: no rollout is unfinished",
                self.name
            );
        };
        let asked = self
            .desk
            .request()
            .await?
            .filter(|asked| asked.number > journal.state().request);
        if asked.is_some_and(|asked| asked.kind == RequestKind::Abort) {
            bail!("the rollout is being given up: abort was asked for, and wins");
        }
        let number = self
            .ask(RequestKind::Promote {
                stage: journal.state().stage,
            })
            .await?;
        if let Some(writer) = self.desk.lock().await? {
            let mut journal = self.desk.for_writing(&writer, journal).await?;
            let kind = journal.plan().kind;
            let moved = self.take_over(&writer, &mut journal, kind).await;
            writer.release().await;
            return moved;
        }
        let deadline = Instant::now() + HEARD_WITHIN;
        let rollout = &journal.plan().rollout;
        while self.desk.read(rollout).await?.state().request < number {
            if Instant::now() > deadline {
                bail!("asked for, but not yet heard: the candidate is not ready for its weight");
            }
            tokio::time::sleep(POLL).await;
        }
        self.output
            .good(format_args!("{} moves on", journal.plan().rollout));
        Ok(Finished::passed().with("rollout", &journal.plan().rollout))
    }

    pub async fn abort(&self) -> Result<Finished> {
        let Some(journal) = self.desk.unfinished().await? else {
            self.output
                .line(format_args!("there is nothing to abort in {}", self.name));
            return Ok(Finished::new(Exit::Yes, "idle"));
        };
        self.ask(RequestKind::Abort).await?;
        let rollout = journal.plan().rollout.clone();
        let ended = loop {
            if let Some(writer) = self.desk.lock().await? {
                let journal = self.desk.read(&rollout).await?;
                let mut journal = self.desk.for_writing(&writer, journal).await?;
                let given_up = match journal.state().outcome() {
                    // It only goes back, and nothing is checked for that.
                    None => self
                        .take_over(&writer, &mut journal, Kind::Rollback)
                        .await
                        .map(|_| ()),
                    Some(_) => Ok(()),
                };
                writer.release().await;
                given_up?;
                break journal;
            }
            let journal = self.desk.read(&rollout).await?;
            if journal.state().outcome().is_some() {
                break journal;
            }
            self.output
                .progress("waiting for the command that drives the rollout");
            tokio::time::sleep(POLL).await;
        };
        let outcome = match ended.state().outcome() {
            Some(Outcome::Healthy) => {
                self.output.warn(
                    "too late: the release had its place already; `cargo xtask rollback` goes back",
                );
                return Ok(Finished::new(Exit::No, "healthy"));
            }
            Some(Outcome::Aborted) => "aborted",
            Some(Outcome::RolledBack) => "rolled-back",
            Some(Outcome::Failed) => "failed",
            None => bail!("the rollout is held; see `cargo xtask canary status`"),
        };
        self.output.good(match &ended.started().stable_name {
            Some(stable) => format!("all traffic of {} is on {stable}", self.name),
            None => format!("nothing is in service in {}", self.name),
        });
        Ok(Finished::new(Exit::Yes, outcome).with("rollout", &ended.plan().rollout))
    }

    /// Ends what was kept to go back to, once its time is over or at once.
    pub async fn retire(&self, at_once: bool) -> Result<Finished> {
        let writer = self.become_writer().await?;
        let retired = self.retire_as(&writer, at_once).await;
        writer.release().await;
        retired
    }

    async fn retire_as(&self, writer: &Writer, at_once: bool) -> Result<Finished> {
        self.check_idle().await?;
        let mut platform = platform::open(&self.pipeline, &self.name).await?;
        let status = platform.status().await?;
        let now = jiff::Timestamp::now();
        let named = |id: &ReleaseId| {
            let version = status.release(id).map_or("", |release| &release.version);
            format!("{version} ({})", id.short())
        };
        let mut retired = Vec::new();
        for (id, until) in plan::kept(&status, self.keep_previous()) {
            if until > now && !at_once {
                self.output.line(format_args!(
                    "{} is kept until {until:.0}; --now ends it",
                    named(&id)
                ));
            } else {
                retired.push(id);
            }
        }
        if retired.is_empty() {
            let name = &self.name;
            self.output
                .line(format_args!("nothing is to be stopped in {name}"));
        } else {
            for id in status.stable.iter().chain(&retired) {
                self.prepare_to_stop(&mut *platform, id).await;
            }
            platform.claim(writer.token).await?;
        }
        for id in &retired {
            platform.stop(id, writer.token).await?;
            self.output.good(format_args!(
                "{} is stopped; a rollback to it starts it again",
                named(id)
            ));
        }
        Ok(Finished::passed()
            .with("environment", &self.name)
            .with("retired", retired))
    }

    /// How long a replaced release is kept; without the setting its time is over at once.
    pub fn keep_previous(&self) -> Duration {
        let time = self.pipeline.rollout.keep_previous;
        time.map_or(Duration::ZERO, |time| time.0)
    }

    async fn ask(&self, kind: RequestKind) -> Result<u64> {
        // Clocks differ: whoever asks later has the higher number all the same.
        let last = self.desk.request().await?.map_or(0, |asked| asked.number);
        let now = u64::try_from(jiff::Timestamp::now().as_microsecond()).unwrap_or(0);
        let number = now.max(last + 1);
        self.desk.ask(Request { number, kind }).await?;
        Ok(number)
    }

    pub async fn status(&self) -> Result<Finished> {
        let Some(journal) = self.desk.newest().await? else {
            self.output
                .line(format_args!("there has been no rollout in {}", self.name));
            return Ok(Finished::new(Exit::Yes, "idle"));
        };
        let looked = platform::look(&self.pipeline, &self.name).await?;
        let driven = self.desk.is_busy().await?;
        let now = looked.as_ref().map(|(now, _)| now);
        let seen = now.map(|now| view(journal.plan(), now));
        status::rollout(&journal, seen.as_ref(), driven, self.output);
        match &looked {
            Some((now, address)) => {
                let mut kept = plan::kept(now, self.keep_previous());
                // One that is on its way up is not kept.
                if journal.state().outcome().is_none() {
                    kept.retain(|(id, _)| *id != journal.plan().candidate);
                }
                status::running(now, &kept, address, self.output);
                if let Some(why) = now.lost() {
                    self.output
                        .warn(format_args!("{why}; {}", self.puts_back(now)));
                }
            }
            None => self
                .output
                .line("the sandbox is stopped; what it had is kept for its next start"),
        }
        let state = journal.state();
        let judgement = journal
            .judgements()
            .next_back()
            .map(|(_, judgement)| judgement);
        self.output.event(
            "status",
            json!({ "plan": journal.plan(), "state": state, "judgement": judgement, "platform": now, "driven": driven }),
        );
        let outcome = match (state.outcome(), &state.hold) {
            (Some(Outcome::Healthy), _) => "healthy",
            (Some(Outcome::RolledBack), _) => "rolled-back",
            (Some(Outcome::Aborted), _) => "aborted",
            (Some(Outcome::Failed), _) => "failed",
            (None, Some(_)) => "held",
            (None, None) if driven => "running",
            (None, None) => "interrupted",
        };
        Ok(Finished::new(Exit::Yes, outcome).with("rollout", &journal.plan().rollout))
    }
}
