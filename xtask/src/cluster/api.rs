//! etcd and the API server: the first parts of a node, or alone on loopback, as processes of a user who
//! need not be root. Alone they are for what needs no pods: nothing is scheduled and nothing reconciled.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use xshell::Shell;

use super::gateway;
use super::kubectl::Kubectl;
use super::parts::{self, Parts};
use super::places::{self, Init, Places};
use crate::files;
use crate::output::Finished;

/// Where they listen.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Endpoints {
    pub api: SocketAddrV4,
    /// etcd's ports on loopback, for its clients and for its peers.
    etcd: [u16; 2],
}

impl Endpoints {
    /// In the node's network, where all ports are the cluster's.
    pub const NODE: Self = Self {
        api: SocketAddrV4::new(places::ADDRESS, places::API_PORT),
        etcd: [12379, 12380],
    };

    /// On loopback, where these ports are free at the moment.
    pub fn free() -> Result<Self> {
        let any = SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0);
        // All are held until the last is found, so that they differ.
        let listeners = [(); 3].map(|()| TcpListener::bind(any));
        let mut ports = [0; 3];
        for (port, listener) in ports.iter_mut().zip(listeners) {
            *port = listener
                .context("finding a free port")?
                .local_addr()?
                .port();
        }
        let [api, etcd @ ..] = ports;
        Ok(Self {
            api: SocketAddrV4::new(Ipv4Addr::LOCALHOST, api),
            etcd,
        })
    }

    pub fn server(&self) -> String {
        format!("https://{}", self.api)
    }

    fn is_alone(&self) -> bool {
        self.api.ip().is_loopback()
    }

    fn etcd(&self) -> [String; 2] {
        self.etcd.map(|port| format!("http://127.0.0.1:{port}"))
    }
}

/// Starts both alone; they go on when this command ends.
pub fn start(places: &Places, endpoints: &Endpoints) -> Result<Init> {
    files::write_json(&places.endpoints(), endpoints)?;
    let log = places.log("cluster");
    let log = File::create(&log).with_context(|| format!("creating {}", log.display()))?;
    let mut command = Command::new(std::env::current_exe().context("finding this program")?);
    command
        .args(["cluster", "api", "--dir"])
        .arg(&places.dir)
        .process_group(0);
    let mut child = files::log_into(&mut command, log)?
        .spawn()
        .context("starting the cluster's process")?;
    let init = Init::alone(child.id());
    let noted = files::write_json(&places.init_file(), &init);
    if noted.is_err() {
        // Nobody would find it again.
        let _ = child.kill();
    }
    noted.map(|()| init)
}

/// What `start` starts: it ends when one of the two does, or is killed, and takes the others along.
pub fn run(dir: &Path) -> Result<Finished> {
    let places = Places::at(dir.to_owned());
    let shell = Shell::new().context("finding the current directory")?;
    let endpoints = files::read_json(&places.endpoints())?;
    let programs = places.running_programs()?;
    let mut parts = Parts::of(places);
    start_etcd(&mut parts, &programs.kubernetes, &endpoints)?;
    start_server(&mut parts, programs.api_server(), &endpoints)?;
    let kubectl = Kubectl::administrator(&shell, &parts.places, &programs);
    wait_for_server(&mut parts, &kubectl)?;
    gateway::define(&kubectl, &programs)?;
    parts.watch()
}

pub fn wait_for_server(parts: &mut Parts, kubectl: &Kubectl<'_>) -> Result<()> {
    parts.wait_for("the API server", || {
        kubectl.read(&["get", "--raw", "/readyz"]).is_some()
    })
}

fn part(program: &Path, name: &str, endpoints: &Endpoints) -> Command {
    if !endpoints.is_alone() {
        return parts::kubernetes(program, name);
    }
    // The end of a node is that of its namespaces; here the kernel must be told.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    command.arg(program).arg(name);
    command
}

pub fn start_etcd(parts: &mut Parts, program: &Path, endpoints: &Endpoints) -> Result<()> {
    let [client, peer] = endpoints.etcd();
    let data = parts.places.dir.join("etcd");
    let mut command = part(program, "etcd", endpoints);
    command
        .arg(format!("--data-dir={}", data.display()))
        // It is only for tests: a power cut may take it.
        .args(["--name=xtask", "--unsafe-no-fsync", "--log-level=warn"])
        .arg(format!("--listen-client-urls={client}"))
        .arg(format!("--advertise-client-urls={client}"))
        .arg(format!("--listen-peer-urls={peer}"))
        .arg(format!("--initial-advertise-peer-urls={peer}"))
        .arg(format!("--initial-cluster=xtask={peer}"));
    parts.start("etcd", &mut command)
}

pub fn start_server(parts: &mut Parts, program: &Path, endpoints: &Endpoints) -> Result<()> {
    let [etcd, _] = endpoints.etcd();
    let mut command = part(program, "kube-apiserver", endpoints);
    // It makes much garbage on a small heap: memory is there, and the processors are the pods'.
    command.env("GOGC", "400");
    command
        .arg(format!("--etcd-servers={etcd}"))
        .arg(format!("--secure-port={}", endpoints.api.port()))
        .arg(format!("--advertise-address={}", endpoints.api.ip()))
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
    match endpoints.is_alone() {
        // Nobody makes the service accounts that pods would be refused without, and its own Service has
        // no address that pods could reach.
        true => command
            .arg("--bind-address=127.0.0.1")
            .arg("--disable-admission-plugins=ServiceAccount")
            .arg("--endpoint-reconciler-type=none"),
        false => command.arg("--bind-address=0.0.0.0"),
    };
    parts.pki(
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
    parts.start("kube-apiserver", &mut command)
}
