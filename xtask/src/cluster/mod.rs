//! `cargo xtask cluster`: a Kubernetes cluster on this machine, for tests and for trying things.
//!
//! One node, with real pods, Services and DNS, in namespaces of its own: private mounts, processes
//! and network. Nothing of the machine's own network or container engine is touched, nothing in
//! it can leave the machine, and ending one process ends all of it. Its programs are built once
//! from Go modules ([`build`]); the node's packages are the distribution's. For what needs no pods its
//! API server can be had alone ([`api`]), without root.

mod api;
mod build;
mod gateway;
mod images;
mod install;
mod kubectl;
mod node;
mod parts;
pub mod places;
mod root;
mod schemas;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use xshell::{Cmd, Shell, cmd};

use crate::cargo;
use crate::cli::{Cli, ClusterCommand, ClusterRunArgs, Supported};
use crate::config::Pipeline;
use crate::files;
use crate::image::layer;
use crate::image::layout::{ImageConfig, Layout};
use crate::interrupt;
use crate::output::{Exit, Finished, Output};
use crate::setup::system;
use crate::setup::tools::Tools;
use api::Endpoints;
use build::{NodePrograms, Programs};
pub use install::{for_tests, install, install_for_tests, missing, missing_for_tests, version};
use kubectl::{Kubectl, Starting};
use places::{Init, Places};

/// The variable that names the kubeconfig of a cluster for tests; what it names is used instead of
/// a cluster of our own. A user's current context is never taken.
pub const KUBECONFIG: &str = "XTASK_KUBECONFIG";

/// Tell a command that is run with a cluster where kubectl is, and where kubeconform is built.
const KUBECTL: &str = "XTASK_KUBECTL";
const KUBECONFORM: &str = "XTASK_KUBECONFORM";

/// How long the cluster may take to answer, and then its node to be ready.
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(100);

pub fn run(command: &ClusterCommand, cli: &Cli, output: &Output) -> Result<Finished> {
    match command {
        ClusterCommand::Up(args) if args.bare => {
            Cluster::open()?.up(output)?;
            Ok(Finished::new(Exit::Yes, "running"))
        }
        ClusterCommand::Up(args) => {
            let pipeline = Pipeline::load(&cli.pipeline)?;
            let cluster = Cluster::open()?;
            match args.alone.api_only {
                true => cluster.up_alone(args.alone.kubernetes, output)?,
                false => cluster.up(output)?,
            }
            cluster.make_namespaces(&pipeline)?;
            output.line(format_args!("export KUBECONFIG={}", cluster.kubeconfig()));
            Ok(cluster.running())
        }
        ClusterCommand::Down => Cluster::open()?.down(output),
        ClusterCommand::Status => Cluster::open()?.status(output),
        ClusterCommand::Kubeconfig => {
            let cluster = Cluster::open()?;
            cluster.check_running()?;
            output.line(cluster.kubeconfig());
            Ok(Finished::passed().with("kubeconfig", cluster.places.kubeconfig()))
        }
        ClusterCommand::Load(args) => {
            let cluster = Cluster::open()?;
            cluster.load(&args.archive, output)?;
            Ok(Finished::passed())
        }
        ClusterCommand::Run(args) => run_with(args, cli, output),
        ClusterCommand::Node(args) => node::run(&args.dir),
        ClusterCommand::Api(args) => api::run(&args.dir),
    }
}

/// Runs a command with a cluster, which is taken down again unless it was there before.
fn run_with(args: &ClusterRunArgs, cli: &Cli, output: &Output) -> Result<Finished> {
    let given = std::env::var_os(KUBECONFIG);
    let pipeline = Pipeline::load(&cli.pipeline)?;
    let cluster = Cluster::open()?;
    let ours = given.is_none() && !cluster.is_running();
    if ours {
        let program = std::env::current_exe().context("finding this program")?;
        let mut down = Command::new(program);
        down.args(["cluster", "down"]);
        interrupt::end_by(|| interrupt::put_away(down))?;
    }
    if given.is_some() && args.alone.kubernetes.is_some() {
        bail!(
            "{KUBECONFIG} names a cluster, which is of its own version: unset it, or do without --kubernetes"
        );
    }
    if given.is_none() && args.alone.api_only {
        // Whoever looks at manifests wants it, and beside Kubernetes it takes no time.
        build::ensure_kubeconform(output)?;
        cluster.up_alone(args.alone.kubernetes, output)?;
    } else if given.is_none() {
        cluster.up(output)?;
    }
    let ended = run_in(&cluster, given.map(PathBuf::from), &pipeline, args, output);
    if ours {
        cluster.down(output)?;
    }
    let ended = ended?;
    Ok(match ended.code() {
        Some(0) => Finished::passed(),
        Some(2) => Finished::new(Exit::Unknown, "failed"),
        _ => Finished::new(Exit::No, "failed"),
    })
}

