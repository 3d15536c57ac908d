//! What a step is: a row of data. The runner, the cache, the receipt and the workflows read it.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::facts::XTASK;
use crate::config::Time;

/// One check of the pipeline.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Row")]
pub struct Step {
    pub name: String,
    /// What holds when it passes.
    pub proves: String,
    /// The program and its arguments; `cargo xtask …` is this very program, whatever cargo would
    /// build now.
    #[serde(rename = "run")]
    pub argv: Vec<String>,
    #[serde(flatten)]
    pub kind: Kind,
    /// Steps that must have passed before it starts.
    pub needs: Vec<String>,
    /// What no other step may use meanwhile.
    pub locks: Vec<String>,
    /// Entries of `config/tools.toml`, or another fact its outcome depends on (`ci::facts`).
    pub tools: Vec<String>,
    /// Variables that it gets besides the environment that every step has.
    pub variables: BTreeMap<String, String>,
    pub cores: Cores,
    pub time_out: Time,
    /// The command that mends what it finds, for `ci --fix`.
    pub mend: Vec<String>,
    /// Whether it is worth its time before each push: `ci fast`.
    pub fast: bool,
    /// The job of the workflow that runs it.
    pub job: String,
}

/// Whether a pass may be remembered. What has an effect has no inputs, so no key can be made.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Kind {
    Check(Inputs),
    Effect {
        /// What it changes.
        effect: String,
    },
}

/// All that the outcome of a check depends on, besides its command and tools.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Inputs {
    /// Patterns of files, from the workspace's root.
    pub reads: Vec<String>,
    /// Packages of the workspace: their files, and those of the packages they are made from.
    pub packages: Vec<String>,
    /// Variables of the environment that it sees.
    pub environment: Vec<String>,
    /// Files that it leaves for others; a pass counts while they are as it left them.
    pub writes: Vec<String>,
}

/// How much of the machine a step keeps busy.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cores {
    #[default]
    One,
    All,
}

/// A step as a file has it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Row {
    name: String,
    #[serde(default)]
    proves: String,
    run: Vec<String>,
    reads: Option<Vec<String>>,
    #[serde(default)]
    packages: Vec<String>,
    #[serde(default)]
    environment: Vec<String>,
    #[serde(default)]
    writes: Vec<String>,
    effect: Option<String>,
    #[serde(default)]
    needs: Vec<String>,
    #[serde(default)]
    locks: Vec<String>,
    #[serde(default)]
    tools: Vec<String>,
    #[serde(default)]
    variables: BTreeMap<String, String>,
    #[serde(default)]
    cores: Cores,
    time_out: Option<Time>,
    #[serde(default)]
    mend: Vec<String>,
    #[serde(default)]
    fast: bool,
    #[serde(default)]
    job: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Table {
    step: Vec<Step>,
}

impl Step {
    /// A check; `run` is its command in words without quotes.
    pub fn check(name: &str, proves: &str, run: &str) -> Self {
        Self {
            name: name.to_owned(),
            proves: proves.to_owned(),
            argv: words(run),
            kind: Kind::Check(Inputs::default()),
            needs: Vec::new(),
            locks: Vec::new(),
            tools: Vec::new(),
            variables: BTreeMap::new(),
            cores: Cores::One,
            time_out: DEFAULT_TIME_OUT,
            mend: Vec::new(),
            fast: false,
            job: String::new(),
        }
    }

    pub fn reads(self, patterns: &[&str]) -> Self {
        self.with(|inputs| inputs.reads.extend(owned(patterns)))
    }

    pub fn packages(self, packages: &[&str]) -> Self {
        self.with(|inputs| inputs.packages.extend(owned(packages)))
    }

    pub fn environment(self, variables: &[&str]) -> Self {
        self.with(|inputs| inputs.environment.extend(owned(variables)))
    }

    pub fn writes(self, files: &[&str]) -> Self {
        self.with(|inputs| inputs.writes.extend(owned(files)))
    }

    pub fn needs(mut self, steps: &[&str]) -> Self {
        self.needs.extend(owned(steps));
        self
    }

    pub fn locks(mut self, resources: &[&str]) -> Self {
        self.locks.extend(owned(resources));
        self
    }

    pub fn tools(mut self, tools: &[&str]) -> Self {
        self.tools.extend(owned(tools));
        self
    }

    pub fn variable(mut self, name: &str, value: &str) -> Self {
        self.variables.insert(name.to_owned(), value.to_owned());
        self
    }

    pub fn all_cores(mut self) -> Self {
        self.cores = Cores::All;
        self
    }

    pub fn minutes(mut self, minutes: u64) -> Self {
        self.time_out = Time(std::time::Duration::from_secs(60 * minutes));
        self
    }

    pub fn mended_by(mut self, command: &str) -> Self {
        self.mend = words(command);
        self
    }

    pub fn fast(mut self) -> Self {
        self.fast = true;
        self
    }

    pub fn job(mut self, job: &str) -> Self {
        self.job = job.to_owned();
        self
    }

