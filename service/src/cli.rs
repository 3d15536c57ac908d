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
    /// Encrypt anew, by the first of database.encryption_keys, what the others have encrypted, and end.
    /// Once every process has the same first key, nothing needs the others any more.
    RotateKeys,
    /// The log of what was done to orders, and by whom.
    #[command(subcommand)]
    Audit(Audit),
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
    /// Print a token of the OpenID provider auth.issuer, for whoever logs in with a browser, and end.
    Login {
        /// For a program instead, by auth.client_secret.
        #[arg(long)]
        program: bool,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Subcommand)]
pub enum Audit {
    /// Say whether it is as it was written, and print the hash of its last entry, and end. Exit code 1
    /// where an entry was changed, removed or inserted.
    Verify {
        /// The last hash that an earlier look has printed, which must still be there.
        #[arg(long)]
        anchor: Option<String>,
    },
}

impl Cli {
    /// What was asked for; wrong usage ends the process with exit code 2.
    pub fn command() -> Command {
        Self::parse().command.unwrap_or_default()
    }
}
