//! The steps, as data. To add a check, add a row.

use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct Step {
    pub name: &'static str,
    pub proves: &'static str,
    pub argv: &'static [&'static str],
    /// Variables that the command gets besides the environment.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    pub variables: &'static [(&'static str, &'static str)],
    /// The tool of `config/tools.toml` that the command needs.
    #[serde(skip)]
    pub tool: Option<&'static str>,
}

/// In the order in which they run: the quickest to fail first.
pub const STEPS: &[Step] = &[
    Step {
        name: "format",
        proves: "the code is formatted as rustfmt does it",
        argv: &["cargo", "fmt", "--all", "--check"],
        variables: &[],
        tool: None,
    },
    Step {
        name: "deny",
        proves: "no dependency is banned, badly licensed or from an unknown source",
        argv: &[
            "cargo",
            "deny",
            "--all-features",
            "check",
            "bans",
            "licenses",
            "sources",
        ],
        variables: &[],
        tool: Some("cargo-deny"),
    },
    Step {
        name: "thin",
        proves: "xtask builds without any feature and without a warning",
        argv: &[
            "cargo",
            "clippy",
            "--locked",
            "--package",
            "xtask",
            "--",
            "--deny",
            "warnings",
        ],
        variables: &[],
        tool: None,
    },
    Step {
        name: "clippy",
        proves: "clippy and the compiler have no warning",
        argv: &[
            "cargo",
            "clippy",
            "--locked",
            "--workspace",
            "--all-targets",
            "--all-features",
            "--",
            "--deny",
            "warnings",
        ],
        variables: &[],
        tool: None,
    },
    Step {
        name: "build",
        proves: "everything builds",
        argv: &[
            "cargo",
            "build",
            "--locked",
            "--workspace",
            "--all-targets",
            "--all-features",
        ],
        variables: &[],
        tool: None,
    },
    Step {
        name: "docs",
        proves: "the documentation builds and its links lead somewhere",
        argv: &[
            "cargo",
            "doc",
            "--locked",
            "--workspace",
            "--all-features",
            "--no-deps",
            "--document-private-items",
        ],
        variables: &[("RUSTDOCFLAGS", "--deny warnings")],
        tool: None,
    },
    Step {
        name: "image",
        proves: "the service builds into an image (the tests run it)",
        argv: &[
            "cargo",
            "run",
            "--locked",
            "--package",
            "xtask",
            "--all-features",
            "--",
            "image",
        ],
        variables: &[],
        tool: None,
    },
    Step {
        name: "test",
        proves: "the tests pass, on real processes",
        argv: &["cargo", "test", "--locked", "--workspace", "--all-features"],
        variables: &[],
        tool: None,
    },
    Step {
        name: "demo",
        proves: "the whole path works under load, a bad release and a kill included",
        argv: &[
            "cargo",
            "run",
            "--locked",
            "--package",
            "xtask",
            "--all-features",
            "--",
            "demo",
        ],
        variables: &[],
        tool: None,
    },
];

impl Step {
    /// The command as a person would paste it.
    pub fn command_line(&self) -> String {
        let variables = self
            .variables
            .iter()
            .map(|(name, value)| format!("{name}='{value}'"));
        let words = self.argv.iter().map(|word| (*word).to_owned());
        variables.chain(words).collect::<Vec<_>>().join(" ")
    }
}
