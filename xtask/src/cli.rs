//! The whole command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::config::PlatformKind;

/// The delivery pipeline: the same commands on a laptop and in GitHub Actions.
///
/// Exit codes: 0 yes; 1 no (a check failed, a release was judged bad and rolled back);
/// 2 could not tell (bad usage or config, a missing tool, metrics away, held).
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", version, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,

    /// What to print: text for people, or one JSON object a line on standard output.
    #[arg(
        long,
        global = true,
        value_enum,
        default_value = "human",
        value_name = "FORMAT"
    )]
    pub message_format: MessageFormat,

    /// When to use colour.
    #[arg(
        long,
        global = true,
        value_enum,
        default_value = "auto",
        value_name = "WHEN"
    )]
    pub color: Color,

    /// The pipeline's settings.
    #[arg(
        long,
        global = true,
        default_value = "config/pipeline.toml",
        value_name = "FILE"
    )]
    pub pipeline: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum MessageFormat {
    Human,
    Json,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Color {
    Auto,
    Always,
    Never,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Show the whole path on this machine: image, staging, canary, rollback, under load.
    Demo(DemoArgs),
    /// Run the checks: what must hold before a change lands.
    Ci(CiArgs),
    /// Look for known vulnerabilities, secrets, unused dependencies, unsafe workflows and manifests.
    Audit(AuditArgs),
    /// Install and start what the steps need and this machine lacks.
    Setup(SetupArgs),
    /// The workflows of GitHub Actions: prove that they run the same steps.
    #[command(subcommand)]
    Workflows(WorkflowsCommand),
    /// The servers that tests use: PostgreSQL, Redis, RabbitMQ, Kafka, a registry.
    #[command(subcommand)]
    Servers(ServersCommand),
    /// A Kubernetes cluster on this machine, for tests and for trying things.
    #[command(subcommand)]
    Cluster(ClusterCommand),
    /// Build the service into an OCI image and record it as a release.
    Image(ImageArgs),
    /// List the releases.
    Releases,
    /// Put a release into staging, wait until it is ready, and check it.
    DeployStaging(DeployArgs),
    /// Move production to a release in judged stages.
    #[command(subcommand)]
    Canary(CanaryCommand),
    /// Go back to the last release that earned its place.
    Rollback(RollbackArgs),
    /// Look at or stop the platform that runs releases on this machine.
    #[command(subcommand)]
    Sandbox(SandboxCommand),
}

#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Where to show it: in the sandbox, or on the cluster of `cargo xtask cluster`.
    #[arg(long, value_enum, default_value = "sandbox", value_name = "PLATFORM")]
    pub platform: PlatformKind,

    /// Leave everything running at the end, and say where.
    #[arg(long)]
    pub keep: bool,

    /// Build the service by this profile of the workspace's Cargo.toml. `demo` is built sooner than
    /// `release`, by which `image` builds, and takes fewer requests.
    #[arg(long, default_value = "demo", value_name = "NAME")]
    pub profile: String,

    /// Requests a second to send; 300 in the sandbox, 200 on Kubernetes unless given.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(50..=5000))]
    pub rate: Option<u32>,
}

#[derive(Debug, Args)]
pub struct CiArgs {
    /// `fast` is what is worth its time before each push.
    #[arg(value_enum, default_value = "all")]
    pub profile: Profile,

    /// First install and start what the steps need and this machine lacks.
    #[arg(long, conflicts_with = "dry_run")]
    pub setup: bool,

    /// Run only these steps.
    #[arg(long, value_name = "STEP", value_delimiter = ',')]
    pub only: Vec<String>,

    /// Leave these steps out.
    #[arg(long, value_name = "STEP", value_delimiter = ',')]
    pub skip: Vec<String>,

    /// Run only what failed or was not run the last time.
    #[arg(long)]
    pub failed: bool,

    /// The last time is this receipt, such as one downloaded from Actions.
    #[arg(long, value_name = "RUN.JSON", requires = "failed")]
    pub from: Option<PathBuf>,

    /// Run only what the changes since the main branch concern, committed or not.
    #[arg(long)]
    pub affected: bool,

    /// Compare with this commit instead.
    #[arg(long, value_name = "COMMIT", requires = "affected")]
    pub base: Option<String>,

    /// Let the steps that can mend the tree: format, clippy's suggestions, generated files.
    #[arg(long, conflicts_with_all = ["no_cache", "arguments", "dry_run"])]
    pub fix: bool,

    /// Start nothing more once a step has failed.
    #[arg(long)]
    pub fail_fast: bool,

    /// Run every step to its end, whatever fails; this is the default.
    #[arg(long, conflicts_with = "fail_fast")]
    pub keep_going: bool,

    /// Run steps that passed before on the same inputs, and remember nothing.
    #[arg(long)]
    pub no_cache: bool,

