//! Tells people and programs what the driver does, as it does it.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde_json::json;

use super::driver::Notice;
use super::engine::{HoldReason, Kind, Phase, Plan, State, Verdict};
use super::judge::Judgement;
use super::status;
use super::windows::Window;
use crate::output::Output;

/// How often a judgement is repeated in a log that nobody watches.
const LOG_INTERVAL: Duration = Duration::from_secs(10);

/// What people are told of a state; the rest of it is for the journal.
type Told = (Phase, usize, Option<HoldReason>);

pub struct Narrator<'a> {
    output: &'a Output,
    /// The last judgement that was printed, and when.
    said: Mutex<Option<(Instant, Verdict)>>,
    /// The newest state that was told.
    told: Mutex<Option<Told>>,
}

impl<'a> Narrator<'a> {
    pub fn new(output: &'a Output) -> Self {
        Self {
            output,
            said: Mutex::default(),
            told: Mutex::default(),
        }
    }

    pub fn tell(&self, notice: Notice<'_>) {
        match notice {
            Notice::Entered { plan, state } => {
                self.output.event("state", state);
                if !self.is_news(state) {
                    return;
                }
                match (&state.hold, &state.phase) {
                    (Some(hold), _) => self.output.warn(format_args!(
                        "holding: {}",
                        status::hold_reason(&hold.reason)
                    )),
                    (None, Phase::Shift) if plan.kind == Kind::Canary => {
                        let stage = &plan.stages[state.stage];
                        self.output.line(format_args!(
                            "stage {} of {}: {} %",
                            state.stage + 1,
                            plan.stages.len(),
                            stage.weight
                        ));
                    }
                    (None, Phase::Back { reason }) => {
                        self.output
                            .warn(format_args!("going back: {}", status::back_reason(reason)));
                    }
                    _ => {}
                }
            }
            Notice::Acting(action) => {
                self.output.event("action", action);
                self.output.detail(status::action(action));
            }
            Notice::Judged {
                plan,
                state,
                judgement,
                counts,
            } => {
                self.output.event("judgement", judgement);
                self.judged(plan, state, judgement, counts);
            }
            Notice::Trouble(what) => {
                self.output.event("trouble", json!({ "message": what }));
                self.output.warn(what);
            }
        }
    }

    fn is_news(&self, state: &State) -> bool {
        let hold = state.hold.as_ref().map(|hold| hold.reason.clone());
        let new = (state.phase.clone(), state.stage, hold);
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        told.replace(new.clone()) != Some(new)
    }

    fn judged(&self, plan: &Plan, state: &State, judgement: &Judgement, window: &Window) {
        let line = status::judgement_line(plan, state, judgement, window);
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let due = said.is_none_or(|(when, verdict)| {
            verdict != judgement.verdict || self.output.is_log() && when.elapsed() >= LOG_INTERVAL
        });
        if due {
            *said = Some((Instant::now(), judgement.verdict));
            self.output.detail(line);
        } else {
            self.output.progress(line);
        }
    }
}