    /// The command as a person would paste it.
    pub fn command_line(&self) -> String {
        let variables = self
            .variables
            .iter()
            .map(|(name, value)| format!("{name}={}", quote(value)));
        let words = self.argv.iter().map(|word| quote(word));
        variables.chain(words).collect::<Vec<_>>().join(" ")
    }

    /// Whether this program runs it itself.
    pub fn is_own(&self) -> bool {
        matches!(self.argv.as_slice(), [cargo, xtask, ..] if cargo == "cargo" && xtask == "xtask")
    }

    /// All the tools and facts that its outcome depends on.
    pub fn facts(&self) -> impl Iterator<Item = &str> {
        let own = self.is_own().then_some(XTASK);
        self.tools.iter().map(String::as_str).chain(own)
    }

    pub fn inputs(&self) -> Option<&Inputs> {
        match &self.kind {
            Kind::Check(inputs) => Some(inputs),
            Kind::Effect { .. } => None,
        }
    }

    fn with(mut self, change: impl FnOnce(&mut Inputs)) -> Self {
        if let Kind::Check(inputs) = &mut self.kind {
            change(inputs);
        }
        self
    }
}

const DEFAULT_TIME_OUT: Time = Time(std::time::Duration::from_secs(20 * 60));

/// The steps in a file, for other tables than the one that is built in.
pub fn read(path: &Path) -> Result<Vec<Step>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let table: Table =
        toml::from_str(&text).with_context(|| format!("in the steps of {}", path.display()))?;
    Ok(table.step)
}

/// Refuses a table in which names repeat, needs lead nowhere or in a circle.
pub fn verify(steps: &[Step]) -> Result<()> {
    let mut problems = Vec::new();
    for (at, step) in steps.iter().enumerate() {
        if step.argv.is_empty() {
            problems.push(format!("step {:?} runs nothing", step.name));
        }
        if step.name.is_empty() || step.name.contains(['/', '\0', ',']) {
            problems.push(format!("{:?} is no name for a step", step.name));
        }
        if steps[..at].iter().any(|other| other.name == step.name) {
            problems.push(format!("there are two steps {:?}", step.name));
        }
        for need in &step.needs {
            // Only what stands above can be needed, so there is no circle.
            if !steps[..at].iter().any(|other| other.name == *need) {
                problems.push(format!(
                    "step {:?} needs {need:?}, which is no step above it",
                    step.name
                ));
            }
        }
    }
    if problems.is_empty() {
        return Ok(());
    }
    bail!("{}", problems.join("\n"))
}

impl TryFrom<Row> for Step {
    type Error = String;

    fn try_from(row: Row) -> Result<Self, String> {
        let kind = match (row.reads, row.effect) {
            (Some(reads), None) => Kind::Check(Inputs {
                reads,
                packages: row.packages,
                environment: row.environment,
                writes: row.writes,
            }),
            (None, Some(effect)) => Kind::Effect { effect },
            _ => {
                return Err(format!(
                    "step {:?} has either `reads` (a check) or `effect` (what it changes)",
                    row.name
                ));
            }
        };
        Ok(Self {
            name: row.name,
            proves: row.proves,
            argv: row.run,
            kind,
            needs: row.needs,
            locks: row.locks,
            tools: row.tools,
            variables: row.variables,
            cores: row.cores,
            time_out: row.time_out.unwrap_or(DEFAULT_TIME_OUT),
            mend: row.mend,
            fast: row.fast,
            job: row.job,
        })
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

fn owned<'a>(words: &'a [&str]) -> impl Iterator<Item = String> + 'a {
    words.iter().map(|word| (*word).to_owned())
}

fn words(command: &str) -> Vec<String> {
    command.split_whitespace().map(str::to_owned).collect()
}

/// `word` as a POSIX shell reads it back.
pub fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_=+:,./@%^".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_cannot_be_run_is_refused() {
        let step = |name: &str, needs: &[&str]| Step::check(name, "", "true").needs(needs);
        let table = [step("a", &["b"]), step("b", &[]), step("b", &["nothing"])];
        let error = verify(&table).unwrap_err().to_string();
        for part in ["needs \"b\"", "two steps \"b\"", "needs \"nothing\""] {
            assert!(error.contains(part), "no {part} in {error}");
        }
        verify(&[step("a", &[]), step("b", &["a"])]).unwrap();
    }

    #[test]
    fn what_has_an_effect_has_no_inputs() {
        let row = |text: &str| toml::from_str::<Step>(text).map_err(|error| error.to_string());
        let effect = row("name = 'push'\nrun = ['true']\neffect = 'a push'").unwrap();
        assert_eq!(effect.inputs(), None);
        let both = row("name = 'push'\nrun = ['true']\neffect = 'a push'\nreads = ['**']");
        assert!(both.unwrap_err().contains("either `reads`"));
        assert!(row("name = 'x'\nrun = []\nreads = []\nlock = []").is_err());
    }

    #[test]
    fn a_command_line_can_be_pasted() {
        let step = Step::check("doc", "", "cargo doc").variable("RUSTDOCFLAGS", "--deny it's");
        assert_eq!(
            step.command_line(),
            r"RUSTDOCFLAGS='--deny it'\''s' cargo doc"
        );
    }
}