    /// How many cores to fill; all of them unless given.
    #[arg(long, value_name = "N", value_parser = cores)]
    pub jobs: Option<usize>,

    /// Say what would run, and run nothing.
    #[arg(long)]
    pub dry_run: bool,

    /// List the steps and what each proves.
    #[arg(long, group = "look")]
    pub list: bool,

    /// Print the steps and their needs as a Mermaid graph.
    #[arg(long, group = "look")]
    pub graph: bool,

    /// Print the whole command of a step, its directory and environment, ready to paste.
    #[arg(long, value_name = "STEP", group = "look")]
    pub explain: Option<String>,

    /// Say what changed since a step last passed, file by file.
    #[arg(long, value_name = "STEP", group = "look")]
    pub why: Option<String>,

    /// Say whether two runs proved the same things of the same inputs, by their receipts; Actions
    /// leaves one for each job, and all after the first are taken together.
    #[arg(long, num_args = 2.., value_name = "RUN.JSON", group = "look")]
    pub compare: Vec<PathBuf>,

    /// Take the steps from this file instead of the table that is built in.
    #[arg(long, value_name = "FILE", hide = true)]
    pub steps: Option<PathBuf>,

    /// More arguments for one step: `ci --only integration -- orders::`.
    #[arg(last = true, value_name = "ARGUMENTS")]
    pub arguments: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Profile {
    All,
    Fast,
}

fn cores(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number @ 1..=1024) => Ok(number),
        _ => Err("expected a number from 1 to 1024".to_owned()),
    }
}

#[derive(Debug, Args)]
pub struct SetupArgs {
    /// Change nothing: print what is needed, what is there, and how to mend the difference.
    #[arg(long)]
    pub check: bool,

    /// Only what these steps need.
    #[arg(long, value_name = "STEP", value_delimiter = ',')]
    pub only: Vec<String>,

    /// Only put this program beside cargo, where `CARGO_ALIAS_XTASK=ready-xtask` finds it: Actions'
    /// jobs share one that way.
    #[arg(long, conflicts_with_all = ["check", "only"])]
    pub share: bool,
}

#[derive(Debug, Args)]
pub struct AuditArgs {
    /// Run only these checks.
    #[arg(long, value_name = "CHECK", value_delimiter = ',')]
    pub only: Vec<String>,

    /// Fail where a check cannot be made, such as without a database of advisories.
    #[arg(long)]
    pub strict: bool,

    /// Take the advisories from this directory or git address.
    #[arg(long, value_name = "DIR|URL", env = "XTASK_ADVISORY_DB")]
    pub advisory_db: Option<String>,

    /// Look at this directory instead of the workspace.
    #[arg(long, value_name = "DIR", hide = true)]
    pub root: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum WorkflowsCommand {
    /// Check that GitHub Actions runs exactly the registered steps, safely.
    Check(WorkflowsCheckArgs),
    /// Write the workflows anew from the steps.
    Write,
    /// In Actions' last job: whether all jobs before it succeeded.
    Conclude,
}

#[derive(Debug, Args)]
pub struct WorkflowsCheckArgs {
    /// The directory that holds `workflows/` and `actions/`.
    #[arg(long, default_value = ".github", value_name = "DIR")]
    pub dir: PathBuf,
}

#[derive(Debug, Subcommand)]
pub enum ServersCommand {
    /// Start the servers that tests use, run a command with their addresses, remove them.
    Run(ServersRunArgs),
    /// Remove containers that a killed run has left.
    Sweep,
}

#[derive(Debug, Args)]
pub struct ServersRunArgs {
    /// Only these servers.
    #[arg(long, value_name = "SERVER", value_delimiter = ',')]
    pub only: Vec<String>,

    /// The command.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// A version of Kubernetes that is supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Supported {
    Oldest,
    Newest,
}

#[derive(Debug, Args)]
pub struct ClusterAloneArgs {
    /// Where none runs, start only etcd and the API server: no pods can run, and no root is needed.
    #[arg(long)]
    pub api_only: bool,

    /// Which API server: of the oldest or the newest version of Kubernetes that is supported, instead of the
    /// cluster's own.
    #[arg(long, value_name = "WHICH", requires = "api_only")]
    pub kubernetes: Option<Supported>,
}

#[derive(Debug, Args)]
pub struct ClusterUpArgs {
    #[command(flatten)]
    pub alone: ClusterAloneArgs,

