//! The node: the first process of the cluster's namespaces, and what it starts.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::WaitOptions;
use xshell::{Shell, cmd};

use super::build::Programs;
use super::places::{self, Init, Places};
use super::{Kubectl, gateway};
use crate::files;
use crate::output::Finished;

/// How long a part of the node may take until another part can be started.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

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
    let unshare = files::log_into(&mut unshare, log)?
        .spawn()
        .context("starting unshare")?;
    let pid = child_of(unshare.id())?;
    let init = Init::of(pid);
    // It has its own network from the moment on that it waits for the link.
    let own = || fs::read_link(format!("/proc/{pid}/ns/net"));
    let ours = fs::read_link("/proc/self/ns/net").context("reading this network's name")?;
    wait_for("the node's network", || own().is_ok_and(|own| own != ours))?;
    files::write_json(&places.init_file(), &init)?;
    Ok(init)
}

/// The process that `parent` has forked.
fn child_of(parent: u32) -> Result<u32> {
    let file = format!("/proc/{parent}/task/{parent}/children");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let children = fs::read_to_string(&file).context("unshare ended: are you root?")?;
        if let Some(child) = children.split_whitespace().next() {
            return child.parse().context("reading a process's number");
        }
        if Instant::now() > deadline {
            bail!("unshare started nothing");
        }
        std::thread::sleep(POLL);
    }
}