fn run_in(
    cluster: &Cluster,
    given: Option<PathBuf>,
    pipeline: &Pipeline,
    args: &ClusterRunArgs,
    output: &Output,
) -> Result<ExitStatus> {
    if given.is_none() {
        cluster.make_namespaces(pipeline)?;
    }
    let kubeconfig = given.unwrap_or_else(|| cluster.places.kubeconfig());
    let (program, arguments) = args.command.split_first().context("there is no command")?;
    output.command(args.command.join(" "));
    Command::new(program)
        .args(arguments)
        .env(KUBECONFIG, kubeconfig)
        .env(KUBECTL, Tools::open()?.program("kubectl")?)
        .env(KUBECONFORM, build::kubeconform()?)
        .status()
        .with_context(|| format!("starting {program}"))
}

/// The machine's one cluster of its own.
pub struct Cluster {
    places: Places,
    shell: Shell,
}

impl Cluster {
    pub fn open() -> Result<Self> {
        Ok(Self {
            places: Places::open()?,
            shell: cargo::shell()?,
        })
    }

    pub fn kubeconfig(&self) -> String {
        self.places.kubeconfig().display().to_string()
    }

    pub fn is_running(&self) -> bool {
        self.places.init().is_some_and(|init| init.is_alive())
    }

    fn check_running(&self) -> Result<()> {
        if self.is_running() {
            return Ok(());
        }
        bail!("the cluster is not running; `cargo xtask cluster up` starts it");
    }

    /// The process that holds the API server, where that runs alone.
    fn alone(&self) -> Option<Init> {
        let init = self.places.init()?;
        (init.is_alone && init.is_alive()).then_some(init)
    }

    /// Refuses where no pods can run.
    pub fn check_node(&self) -> Result<()> {
        self.check_running()?;
        if self.alone().is_none() {
            return Ok(());
        }
        bail!(
            "only the API server is running, and no node; `cargo xtask cluster down` ends it, and \
             `cargo xtask cluster up` starts a whole cluster"
        );
    }

    /// Starts the API server and its etcd, unless a cluster runs; of another version of Kubernetes than the
    /// cluster's where one is named.
    pub fn up_alone(&self, supported: Option<Supported>, output: &Output) -> Result<()> {
        if !self.is_running() {
            self.leave_to_owner()?;
        }
        let _lock = self.lock()?;
        if self.is_running() {
            self.check_version(supported)?;
            return self.greet(output);
        }
        install::install_api(supported, output)?;
        let began = Instant::now();
        let programs = Programs::with(supported)?;
        self.clear()?;
        let endpoints = Endpoints::free()?;
        self.prepare(&programs, &endpoints)?;
        let started = api::start(&self.places, &endpoints)
            .and_then(|init| self.wait_alone(init, &programs, output));
        self.hand_over(started, output)?;
        output.good(format_args!(
            "the API server is running after {:.1} s, and nothing else: {}",
            began.elapsed().as_secs_f64(),
            self.kubeconfig()
        ));
        Ok(())
    }

    /// Refuses where an API server of another version is running than the one that was asked for.
    fn check_version(&self, supported: Option<Supported>) -> Result<()> {
        if supported.is_none() {
            return Ok(());
        }
        let asked = Programs::with(supported)?;
        if self.places.running_programs()?.api_server() == asked.api_server() {
            return Ok(());
        }
        bail!("an API server of another version is running; `cargo xtask cluster down` ends it");
    }

    /// What was started is its user's from now on; where that failed, nothing is left of it but its last words.
    fn hand_over(&self, started: Result<()>, output: &Output) -> Result<()> {
        if started.is_err() {
            self.quote_logs(output);
            self.clear()?;
        }
        started?;
        root::give_to_user(&self.places.kubeconfig())
    }

    /// Says what is there already. Whoever has started it may have been interrupted.
    fn greet(&self, output: &Output) -> Result<()> {
        let kubeconfig = self.kubeconfig();
        match self.alone() {
            Some(init) => {
                let programs = self.places.running_programs()?;
                self.wait_alone(init, &programs, output)?;
                output.good(format_args!(
                    "the API server is running ({}): {kubeconfig}",
                    programs.api_server_name()
                ));
            }
            None => output.good(format_args!("the cluster is running: {kubeconfig}")),
        }
        Ok(())
    }