    /// Make no namespaces: whoever has called sudo does that, by their own settings.
    #[arg(long, hide = true, conflicts_with = "api_only")]
    pub bare: bool,
}

#[derive(Debug, Subcommand)]
pub enum ClusterCommand {
    /// Start it, building it first where that was never done: real pods, Services, DNS, a gateway; or its
    /// API server alone.
    Up(ClusterUpArgs),
    /// End it, with everything that runs in it.
    Down,
    /// Show its node and its pods, where it has any.
    Status,
    /// Print where its kubeconfig is.
    Kubeconfig,
    /// Make an image known to it: what `docker save` writes, or an OCI layout in a tar archive.
    Load(ClusterLoadArgs),
    /// Run a command with a cluster, whose kubeconfig `XTASK_KUBECONFIG` names; then end it, unless
    /// it was there before.
    Run(ClusterRunArgs),
    /// Its node; started by `up`.
    #[command(hide = true)]
    Node(ClusterPlaceArgs),
    /// Its API server alone; started by `up --api-only`.
    #[command(hide = true)]
    Api(ClusterPlaceArgs),
}

#[derive(Debug, Args)]
pub struct ClusterLoadArgs {
    /// The archive.
    #[arg(value_name = "ARCHIVE")]
    pub archive: PathBuf,
}

#[derive(Debug, Args)]
pub struct ClusterRunArgs {
    #[command(flatten)]
    pub alone: ClusterAloneArgs,

    /// The command.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

#[derive(Debug, Args)]
pub struct ClusterPlaceArgs {
    /// Where its files are.
    #[arg(long)]
    pub dir: PathBuf,
}

#[derive(Debug, Args)]
pub struct ImageArgs {
    /// The image's version; the service package's own unless given.
    #[arg(long, value_name = "SEMVER")]
    pub version: Option<semver::Version>,

    /// The configuration that the release carries; the service's own unless given.
    #[arg(long, value_name = "DIR")]
    pub config: Option<PathBuf>,

    /// Take this executable instead of building the service.
    #[arg(long, value_name = "FILE")]
    pub binary: Option<PathBuf>,

    /// Build by this profile of the workspace's Cargo.toml.
    #[arg(
        long,
        default_value = "release",
        value_name = "NAME",
        conflicts_with = "binary"
    )]
    pub profile: String,

    /// Push the image to a registry, with the credentials of `docker login`. Encrypted, unless the
    /// registry is on this machine.
    #[arg(long, value_name = "HOST/REPOSITORY[:TAG]")]
    pub push: Option<String>,

    /// Push without encryption.
    #[arg(long, requires = "push")]
    pub plain_http: bool,

    /// Make the image known to the cluster that this environment runs on: one of kind or k3s on
    /// this machine, or the one of `cargo xtask cluster`.
    #[arg(long, value_name = "ENVIRONMENT")]
    pub load: Option<String>,
}

#[derive(Debug, Args)]
pub struct DeployArgs {
    /// Which release: its id, the start of it, its version, or `latest`.
    #[arg(long, default_value = "latest", value_name = "RELEASE")]
    pub release: String,

    /// Which environment.
    #[arg(long, default_value = "staging", value_name = "NAME")]
    pub environment: String,
}

#[derive(Debug, Subcommand)]
pub enum CanaryCommand {
    /// Start a rollout and follow it to its end.
    Start(CanaryStartArgs),
    /// Go on with a rollout whose command was killed.
    Resume(EnvironmentArgs),
    /// Show the stage, the weights, the evidence, and what happens next.
    Status(EnvironmentArgs),
    /// Move on from the current stage or gate, on your word.
    Promote(EnvironmentArgs),
    /// Give the rollout up: all traffic back to stable at once.
    Abort(EnvironmentArgs),
    /// Stop the release that `rollout.keep_previous` kept running, once its time is over.
    Retire(RetireArgs),
    /// Judge windows of counts from a file; also replays a rollout's journal.
    Judge(JudgeArgs),
}

#[derive(Debug, Args)]
pub struct CanaryStartArgs {
    /// Which release; unless given, the one that the environment it is promoted from runs.
    #[arg(long, value_name = "RELEASE")]
    pub release: Option<String>,

    #[command(flatten)]
    pub environment: EnvironmentArgs,
}

#[derive(Debug, Args)]
pub struct EnvironmentArgs {
    /// Which environment.
    #[arg(long, default_value = "production", value_name = "NAME")]
    pub environment: String,
}

#[derive(Debug, Args)]
pub struct JudgeArgs {
    /// JSON lines, one object for each window and arm; `-` is standard input.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

#[derive(Debug, Args)]
pub struct RetireArgs {
    #[command(flatten)]
    pub environment: EnvironmentArgs,

    /// Do not wait for its time to be over.
    #[arg(long)]
    pub now: bool,
}

#[derive(Debug, Args)]
pub struct RollbackArgs {
    #[command(flatten)]
    pub environment: EnvironmentArgs,