/// The node itself: process 1 of its namespaces. It ends only when one of its parts does.
pub fn run(dir: &Path) -> Result<Finished> {
    let places = Places::at(dir.to_owned());
    let shell = Shell::new().context("finding the current directory")?;
    separate(&shell, &places)?;
    let node = Node {
        programs: places.running_programs()?,
        places,
    };
    let mut parts = vec![node.etcd()?, node.api_server()?, node.containerd()?];
    parts.extend([node.controller_manager()?, node.scheduler()?]);
    wait_for("containerd", || {
        Path::new("/run/containerd/containerd.sock").exists()
    })?;
    let pause = node.places.pause();
    cmd!(
        shell,
        "ctr --namespace k8s.io images import --snapshotter overlayfs {pause}"
    )
    .quiet()
    .ignore_stdout()
    .run()
    .context("loading the image that holds pods' namespaces")?;
    let kubectl = Kubectl::administrator(&shell, &node.places, &node.programs);
    wait_for("the API server", || {
        kubectl.read(&["get", "--raw", "/readyz"]).is_some()
    })?;
    kubectl.apply(&node.places.fill(include_str!("node/dns.yaml")))?;
    parts.extend([node.kubelet()?, node.proxy()?, node.dns()?]);
    gateway::define(&kubectl, &node.programs)?;
    parts.extend(gateway::start(&node, &shell)?);
    node.watch(&parts)
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

fn wait_for(what: &str, mut there: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !there() {
        if Instant::now() > deadline {
            bail!("{what}: not there within {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// A process without which the cluster is none.
pub struct Part {
    name: &'static str,
    pid: u32,
}

pub struct Node {
    pub places: Places,
    pub programs: Programs,
}

impl Node {
    /// Starts a part, with a log of its own.
    pub fn part(&self, name: &'static str, command: &mut Command) -> Result<Part> {
        let log = self.places.log(name);
        let log = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
        let child = files::log_into(command.current_dir("/"), log)?
            .spawn()
            .with_context(|| format!("starting {name}"))?;
        let pid = child.id();
        Ok(Part { name, pid })
    }

    fn kubernetes(&self, part: &str) -> Command {
        let mut command = Command::new(&self.programs.kubernetes);
        command.arg(part);
        command
    }

    /// `--NAME=FILE` for files of the cluster's keys and certificates.
    fn pki(&self, command: &mut Command, files: &[(&str, &str)]) {
        for (name, file) in files {
            let path = self.places.pki().join(file);
            command.arg(format!("--{name}={}", path.display()));
        }
    }

    fn etcd(&self) -> Result<Part> {
        let (client, peer) = ("http://127.0.0.1:12379", "http://127.0.0.1:12380");
        let mut command = self.kubernetes("etcd");
        command
            .arg(format!(
                "--data-dir={}",
                self.places.dir.join("etcd").display()
            ))
            // It is only for tests: a power cut may take it.
            .args(["--name=xtask", "--unsafe-no-fsync", "--log-level=warn"])
            .arg(format!("--listen-client-urls={client}"))
            .arg(format!("--advertise-client-urls={client}"))
            .arg(format!("--listen-peer-urls={peer}"))
            .arg(format!("--initial-advertise-peer-urls={peer}"))
            .arg(format!("--initial-cluster=xtask={peer}"));
        self.part("etcd", &mut command)
    }

    fn api_server(&self) -> Result<Part> {
        let mut command = self.kubernetes("kube-apiserver");
        command
            .args([
                "--etcd-servers=http://127.0.0.1:12379",
                "--bind-address=0.0.0.0",
            ])
            .arg(format!("--secure-port={}", places::API_PORT))
            .arg(format!("--advertise-address={}", places::ADDRESS))
            .arg(format!("--service-cluster-ip-range={}", places::SERVICES))
            .args([
                "--kubelet-preferred-address-types=InternalIP",
                "--allow-privileged=true",
            ])
            .arg("--service-account-issuer=https://kubernetes.default.svc.cluster.local")
            .args(["--requestheader-allowed-names=front-proxy-client"])
            .args(["--requestheader-extra-headers-prefix=X-Remote-Extra-"])
            .args(["--requestheader-group-headers=X-Remote-Group"])
            .args(["--requestheader-username-headers=X-Remote-User"])
            .args(["--authorization-mode=Node,RBAC"])
            .args(["--enable-admission-plugins=NodeRestriction"]);
        self.pki(
            &mut command,
            &[
                ("client-ca-file", "ca.crt"),
                ("tls-cert-file", "apiserver.crt"),
                ("tls-private-key-file", "apiserver.key"),
                ("kubelet-client-certificate", "apiserver-kubelet-client.crt"),
                ("kubelet-client-key", "apiserver-kubelet-client.key"),
                ("service-account-key-file", "sa.pub"),
                ("service-account-signing-key-file", "sa.key"),
                ("requestheader-client-ca-file", "front-proxy-ca.crt"),
                ("proxy-client-cert-file", "front-proxy-client.crt"),
                ("proxy-client-key-file", "front-proxy-client.key"),
            ],
        );
        self.part("kube-apiserver", &mut command)
    }

    fn containerd(&self) -> Result<Part> {
        let mut command = Command::new("containerd");
        command
            .arg("--config")
            .arg(self.places.dir.join("containerd.toml"))
            .args([
                "--root",
                "/var/lib/containerd",
                "--state",
                "/run/containerd",
            ])
            .args(["--address", "/run/containerd/containerd.sock"]);
        self.part("containerd", &mut command)
    }

    fn controller_manager(&self) -> Result<Part> {
        let mut command = self.kubernetes("kube-controller-manager");
        command
            .args([
                "--use-service-account-credentials=true",
                "--leader-elect=false",
            ])
            .arg(format!("--cluster-cidr={}", places::PODS))
            .args(["--bind-address=127.0.0.1"])
            // The default of 15 s is half a test's time.
            .args(["--horizontal-pod-autoscaler-sync-period=1s"]);
        self.pki(
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
        self.part("kube-controller-manager", &mut command)
    }

    fn scheduler(&self) -> Result<Part> {
        let mut command = self.kubernetes("kube-scheduler");
        command.args(["--leader-elect=false", "--bind-address=127.0.0.1"]);
        self.pki(
            &mut command,
            &[
                ("kubeconfig", "scheduler.kubeconfig"),
                ("authentication-kubeconfig", "scheduler.kubeconfig"),
                ("authorization-kubeconfig", "scheduler.kubeconfig"),
            ],
        );
        self.part("kube-scheduler", &mut command)
    }

    fn kubelet(&self) -> Result<Part> {
        let mut command = self.kubernetes("kubelet");
        command
            .arg(format!(
                "--config={}",
                self.places.dir.join("kubelet.yaml").display()
            ))
            .args(["--cert-dir=/var/lib/kubelet/pki", "-v=2"])
            .arg(format!("--hostname-override={}", places::NODE))
            .arg(format!("--node-ip={}", places::ADDRESS));
        self.pki(&mut command, &[("kubeconfig", "kubelet.kubeconfig")]);
        self.part("kubelet", &mut command)
    }

    fn proxy(&self) -> Result<Part> {
        let mut command = self.kubernetes("kube-proxy");
        command
            .arg(format!(
                "--config={}",
                self.places.dir.join("proxy.yaml").display()
            ))
            .arg("-v=2");
        self.part("kube-proxy", &mut command)
    }

    fn dns(&self) -> Result<Part> {
        let mut command = Command::new(&self.programs.coredns);
        command.arg("-conf").arg(self.places.dir.join("Corefile"));
        self.part("coredns", &mut command)
    }

    /// Takes the exit codes of whatever is orphaned to process 1, until a part ends.
    fn watch(&self, parts: &[Part]) -> Result<Finished> {
        loop {
            let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::empty()) else {
                bail!("there is no process left");
            };
            let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0);
            if let Some(part) = parts.iter().find(|part| part.pid == pid) {
                bail!("{} ended ({status:?}), and with it the cluster", part.name);
            }
        }
    }
}
