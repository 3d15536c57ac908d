//! Where a cluster's files are, and the names and addresses that are its own on this machine.

use std::fs;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal};
use serde::{Deserialize, Serialize};

use super::build::{NodePrograms, Programs};
use crate::files;
use crate::owner;
use crate::setup;

pub const NODE: &str = "xtask-node";
/// The image that holds pods' namespaces.
pub const PAUSE: &str = "xtask.local/pause:1";

/// The link between the machine and the node, and its two addresses.
pub const HOST_LINK: &str = "xtask-host";
pub const NODE_LINK: &str = "xtask-node";
pub const GATEWAY: &str = "172.31.77.1";
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(172, 31, 77, 2);
pub const PODS: &str = "10.244.77.0/24";
pub const SERVICES: &str = "10.96.77.0/24";
/// The first address of the services is the API server's.
pub const API: &str = "10.96.77.1";
pub const DNS: &str = "10.96.77.10";
/// Where pods ask for names, as on nodes that have a cache of them.
/// <https://kubernetes.io/docs/tasks/administer-cluster/nodelocaldns/>
pub const NODE_DNS: &str = "169.254.20.10";
pub const API_PORT: u16 = 16443;

/// The control group of all pods, in each hierarchy.
const CGROUP: &str = "/xtask-cluster";
/// Its part of the processors where there are too few of them, in the controller's file for that, by
/// version: ten times that of any process beside it. A node's pods are not alone with its own parts
/// here, but with whoever uses the machine, and would get the time of one process for them all.
const CPU_PARTS: [(&str, &str); 2] = [("cpu.shares", "10240"), ("cpu.weight", "1000")];

/// Files that the node's parts read: where, and their templates.
pub const FILES: [(&str, &str); 8] = [
    ("containerd.toml", include_str!("node/containerd.toml")),
    (
        "cni/10-pods.conflist",
        include_str!("node/network.conflist"),
    ),
    ("kubelet.yaml", include_str!("node/kubelet.yaml")),
    ("proxy.yaml", include_str!("node/proxy.yaml")),
    ("contour.yaml", include_str!("node/contour.yaml")),
    (
        "contour-proxies.yaml",
        include_str!("node/contour-proxies.yaml"),
    ),
    ("Corefile", include_str!("node/Corefile")),
    ("resolv.conf", "nameserver @dns@\nsearch cluster.local\n"),
];

/// The directories of a running cluster.
pub struct Places {
    pub dir: PathBuf,
}

impl Places {
    pub fn open() -> Result<Self> {
        Ok(Self::at(setup::cache_dir()?.join("cluster/run")))
    }

    pub fn at(dir: PathBuf) -> Self {
        Self { dir }
    }

    pub fn create(&self) -> Result<()> {
        for name in ["pki", "log", "etcd", "cni", "var-lib", "var-log"] {
            let dir = self.dir.join(name);
            fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
        }
        Ok(())
    }

    /// Whether what is there, if anything is, can be removed by whoever runs this.
    pub fn are_mine(&self) -> bool {
        let me = rustix::process::geteuid();
        let owner = fs::metadata(&self.dir).map(|dir| dir.uid());
        me.is_root() || owner.is_ok_and(|owner| owner == me.as_raw()) || !self.dir.exists()
    }