    /// Go to this release, which must have earned its place here before.
    #[arg(long, value_name = "RELEASE")]
    pub to: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum SandboxCommand {
    /// Show what runs where.
    Status,
    /// Print what the processes wrote.
    Logs(LogsArgs),
    /// Drain and stop everything, then the sandbox itself.
    Stop,
    /// The sandbox itself; started by the commands that need it.
    #[command(hide = true)]
    Daemon(DaemonArgs),
    /// A bare weighted proxy for benchmarks.
    #[command(hide = true)]
    Proxy(ProxyArgs),
}

#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Only this environment.
    #[arg(long, value_name = "NAME")]
    pub environment: Option<String>,

    /// Only this release.
    #[arg(long, value_name = "RELEASE")]
    pub release: Option<String>,

    /// The last lines of each process.
    #[arg(long, default_value_t = 50, value_name = "N")]
    pub lines: usize,
}

#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// Where its state is.
    #[arg(long)]
    pub dir: PathBuf,
}

#[derive(Debug, Args)]
pub struct ProxyArgs {
    /// Where to listen.
    #[arg(long)]
    pub listen: std::net::SocketAddr,

    /// `ADDRESS=WEIGHT`, once for each upstream.
    #[arg(long, required = true)]
    pub upstream: Vec<String>,
}

impl Command {
    /// The command as it was typed, for messages and for the last JSON line.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Demo(_) => "demo",
            Self::Ci(_) => "ci",
            Self::Audit(_) => "audit",
            Self::Setup(_) => "setup",
            Self::Workflows(WorkflowsCommand::Check(_)) => "workflows check",
            Self::Workflows(WorkflowsCommand::Write) => "workflows write",
            Self::Workflows(WorkflowsCommand::Conclude) => "workflows conclude",
            Self::Servers(ServersCommand::Run(_)) => "servers run",
            Self::Servers(ServersCommand::Sweep) => "servers sweep",
            Self::Cluster(ClusterCommand::Up(_)) => "cluster up",
            Self::Cluster(ClusterCommand::Down) => "cluster down",
            Self::Cluster(ClusterCommand::Status) => "cluster status",
            Self::Cluster(ClusterCommand::Kubeconfig) => "cluster kubeconfig",
            Self::Cluster(ClusterCommand::Load(_)) => "cluster load",
            Self::Cluster(ClusterCommand::Run(_)) => "cluster run",
            Self::Cluster(ClusterCommand::Node(_)) => "cluster node",
            Self::Cluster(ClusterCommand::Api(_)) => "cluster api",
            Self::Image(_) => "image",
            Self::Releases => "releases",
            Self::DeployStaging(_) => "deploy-staging",
            Self::Canary(CanaryCommand::Start(_)) => "canary start",
            Self::Canary(CanaryCommand::Resume(_)) => "canary resume",
            Self::Canary(CanaryCommand::Status(_)) => "canary status",
            Self::Canary(CanaryCommand::Promote(_)) => "canary promote",
            Self::Canary(CanaryCommand::Abort(_)) => "canary abort",
            Self::Canary(CanaryCommand::Retire(_)) => "canary retire",
            Self::Canary(CanaryCommand::Judge(_)) => "canary judge",
            Self::Rollback(_) => "rollback",
            Self::Sandbox(SandboxCommand::Status) => "sandbox status",
            Self::Sandbox(SandboxCommand::Logs(_)) => "sandbox logs",
            Self::Sandbox(SandboxCommand::Stop) => "sandbox stop",
            Self::Sandbox(SandboxCommand::Daemon(_)) => "sandbox daemon",
            Self::Sandbox(SandboxCommand::Proxy(_)) => "sandbox proxy",
        }
    }

    /// The feature of this crate that the command needs: the command table of the design.
    fn feature(&self) -> Option<&'static str> {
        match self {
            Self::Ci(_)
            | Self::Audit(_)
            | Self::Setup(_)
            | Self::Workflows(_)
            | Self::Cluster(_)
            | Self::Releases => None,
            Self::Image(args) => args.push.as_ref().map(|_| "registry"),
            Self::Servers(_) => Some("servers"),
            Self::DeployStaging(_)
            | Self::Canary(_)
            | Self::Rollback(_)
            | Self::Sandbox(_)
            | Self::Demo(_) => Some("rollout"),
        }
    }

    /// The feature that the command needs and this binary lacks; `on_kubernetes` where the settings
    /// name an environment there.
    pub fn missing_feature(&self, on_kubernetes: impl FnOnce() -> bool) -> Option<&'static str> {
        let feature = match self.feature()? {
            "rollout" if !cfg!(feature = "kubernetes") && on_kubernetes() => "kubernetes",
            feature => feature,
        };
        let there = [
            ("kubernetes", cfg!(feature = "kubernetes")),
            ("registry", cfg!(feature = "registry")),
            ("rollout", cfg!(feature = "rollout")),
            ("servers", cfg!(feature = "servers")),
        ];
        (!there.contains(&(feature, true))).then_some(feature)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }
}
