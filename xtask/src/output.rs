//! The one printer: text for people, JSON lines for programs, groups for GitHub Actions.
//!
//! In JSON mode standard output carries only JSON; everything for people goes to standard error.

use std::fmt::Display;
use std::fs::File;
use std::io::{IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::time::Duration;

use anstyle::{AnsiColor, Style};
use anyhow::Result;
use clap::CommandFactory;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::cli::{Cli, Color, MessageFormat};
use crate::files;

const BOLD: Style = Style::new().bold();
const DIM: Style = Style::new().dimmed();
const GREEN: Style = AnsiColor::Green.on_default().bold();
const RED: Style = AnsiColor::Red.on_default().bold();
const YELLOW: Style = AnsiColor::Yellow.on_default().bold();
const CYAN: Style = AnsiColor::Cyan.on_default().bold();

pub struct Output {
    command: &'static str,
    json: bool,
    color: bool,
    terminal: bool,
    /// GitHub Actions folds what stands between `::group::` and `::endgroup::`.
    actions: bool,
    /// How many lines of progress stand on the terminal and must be wiped before anything else.
    transient: Mutex<usize>,
}

/// How a command ended.
#[derive(Debug)]
pub struct Finished {
    pub exit: Exit,
    pub outcome: &'static str,
    /// More fields of the last JSON line.
    pub fields: Map<String, Value>,
}

/// The exit codes that other programs read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// Yes: done, or the checks hold.
    Yes = 0,
    /// No: a check failed, or a release was judged bad and rolled back.
    No = 1,
    /// Could not tell: bad usage or config, a missing tool, metrics away, held.
    Unknown = 2,
}

impl Finished {
    pub fn new(exit: Exit, outcome: &'static str) -> Self {
        Self {
            exit,
            outcome,
            fields: Map::new(),
        }
    }

    pub fn passed() -> Self {
        Self::new(Exit::Yes, "passed")
    }

    #[must_use]
    pub fn with(mut self, key: &str, value: impl Serialize) -> Self {
        self.fields.insert(key.to_owned(), json!(value));
        self
    }
}

impl Output {
    pub fn new(cli: &Cli) -> Self {
        let json = cli.message_format == MessageFormat::Json;
        let terminal = if json {
            std::io::stderr().is_terminal()
        } else {
            std::io::stdout().is_terminal()
        };
        let ci = std::env::var_os("CI").is_some();
        let color = match cli.color {
            Color::Always => true,
            Color::Never => false,
            Color::Auto => terminal && !ci && std::env::var_os("NO_COLOR").is_none(),
        };
        Self {
            command: cli.command.name(),
            json,
            color,
            terminal: terminal && !ci,
            actions: std::env::var_os("GITHUB_ACTIONS").is_some(),
            transient: Mutex::new(0),
        }
    }

    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Whether nobody looks on while it runs, so that all there is to say must be in the log.
    pub fn is_log(&self) -> bool {
        !self.terminal
    }

    /// A heading: what is being done now.
    pub fn step(&self, text: impl Display) {
        self.people(&self.paint(CYAN, format_args!("==> {text}")));
    }

    pub fn line(&self, text: impl Display) {
        self.people(&text.to_string());
    }

    pub fn detail(&self, text: impl Display) {
        self.people(&self.paint(DIM, format_args!("    {text}")));
    }

    pub fn good(&self, text: impl Display) {
        self.people(&format!("{} {text}", self.paint(GREEN, "ok")));
    }

    pub fn bad(&self, text: impl Display) {
        self.ended("failed", text);
    }

    /// The end of something that did not go well, and how it ended.
    pub fn ended(&self, how: &str, text: impl Display) {
        self.people(&format!("{} {text}", self.paint(RED, how)));
    }

    pub fn warn(&self, text: impl Display) {
        self.people(&format!("{} {text}", self.paint(YELLOW, "warning")));
    }

    /// What is wrong, or only worth a look.
    pub fn bad_or_warn(&self, is_bad: bool, text: impl Display) {
        if is_bad {
            self.bad(text);
        } else {
            self.warn(text);
        }
    }

    /// A command about to run, as a person could paste it.
    pub fn command(&self, command: impl Display) {
        self.people(&self.paint(DIM, format_args!("$ {command}")));
    }

