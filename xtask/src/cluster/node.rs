//! The node: the first process of the cluster's namespaces, and what it starts.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

use super::api::{self, Endpoints};
use super::build::NodePrograms;
use super::gateway;
use super::kubectl::Kubectl;
use super::parts::{self, Parts, wait_for};
use super::places::{self, Init, Places};
use crate::files;
use crate::output::Finished;

/// Settings of the whole machine that the kubelet wants to make. It writes only where a value is
/// another one, so it is shown private files that already hold what it wants.
const MACHINE_SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Starts the node in namespaces of its own; it goes on when this command ends.
pub fn start(places: &Places) -> Result<Init> {
    let program = std::env::current_exe().context("finding this program")?;
    let log = places.log("node");
    let log = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    let mut unshare = Command::new("unshare");
    unshare
        .args(["--mount", "--net", "--pid", "--uts", "--ipc", "--fork"])
        .args(["--mount-proc", "--kill-child=SIGKILL", "--"])
        .arg(program)
        .args(["cluster", "node", "--dir"])
        .arg(&places.dir)
        .process_group(0);
    let mut unshare = files::log_into(&mut unshare, log)?
        .spawn()
        .context("starting unshare")?;
    let pid = child_of(&mut unshare)?;
    let init = Init::node(pid);
    // It has its own network from the moment on that it waits for the link.
    let own = || fs::read_link(format!("/proc/{pid}/ns/net"));
    let ours = fs::read_link("/proc/self/ns/net").context("reading this network's name")?;
    wait_for("the node's network", || own().is_ok_and(|own| own != ours))?;
    files::write_json(&places.init_file(), &init)?;
    Ok(init)
}

/// The process that `parent` has forked.
fn child_of(parent: &mut Child) -> Result<u32> {
    let id = parent.id();
    let file = format!("/proc/{id}/task/{id}/children");
    let (mut child, mut ended) = (None, None);
    wait_for("what unshare starts", || {
        ended = parent.try_wait().ok().flatten();
        let children = fs::read_to_string(&file).unwrap_or_default();
        child = children.split_whitespace().next().map(str::to_owned);
        child.is_some() || ended.is_some()
    })?;
    match (child, ended) {
        (Some(child), _) => child.parse().context("reading a process's number"),
        (None, ended) => bail!("unshare ended ({ended:?}): are you root?"),
    }
}

/// The node itself: process 1 of its namespaces. It ends only when one of its parts does.
pub fn run(dir: &Path) -> Result<Finished> {
    let places = Places::at(dir.to_owned());
    let shell = Shell::new().context("finding the current directory")?;
    separate(&shell, &places)?;
    let programs = places.running_programs()?;
    let mut node = Node {
        kubernetes: programs.kubernetes.clone(),
        programs: places.running_node_programs()?,
        parts: Parts::of(places),
    };
    api::start_etcd(&mut node.parts, &node.kubernetes, &Endpoints::NODE)?;
    api::start_server(&mut node.parts, &node.kubernetes, &Endpoints::NODE)?;
    node.start_containerd()?;
    node.start_controller_manager()?;
    node.start_scheduler()?;
    wait_for("containerd", || {
        Path::new("/run/containerd/containerd.sock").exists()
    })?;
    let pause = node.parts.places.pause();
    cmd!(
        shell,
        "ctr --namespace k8s.io images import --snapshotter overlayfs {pause}"
    )
    .quiet()
    .ignore_stdout()
    .run()
    .context("loading the image that holds pods' namespaces")?;
    let kubectl = Kubectl::administrator(&shell, &node.parts.places, &programs);
    api::wait_for_server(&mut node.parts, &kubectl)?;
    let dns = node.parts.places.fill(include_str!("node/dns.yaml"));
    kubectl.apply(&dns)?;
    node.start_kubelet()?;
    node.start_proxy()?;
    node.start_dns()?;
    node.parts.wait_for("the node", || {
        kubectl.read(&["get", "node", places::NODE]).is_some()
    })?;
    node.start_policies()?;
    gateway::define(&kubectl, &programs)?;
    gateway::declare(&kubectl, &node.programs)?;
    gateway::start(&mut node, &shell)?;
    node.parts.watch()
}