    fn wait_alone(&self, init: Init, programs: &Programs, output: &Output) -> Result<()> {
        let kubectl = Kubectl::administrator(&self.shell, &self.places, programs);
        let starting = Starting {
            init,
            kubectl: &kubectl,
            deadline: Instant::now() + PATIENCE,
            output,
        };
        starting.wait_for("the API server", &["get", "--raw", "/readyz"], "ok")?;
        starting.wait_for(
            "the gateway's definitions",
            &gateway::DEFINED,
            "condition met",
        )
    }

    /// What another user has left, root that is, only they can remove; whether there was such a thing.
    fn leave_to_owner(&self) -> Result<bool> {
        if self.places.are_mine() {
            return Ok(false);
        }
        if !system::has_sudo() {
            bail!(
                "{} is another user's: `cargo xtask cluster down` by them removes it, or \
                 XTASK_CACHE_DIR names another place",
                self.places.dir.display()
            );
        }
        root::run(&["down".as_ref()])?;
        Ok(true)
    }

    fn lock(&self) -> Result<File> {
        files::try_lock(&self.places.lock())?
            .context("another command is starting or stopping the cluster")
    }

    /// Starts the cluster, unless it runs.
    pub fn up(&self, output: &Output) -> Result<()> {
        if self.is_running() {
            self.check_node()?;
        }
        if !system::is_root() {
            // What is installed and built is the user's, and root finds it there.
            install(output)?;
            return root::run(&["up".as_ref(), "--bare".as_ref()]);
        }
        let _lock = self.lock()?;
        if self.is_running() {
            self.check_node()?;
            return self.greet(output);
        }
        install(output)?;
        let began = Instant::now();
        let programs = Programs::built()?;
        self.clear()?;
        self.prepare(&programs, &Endpoints::NODE)?;
        self.prepare_node(&NodePrograms::built()?)?;
        let started = self
            .start(&programs, output)
            .and_then(|()| self.load_servers(output));
        self.hand_over(started, output)?;
        output.good(format_args!(
            "the cluster is running after {:.1} s: {}",
            began.elapsed().as_secs_f64(),
            self.kubeconfig()
        ));
        Ok(())
    }

    /// Files that the API server reads, and whoever calls it.
    fn prepare(&self, programs: &Programs, endpoints: &Endpoints) -> Result<()> {
        let places = &self.places;
        places.create()?;
        let kubernetes = &programs.kubernetes;
        let pki = cmd!(self.shell, "{kubernetes} pki")
            .arg("-dir")
            .arg(places.pki())
            .args(["-node", places::NODE, "-server", &endpoints.server()])
            .args([
                "-names",
                &format!("127.0.0.1,{},{}", places::ADDRESS, places::API),
            ]);
        pki.quiet()
            .run()
            .context("making the cluster's certificates")?;
        files::write_json(&places.programs(), programs)
    }

    /// Files that the node's other parts read.
    fn prepare_node(&self, programs: &NodePrograms) -> Result<()> {
        let places = &self.places;
        files::write_json(&places.node_programs(), programs)?;
        for (path, template) in places::FILES {
            files::replace(&places.dir.join(path), places.fill(template).as_bytes())?;
        }
        self.assemble_pause(programs)
    }

    /// The image that holds pods' namespaces: the one program, and nothing else.
    fn assemble_pause(&self, programs: &NodePrograms) -> Result<()> {
        let content = std::fs::read(&programs.pause)
            .with_context(|| format!("reading {}", programs.pause.display()))?;
        let layout = Layout::open(self.places.dir.join("layout"))?;
        let layer = layout.layer(&layer::Entry {
            path: "pause",
            content: &content,
        })?;
        let digest = layout.image(
            &layer,
            &ImageConfig {
                entrypoint: vec!["/pause".to_owned()],
                variables: Vec::new(),
                version: "1".to_owned(),
                revision: "unknown".to_owned(),
                created: 0,
            },
        )?;
        layout.archive(&digest, places::PAUSE, &self.places.pause())
    }

    fn start(&self, programs: &Programs, output: &Output) -> Result<()> {
        let places = &self.places;
        let shell = &self.shell;
        places::make_cgroups()?;
        let init = node::start(places)?;
        let deadline = Instant::now() + PATIENCE;
        let (host, pid) = (places::HOST_LINK, init.pid.to_string());
        let node = places::NODE_LINK;
        cmd!(
            shell,
            "ip link add {host} type veth peer name {node} netns {pid}"
        )
        .quiet()
        .run()?;
        let address = format!("{}/30", places::GATEWAY);
        cmd!(shell, "ip addr add {address} dev {host}")
            .quiet()
            .run()?;
        cmd!(shell, "ip link set {host} up").quiet().run()?;
        for range in [places::PODS, places::SERVICES] {
            let via = places::ADDRESS.to_string();
            cmd!(shell, "ip route add {range} via {via}")
                .quiet()
                .run()?;
        }
        let kubectl = Kubectl::administrator(shell, places, programs);
        let starting = Starting {
            init,
            kubectl: &kubectl,
            deadline,
            output,
        };
        starting.wait_for("the API server", &["get", "--raw", "/readyz"], "ok")?;
        starting.wait_for("the node", &["get", "nodes", "--no-headers"], " Ready ")?;
        starting.wait_for(
            "the first service account",
            &["--namespace", "default", "get", "serviceaccount", "default"],
            "default",
        )?;
        gateway::wait(&kubectl, deadline)
    }