    pub fn remove(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            match fs::remove_dir_all(&self.dir) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                // What was just killed may still have written something.
                Err(error)
                    if error.kind() == ErrorKind::DirectoryNotEmpty
                        && Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                ended => {
                    return ended.with_context(|| format!("removing {}", self.dir.display()));
                }
            }
        }
    }

    /// Outlives the directory.
    pub fn lock(&self) -> PathBuf {
        self.dir.with_extension("lock")
    }

    pub fn pki(&self) -> PathBuf {
        self.dir.join("pki")
    }

    pub fn kubeconfig(&self) -> PathBuf {
        self.pki().join("admin.kubeconfig")
    }

    pub fn pause(&self) -> PathBuf {
        self.dir.join("pause.tar")
    }

    pub fn log(&self, name: &str) -> PathBuf {
        self.dir.join("log").join(name).with_extension("log")
    }

    pub fn logs(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.dir.join("log")).into_iter().flatten();
        let mut logs: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
        logs.sort();
        logs
    }

    /// Where the programs of the running cluster are.
    pub fn programs(&self) -> PathBuf {
        self.dir.join("programs.json")
    }

    pub fn running_programs(&self) -> Result<Programs> {
        files::read_json(&self.programs())
    }

    /// And those of its node.
    pub fn node_programs(&self) -> PathBuf {
        self.dir.join("node-programs.json")
    }

    pub fn running_node_programs(&self) -> Result<NodePrograms> {
        files::read_json(&self.node_programs())
    }

    /// Where etcd and the API server listen.
    pub fn endpoints(&self) -> PathBuf {
        self.dir.join("endpoints.json")
    }

    /// The images that the node was given, by name.
    pub fn images(&self) -> PathBuf {
        self.dir.join("images.json")
    }

    pub fn init_file(&self) -> PathBuf {
        self.dir.join("init.json")
    }

    /// The process that holds the cluster, where one was started.
    pub fn init(&self) -> Option<Init> {
        files::read_json(&self.init_file()).ok()
    }

    /// A template with the cluster's names, addresses and paths.
    pub fn fill(&self, template: &str) -> String {
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
        [
            ("@dir@", self.dir.display().to_string()),
            ("@pki@", self.pki().display().to_string()),
            ("@cgroup@", CGROUP.to_owned()),
            ("@node@", NODE.to_owned()),
            ("@address@", ADDRESS.to_string()),
            ("@pods@", PODS.to_owned()),
            ("@dns@", DNS.to_owned()),
            ("@node-dns@", NODE_DNS.to_owned()),
            ("@files@", files.unwrap_or(1 << 20).to_string()),
        ]
        .into_iter()
        .fold(template.to_owned(), |text, (name, value)| {
            text.replace(name, &value)
        })
    }
}

/// The process that holds a cluster, by its number on the machine: the first of the cluster's namespaces,
/// or the parent of an API server that runs alone.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Init {
    pub pid: u32,
    /// Its own name: numbers of processes are used again.
    owner: String,
    /// There is no node.
    #[serde(default)]
    pub is_alone: bool,
}

impl Init {
    pub fn node(pid: u32) -> Self {
        let owner = owner::of(pid);
        Self {
            pid,
            owner,
            is_alone: false,
        }
    }

    pub fn alone(pid: u32) -> Self {
        Self {
            is_alone: true,
            ..Self::node(pid)
        }
    }

    pub fn is_alive(&self) -> bool {
        owner::lives(&self.owner) == Some(true)
    }

    /// Ends it, and with it everything in the cluster.
    pub fn kill(&self) -> Result<()> {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.is_alive() {
            let pid = i32::try_from(self.pid).ok().and_then(Pid::from_raw);
            if let Some(pid) = pid {
                // It may have ended by itself meanwhile.
                let _ = rustix::process::kill_process(pid, Signal::KILL);
            }
            if Instant::now() > deadline {
                bail!("the cluster's process {} does not end", self.pid);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Every hierarchy of control groups: one for each controller, or one for all (version 2).
fn hierarchies() -> Result<Vec<PathBuf>> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("reading the mounts")?;
    let mounts = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ');
        let (_, at, kind) = (fields.next()?, fields.next()?, fields.next()?);
        kind.starts_with("cgroup").then(|| PathBuf::from(at))
    });
    Ok(mounts.collect())
}

pub fn make_cgroups() -> Result<()> {
    for hierarchy in hierarchies()? {
        let group = hierarchy.join(&CGROUP[1..]);
        fs::create_dir_all(&group).with_context(|| format!("creating {}", group.display()))?;
        let write = |name: &str, value: &str| {
            let file = group.join(name);
            fs::write(&file, value).with_context(|| format!("writing {}", file.display()))
        };
        // In version 1 an empty set of processors refuses every process.
        for name in ["cpuset.cpus", "cpuset.mems"] {
            if let Ok(all) = fs::read_to_string(hierarchy.join(name)) {
                write(name, &all)?;
            }
        }
        for (name, value) in CPU_PARTS {
            if group.join(name).exists() {
                write(name, value)?;
            }
        }
    }
    Ok(())
}

/// What processes leave when they end vanishes a moment later.
pub fn remove_cgroups() -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    for hierarchy in hierarchies()? {
        let group = hierarchy.join(&CGROUP[1..]);
        while group.exists() && remove_tree(&group).is_err() {
            if Instant::now() > deadline {
                bail!("{} is still in use", group.display());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    Ok(())
}

/// Only directories can be removed there; the files in them are the kernel's.
fn remove_tree(dir: &Path) -> std::io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            remove_tree(&path)?;
        }
    }
    fs::remove_dir(dir)
}