/// Makes this process's mounts, name and network its own.
fn separate(shell: &Shell, places: &Places) -> Result<()> {
    let run = |command: xshell::Cmd<'_>| command.quiet().ignore_stdout().run();
    // The kubelet wants mounts that its pods share; within the namespace they may.
    run(cmd!(shell, "mount --make-rshared /"))?;
    run(cmd!(shell, "mount -t tmpfs -o mode=755 tmpfs /run"))?;
    for (own, there) in [("var-lib", "/var/lib"), ("var-log", "/var/log")] {
        let own = places.dir.join(own);
        run(cmd!(shell, "mount --bind {own} {there}"))?;
    }
    for dir in ["/run/lock", "/run/netns", "/run/containerd", "/run/sysctl"] {
        fs::create_dir_all(dir).with_context(|| format!("creating {dir}"))?;
    }
    for dir in ["/var/lib/kubelet", "/var/log/pods"] {
        fs::create_dir_all(dir).with_context(|| format!("creating {dir}"))?;
    }
    for (setting, value) in MACHINE_SETTINGS {
        let own = format!("/run/sysctl/{}", setting.replace('/', "."));
        fs::write(&own, value).with_context(|| format!("writing {own}"))?;
        let there = format!("/proc/sys/{setting}");
        if Path::new(&there).exists() {
            run(cmd!(shell, "mount --bind {own} {there}"))?;
        }
    }
    let (node, link) = (places::NODE, places::NODE_LINK);
    run(cmd!(shell, "hostname {node}"))?;
    run(cmd!(shell, "ip link set lo up"))?;
    let names = format!("{}/32", places::NODE_DNS);
    run(cmd!(shell, "ip addr add {names} dev lo"))?;
    // The command that started this one moves the link here.
    wait_for("the link to the machine", || {
        cmd!(shell, "ip link show {link}")
            .quiet()
            .ignore_stdout()
            .ignore_stderr()
            .run()
            .is_ok()
    })?;
    let address = format!("{}/30", places::ADDRESS);
    run(cmd!(shell, "ip addr add {address} dev {link}"))?;
    run(cmd!(shell, "ip link set {link} up"))?;
    // No default route: what is not node, pod or service cannot be reached, whatever the machine
    // forwards. Services need some route, because it is looked up before their address is changed.
    let services = places::SERVICES;
    run(cmd!(shell, "ip route add {services} dev {link}"))?;
    for setting in [
        "net.ipv4.ip_forward=1",
        "net.ipv4.conf.all.route_localnet=1",
        "net.bridge.bridge-nf-call-iptables=1",
    ] {
        run(cmd!(shell, "sysctl --quiet --write {setting}"))?;
    }
    Ok(())
}

pub struct Node {
    pub parts: Parts,
    pub kubernetes: PathBuf,
    pub programs: NodePrograms,
}

impl Node {
    fn start_containerd(&mut self) -> Result<()> {
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(self.parts.places.dir.join("containerd.toml"))
            .args([
                "--root",
                "/var/lib/containerd",
                "--state",
                "/run/containerd",
            ])
            .args(["--address", "/run/containerd/containerd.sock"]);
        self.parts.start("containerd", &mut command)
    }

    fn start_controller_manager(&mut self) -> Result<()> {
        let mut command = parts::kubernetes(&self.kubernetes, "kube-controller-manager");
        command
            .args([
                "--use-service-account-credentials=true",
                "--leader-elect=false",
            ])
            .arg(format!("--cluster-cidr={}", places::PODS))
            .args(["--bind-address=127.0.0.1"])
            // The default of 15 s is half a test's time.
            .args(["--horizontal-pod-autoscaler-sync-period=1s"]);
        self.parts.pki(
            &mut command,
            &[
                ("kubeconfig", "controller-manager.kubeconfig"),
                ("authentication-kubeconfig", "controller-manager.kubeconfig"),
                ("authorization-kubeconfig", "controller-manager.kubeconfig"),
                ("requestheader-client-ca-file", "front-proxy-ca.crt"),
                ("client-ca-file", "ca.crt"),
                ("root-ca-file", "ca.crt"),
                ("service-account-private-key-file", "sa.key"),
                ("cluster-signing-cert-file", "ca.crt"),
                ("cluster-signing-key-file", "ca.key"),
            ],
        );
        self.parts.start("kube-controller-manager", &mut command)
    }

    fn start_scheduler(&mut self) -> Result<()> {
        let mut command = parts::kubernetes(&self.kubernetes, "kube-scheduler");
        command.args(["--leader-elect=false", "--bind-address=127.0.0.1"]);
        self.parts.pki(
            &mut command,
            &[
                ("kubeconfig", "scheduler.kubeconfig"),
                ("authentication-kubeconfig", "scheduler.kubeconfig"),
                ("authorization-kubeconfig", "scheduler.kubeconfig"),
            ],
        );
        self.parts.start("kube-scheduler", &mut command)
    }

    fn start_kubelet(&mut self) -> Result<()> {
        let mut command = parts::kubernetes(&self.kubernetes, "kubelet");
        command
            .arg(format!(
                "--config={}",
                self.parts.places.dir.join("kubelet.yaml").display()
            ))
            .args(["--cert-dir=/var/lib/kubelet/pki", "-v=2"])
            .arg(format!("--hostname-override={}", places::NODE))
            .arg(format!("--node-ip={}", places::ADDRESS));
        self.parts
            .pki(&mut command, &[("kubeconfig", "kubelet.kubeconfig")]);
        self.parts.start("kubelet", &mut command)
    }

    fn start_proxy(&mut self) -> Result<()> {
        let mut command = parts::kubernetes(&self.kubernetes, "kube-proxy");
        command
            .arg(format!(
                "--config={}",
                self.parts.places.dir.join("proxy.yaml").display()
            ))
            .arg("-v=2");
        self.parts.start("kube-proxy", &mut command)
    }

    /// What makes NetworkPolicies hold.
    fn start_policies(&mut self) -> Result<()> {
        let mut command = Command::new(&self.programs.policies);
        command.args(["-node", places::NODE, "-services", places::SERVICES]);
        let kubeconfig = self.parts.places.kubeconfig();
        command.arg("-kubeconfig").arg(kubeconfig);
        self.parts.start("policies", &mut command)
    }

    fn start_dns(&mut self) -> Result<()> {
        let mut command = Command::new(&self.programs.coredns);
        command
            .arg("-conf")
            .arg(self.parts.places.dir.join("Corefile"));
        self.parts.start("coredns", &mut command)
    }
}