    fn quote_logs(&self, output: &Output) {
        for name in self.places.logs() {
            let lines = files::last_lines(&name, 5);
            if !lines.is_empty() {
                output.detail(name.display());
                output.quote(&lines);
            }
        }
    }

    fn down(&self, output: &Output) -> Result<Finished> {
        if self.leave_to_owner()? {
            return Ok(Finished::new(Exit::Yes, "stopped"));
        }
        let _lock = self.lock()?;
        let was_running = self.is_running();
        self.clear()?;
        output.good(match was_running {
            true => "the cluster is gone",
            false => "no cluster is running",
        });
        Ok(Finished::new(Exit::Yes, "stopped"))
    }

    /// Ends what runs, and removes all that it left on the machine.
    fn clear(&self) -> Result<()> {
        if let Some(init) = self.places.init() {
            init.kill()?;
        }
        if !system::is_root() {
            // Whose files these are could start nothing but an API server.
            return self.places.remove();
        }
        let link = places::HOST_LINK;
        if Path::new("/sys/class/net").join(link).exists() {
            cmd!(self.shell, "ip link del {link}").quiet().run()?;
        }
        places::remove_cgroups()?;
        self.places.remove()
    }

    fn status(&self, output: &Output) -> Result<Finished> {
        if !self.is_running() {
            if self.places.init().is_some() {
                output.bad("the cluster has ended by itself");
                self.quote_logs(output);
                return Ok(Finished::new(Exit::No, "failed"));
            }
            output.line("no cluster is running; `cargo xtask cluster up` starts one");
            return Ok(Finished::new(Exit::Yes, "stopped"));
        }
        output.good(format_args!(
            "the cluster is running: {}",
            self.kubeconfig()
        ));
        if self.alone().is_some() {
            output.line("only its API server: no pods can run");
            return Ok(self.running());
        }
        let programs = self.places.running_programs()?;
        let kubectl = Kubectl::administrator(&self.shell, &self.places, &programs);
        let pods = ["get", "nodes,pods", "--all-namespaces", "--output", "wide"];
        output.line(kubectl.read(&pods).context("asking the cluster")?);
        Ok(self.running())
    }

    /// `node`: whether pods can run.
    fn running(&self) -> Finished {
        Finished::new(Exit::Yes, "running")
            .with("kubeconfig", self.places.kubeconfig())
            .with("node", self.alone().is_none())
    }

    /// The namespaces of the environments that run here, in which only restricted pods may.
    pub fn make_namespaces(&self, pipeline: &Pipeline) -> Result<()> {
        let mut manifests = String::new();
        for name in pipeline.environments.keys() {
            let Ok(settings) = pipeline.kubernetes(name) else {
                continue;
            };
            if settings.context.is_none() {
                let namespace = json!({
                    "apiVersion": "v1",
                    "kind": "Namespace",
                    "metadata": {
                        "name": settings.namespace,
                        "labels": { "pod-security.kubernetes.io/enforce": "restricted" },
                    },
                });
                manifests.push_str(&format!("---\n{namespace}\n"));
            }
        }
        let programs = self.places.running_programs()?;
        Kubectl::administrator(&self.shell, &self.places, &programs).apply(&manifests)
    }

    /// Removes namespaces with all that is in them, and waits until they are gone.
    pub fn remove_namespaces(&self, names: &[String]) -> Result<()> {
        let programs = self.places.running_programs()?;
        Kubectl::administrator(&self.shell, &self.places, &programs)
            .command()
            .args([
                "delete",
                "namespace",
                "--ignore-not-found",
                "--wait",
                "--timeout=120s",
            ])
            .args(names)
            .ignore_stdout()
            .run()
            .context("removing namespaces")
    }

    /// A command that runs on the node.
    fn inside(&self, program: &str) -> Result<Cmd<'_>> {
        let init = self.places.init().context("the cluster is not running")?;
        let pid = init.pid.to_string();
        Ok(cmd!(
            self.shell,
            "nsenter --target {pid} --mount --net --pid --uts --ipc -- {program}"
        ))
    }
}