    /// A line that the next one replaces; only a terminal shows it.
    pub fn progress(&self, text: impl Display) {
        self.view(&[text.to_string()]);
    }

    /// Lines that the next ones replace; only a terminal shows them, each cut to its width.
    pub fn view(&self, lines: &[String]) {
        if !self.terminal {
            return;
        }
        self.wipe();
        let mut transient = self.lock();
        let mut stream = self.stream();
        let size = if self.json {
            rustix::termios::tcgetwinsize(std::io::stderr())
        } else {
            rustix::termios::tcgetwinsize(std::io::stdout())
        };
        // A terminal that does not know its size says 0.
        let size = size.ok().filter(|size| size.ws_col > 0 && size.ws_row > 0);
        let (width, height) = size.map_or((80, 24), |size| (size.ws_col, size.ws_row));
        let room = usize::from(height.saturating_sub(2)).max(1);
        for line in lines.iter().take(room) {
            let line: String = line.chars().take(usize::from(width.max(2)) - 1).collect();
            // A terminal that is gone is no reason to stop working.
            let _ = writeln!(stream, "{}", self.paint(DIM, line));
        }
        let _ = stream.flush();
        *transient = lines.len().min(room);
    }

    /// Rows under a heading, each column as wide as its widest cell.
    pub fn table(&self, heading: &[&str], rows: &[Vec<String>]) {
        let mut widths: Vec<usize> = heading.iter().map(|cell| cell.chars().count()).collect();
        for row in rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = (*width).max(cell.chars().count());
            }
        }
        let pad = |cells: &mut dyn Iterator<Item = &str>| {
            let mut line = String::new();
            for (cell, width) in cells.zip(&widths) {
                line.push_str(&format!("{cell:<width$}  "));
            }
            line.trim_end().to_owned()
        };
        self.people(&self.paint(BOLD, pad(&mut heading.iter().copied())));
        for row in rows {
            self.people(&pad(&mut row.iter().map(String::as_str)));
        }
    }

    /// A log that Actions can fold; of a long one, the beginning and the end are shown.
    pub fn log(&self, title: impl Display, path: &Path) {
        if self.actions {
            self.people(&format!("::group::{title}"));
        } else {
            self.step(title);
        }
        self.quoted(|| {
            if let Err(error) = copy_ends(path, &mut self.stream()) {
                self.warn(format_args!("cannot show {}: {error}", path.display()));
            }
        });
        if self.actions {
            self.people("::endgroup::");
        }
    }

    /// Lines of somebody else's.
    pub fn quote(&self, lines: &[String]) {
        self.quoted(|| {
            for line in lines {
                self.line(format_args!("    {line}"));
            }
        });
    }

    /// Prints something in which Actions must take nothing for a command to its runner.
    fn quoted(&self, print: impl FnOnce()) {
        self.wipe();
        if !self.actions {
            return print();
        }
        // Nobody who wrote the lines could know this word.
        let now = jiff::Timestamp::now().as_nanosecond();
        let token = files::sha256(format!("{now} {}", std::process::id()).as_bytes());
        self.people(&format!("::stop-commands::{token}"));
        print();
        self.people(&format!("::{token}::"));
    }

    /// A workflow command, for Actions alone.
    pub fn annotate(&self, command: &str) {
        if self.actions {
            self.people(command);
        }
    }

    /// Whether GitHub Actions runs this.
    pub fn is_actions(&self) -> bool {
        self.actions
    }

    /// An event for programs: one JSON object on a line of standard output.
    pub fn event(&self, name: &str, fields: impl Serialize) {
        if !self.json {
            return;
        }
        let mut object = Map::new();
        object.insert("event".into(), name.into());
        object.insert("at".into(), jiff::Timestamp::now().to_string().into());
        if let Value::Object(fields) = json!(fields) {
            object.extend(
                fields
                    .into_iter()
                    .filter(|(key, _)| key != "event" && key != "at"),
            );
        }
        self.wipe();
        let _guard = self.lock();
        let mut stdout = std::io::stdout().lock();
        // A reader that went away has seen enough.
        let _ = writeln!(stdout, "{}", Value::Object(object));
        let _ = stdout.flush();
    }

    /// Prints the last word and gives the process its exit code.
    pub fn finish(&self, finished: Result<Finished>) -> ExitCode {
        let (exit, outcome, mut fields) = match finished {
            Ok(finished) => (finished.exit, finished.outcome, finished.fields),
            Err(error) => {
                self.people_on_stderr(&format!("{} {error:#}", self.paint(RED, "error")));
                (
                    Exit::Unknown,
                    "failed",
                    Map::from_iter([("error".into(), format!("{error:#}").into())]),
                )
            }
        };
        fields.insert("command".into(), self.command.into());
        fields.insert("outcome".into(), outcome.into());
        fields.insert("exit_code".into(), (exit as u8).into());
        self.wipe();
        self.event("finished", fields);
        ExitCode::from(exit as u8)
    }

    pub fn paint(&self, style: Style, text: impl Display) -> String {
        if self.color {
            format!("{style}{text}{style:#}")
        } else {
            text.to_string()
        }
    }

    fn people(&self, text: &str) {
        self.wipe();
        let mut stream = self.stream();
        let _ = writeln!(stream, "{text}");
    }

    fn people_on_stderr(&self, text: &str) {
        self.wipe();
        let _ = writeln!(std::io::stderr(), "{text}");
    }

    fn wipe(&self) {
        let mut transient = self.lock();
        let lines = std::mem::take(&mut *transient);
        if lines > 0 {
            // Up to the first line, then clear from there on.
            let _ = write!(self.stream(), "\x1b[{lines}A\x1b[J");
        }
    }

    fn stream(&self) -> Box<dyn Write> {
        if self.json {
            Box::new(std::io::stderr())
        } else {
            Box::new(std::io::stdout())
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, usize> {
        self.transient
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// What clap says of arguments that cannot be, or that ask for help. Programs get their last line
/// even then.
pub fn usage(error: &clap::Error) -> ExitCode {
    // A terminal that is gone is no reason to end differently.
    let _ = error.print();
    let code = u8::try_from(error.exit_code()).unwrap_or(Exit::Unknown as u8);
    let arguments: Vec<String> = std::env::args_os()
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let asked = |pair: &[String]| pair[0] == "--message-format" && pair[1] == "json";
    let json = arguments.windows(2).any(asked)
        || arguments
            .iter()
            .any(|argument| argument == "--message-format=json");
    let command = Cli::command();
    let names: Vec<&str> = command
        .get_subcommands()
        .map(clap::Command::get_name)
        .collect();
    let command = arguments
        .iter()
        .find(|argument| names.contains(&argument.as_str()));
    if json && code != 0 {
        let at = jiff::Timestamp::now().to_string();
        let last = json!({
            "event": "finished", "at": at, "command": command, "outcome": "failed",
            "exit_code": code, "error": error.to_string().trim(),
        });
        let _ = writeln!(std::io::stdout(), "{last}");
    }
    ExitCode::from(code)
}

/// Copies a file, or of a long one the first and the last part, byte by byte.
fn copy_ends(path: &Path, stream: &mut dyn Write) -> std::io::Result<()> {
    const PART: u64 = 128 << 10;
    let mut file = File::open(path)?;
    let length = file.metadata()?.len();
    if length <= 2 * PART {
        std::io::copy(&mut file, stream)?;
    } else {
        std::io::copy(&mut Read::by_ref(&mut file).take(PART), stream)?;
        let left_out = length - 2 * PART;
        writeln!(
            stream,
            "\n... {left_out} bytes left out; all of it is in {} ...",
            path.display()
        )?;
        file.seek(SeekFrom::End(-(PART as i64)))?;
        std::io::copy(&mut file, stream)?;
    }
    let ends_well = length == 0 || {
        let mut last = [0];
        file.seek(SeekFrom::End(-1))?;
        file.read_exact(&mut last)?;
        last == *b"\n"
    };
    if !ends_well {
        writeln!(stream)?;
    }
    stream.flush()
}

/// A time as people read it: `340 ms`, `2.4 s`, `3 min 5 s`.
pub fn seconds(time: Duration) -> String {
    let millis = time.as_millis();
    match millis {
        0..1000 => format!("{millis} ms"),
        1000..60_000 => format!("{:.1} s", time.as_secs_f64()),
        _ => format!("{} min {} s", time.as_secs() / 60, time.as_secs() % 60),
    }
}
