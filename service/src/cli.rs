//! The command line.

use clap::{Parser, Subcommand};

/// Orders over REST, GraphQL, gRPC and WebSockets.
#[derive(Debug, Parser)]
#[command(version, about)]
pub struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Subcommand)]
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
    /// Print a token for a service with `auth.mode = "development"`, and end.
    Token {
        /// Whom it names.
        subject: String,
        /// A role that it gives; may be repeated.
        #[arg(long = "role", default_value = "clerk")]
        roles: Vec<String>,
        /// Seconds that it is valid for.
        #[arg(long, default_value_t = 3600)]
        seconds: u64,
    },
}

impl Cli {
    /// What was asked for; wrong usage ends the process with exit code 2.
    pub fn command() -> Command {
        Self::parse().command.unwrap_or_default()
    }
}
