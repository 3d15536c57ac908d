//! The command line.

use clap::{Parser, Subcommand};

/// Orders over REST.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Subcommand)]
pub enum Command {
    /// Serve until SIGTERM.
    #[default]
    Serve,
    /// Bring the database's schema up to date, and end.
    Migrate,
    /// Try again what consumers have put aside, and end.
    Replay,
    /// Say whether the configuration can be used, and end.
    CheckConfig,
}

impl Cli {
    /// What was asked for; wrong usage ends the process with exit code 2.
    pub fn command() -> Command {
        Self::parse().command.unwrap_or_default()
    }
}
