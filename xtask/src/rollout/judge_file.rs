//! `cargo xtask canary judge`: the judge of live rollouts on windows from a file.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::engine::{Phase, Verdict};
use super::journal::{Entry, Line, Started};
use super::judge::Judge;
use super::windows::{Window, WindowLine};
use crate::cli::{Cli, JudgeArgs};
use crate::config::Pipeline;
use crate::output::{Exit, Finished, Output};

pub fn run(args: &JudgeArgs, cli: &Cli, output: &Output) -> Result<Finished> {
    let text = if args.file == Path::new("-") {
        std::io::read_to_string(std::io::stdin()).context("reading standard input")?
    } else {
        std::fs::read_to_string(&args.file)
            .with_context(|| format!("reading {}", args.file.display()))?
    };
    let (mut judge, windows) = read_windows(&text, &cli.pipeline)
        .with_context(|| format!("in {}", args.file.display()))?;
    let mut last = None;
    for (weight, window) in &windows {
        if let Some(weight) = weight {
            judge.stage(*weight);
        }
        let judgement = judge.window(window);
        let said = json!({
            "window": judgement.window,
            "verdict": judgement.verdict,
            "metric": judgement.metric,
            "e_value": judgement.e_value,
        });
        if output.is_json() {
            output.event("judgement", said);
        } else {
            output.line(said);
        }
        last = Some(judgement.verdict);
    }
    Ok(match last {
        Some(Verdict::NonInferior) => Finished::new(Exit::Yes, "non-inferior"),
        Some(Verdict::Regressed) => Finished::new(Exit::No, "regressed"),
        Some(_) => Finished::new(Exit::Unknown, "undecided"),
        None => bail!("{} holds no window", args.file.display()),
    }
    .with("windows", windows.len()))
}

/// A window, with the weight of the stage that begins with it if one does.
type StagedWindow = (Option<u8>, Window);

/// The windows of a file, and the judge for them: a journal's own, else the pipeline's.
fn read_windows(text: &str, settings: &Path) -> Result<(Judge, Vec<StagedWindow>)> {
    let mut lines: Vec<WindowLine> = Vec::new();
    let mut started: Option<Started> = None;
    let mut begun: Option<u8> = None;
    let mut snapshot: Option<Judge> = None;
    let mut stages: BTreeMap<u64, u8> = BTreeMap::new();
    for (number, text) in (1..).zip(text.split_inclusive('\n')) {
        if text.trim().is_empty() {
            continue;
        }
        let context = || format!("line {number}");
        let value: serde_json::Value = match serde_json::from_str(text) {
            // A journal's last line may still be being written.
            Err(_) if started.is_some() && !text.ends_with('\n') => break,
            value => value.with_context(context)?,
        };
        match value["event"].as_str() {
            Some("started") => started = Some(serde_json::from_value(value).with_context(context)?),
            Some("state") => {
                let line: Line = serde_json::from_value(value).with_context(context)?;
                if let (Entry::State { state }, Some(started)) = (line.entry, &started)
                    && state.phase == Phase::Watch
                    && state.hold.is_none()
                {
                    begun = started
                        .plan
                        .stages
                        .get(state.stage)
                        .map(|stage| stage.weight);
                }
            }
            // The judge itself stands for all windows before it.
            Some("snapshot") => {
                let line: Line = serde_json::from_value(value).with_context(context)?;
                if let Entry::Snapshot { judge, .. } = line.entry {
                    snapshot = Some(*judge);
                    lines.clear();
                }
            }
            Some(event) if event != "window" => {}
            _ => {
                let line: WindowLine = serde_json::from_value(value).with_context(context)?;
                if let Some(problem) = line.problem() {
                    bail!("line {number}: {problem}");
                }
                stages.extend(begun.take().map(|weight| (line.window, weight)));
                lines.push(line);
            }
        }
    }
    lines.sort_by_key(|line| line.window);
    let windows = lines
        .chunk_by(|a, b| a.window == b.window)
        .map(Window::from_lines)
        .map(|window| (stages.get(&window.number).copied(), window))
        .collect();
    let judge = match (snapshot, started) {
        (Some(snapshot), _) => snapshot,
        (None, Some(started)) => Judge::new(
            &started.judge,
            Some(started.bounds.as_deref().unwrap_or(&[])),
        ),
        (None, None) => Judge::new(&Pipeline::load(settings)?.judge, None),
    };
    Ok((judge, windows))
}
