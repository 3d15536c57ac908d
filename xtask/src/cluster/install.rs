//! What a machine needs before a cluster can be started on it.

use std::path::Path;

use anyhow::{Result, bail};

use super::{KUBECONFIG, build};
use crate::cli::Supported;
use crate::output::Output;
use crate::setup::system::{self, Package};
use crate::setup::tools::Tools;
use crate::setup::{engine, images};

const NODE_PACKAGES: [Package; 10] = [
    package("containerd", &["containerd"]),
    package("runc", &["runc"]),
    package("bridge", &["containernetworking-plugins"]),
    package("nft", &["nftables"]),
    package("iptables", &["iptables"]),
    package("ipset", &["ipset"]),
    package("conntrack", &["conntrack"]),
    package("ip", &["iproute2"]),
    package("unshare", &["util-linux"]),
    package("sysctl", &["procps"]),
];

/// What lets the API server end with the process that holds it.
const SETPRIV: Package = package("setpriv", &["util-linux"]);

const fn package(program: &'static str, debian: &'static [&'static str]) -> Package {
    Package {
        program,
        debian,
        brew: &[],
    }
}

/// What a machine lacks for a cluster; `None` where one could be started.
pub fn missing() -> Option<String> {
    if std::env::var_os(KUBECONFIG).is_some() {
        return None;
    }
    let missing: Vec<&str> = NODE_PACKAGES
        .iter()
        .filter(|package| !is_installed(**package))
        .flat_map(|package| package.debian)
        .copied()
        .collect();
    let built = build::missing();
    let missing = [missing, built].concat();
    (!missing.is_empty()).then(|| missing.join(" "))
}

/// Which versions the cluster's programs are of.
pub fn version() -> Option<String> {
    missing()
        .is_none()
        .then(|| match std::env::var(KUBECONFIG) {
            Ok(given) => format!("the one of {given}"),
            Err(_) => build::version(),
        })
}

/// Installs and builds what a cluster needs; starts none.
pub fn install(output: &Output) -> Result<()> {
    if std::env::var_os(KUBECONFIG).is_some() {
        return Ok(());
    }
    check_machine()?;
    for package in NODE_PACKAGES {
        if !is_installed(package) {
            system::install_anyway(package, output)?;
        }
    }
    let tools = Tools::open()?;
    tools.install("kubectl", output)?;
    engine::ensure(output)?;
    images::ensure(&tools, output)?;
    build::ensure(output)?;
    output.detail(format_args!(
        "a cluster can be started: {}",
        build::version()
    ));
    Ok(())
}

/// What only tests need and this machine lacks.
pub fn missing_for_tests() -> Option<String> {
    let missing = build::missing_for_tests();
    (!missing.is_empty()).then(|| missing.join(" "))
}

/// The versions of what only tests need, where it is built.
pub fn for_tests() -> Option<String> {
    build::for_tests()
}

/// Builds what only tests need.
pub fn install_for_tests(output: &Output) -> Result<()> {
    build::ensure_for_tests(output)
}

fn is_installed(package: Package) -> bool {
    match package.program {
        "bridge" => Path::new("/usr/lib/cni/bridge").is_file(),
        program => system::find(program).is_some(),
    }
}

/// Refuses a machine on which no node can be started.
fn check_machine() -> Result<()> {
    if !cfg!(target_os = "linux") {
        bail!(
            "a cluster of its own can be started on Linux only; start one (kind, k3s, …) and name \
             its kubeconfig in {KUBECONFIG}"
        );
    }
    if !system::is_root() && !system::has_sudo() {
        bail!(
            "only root, or who has sudo without a password, can start a cluster of its own; start \
             one (kind, k3s, …) and name its kubeconfig in {KUBECONFIG}, or do without pods: \
             `cargo xtask cluster up --api-only`"
        );
    }
    Ok(())
}

/// Installs and builds what the API server alone needs; starts none.
pub(super) fn install_api(supported: Option<Supported>, output: &Output) -> Result<()> {
    if !cfg!(target_os = "linux") {
        bail!(
            "an API server of its own can be started on Linux only; start a cluster (kind, k3s, …) and \
             name its kubeconfig in {KUBECONFIG}"
        );
    }
    if !is_installed(SETPRIV) {
        system::install_anyway(SETPRIV, output)?;
    }
    let tools = Tools::open()?;
    tools.install("kubectl", output)?;
    build::ensure_api(supported, output)
}
