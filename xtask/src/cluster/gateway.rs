//! The cluster's routers: Contour steers Envoy, and both are processes of the node. One pair takes
//! routes of the Gateway API; Contour takes its own HTTPProxies only where there is no more than one
//! listener, so another pair is for those. Traefik, where it has been built, is a second
//! implementation of the Gateway API.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

use super::POLL;
use super::build::{NodePrograms, Programs};
use super::kubectl::Kubectl;
use super::node::Node;
use super::places;

/// A Contour and an Envoy.
struct Pair {
    contour: &'static str,
    envoy: &'static str,
    /// Contour's settings.
    settings: &'static str,
    /// The HTTPProxies that it takes.
    class: &'static str,
    /// The first of the ports that it uses inside the node: where Contour tells Envoy what to do,
    /// then metrics, health, debugging and Envoy's statistics.
    port: u16,
}

const PAIRS: [Pair; 2] = [
    Pair {
        contour: "contour",
        envoy: "envoy",
        settings: "contour.yaml",
        class: "none",
        port: 18000,
    },
    Pair {
        contour: "contour-proxies",
        envoy: "envoy-proxies",
        settings: "contour-proxies.yaml",
        class: "contour",
        port: 18010,
    },
];

/// Installs the definitions of gateways' resources.
pub fn define(kubectl: &Kubectl<'_>, programs: &Programs) -> Result<()> {
    let mut definitions = String::new();
    for path in &programs.definitions {
        let text =
            fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        definitions.push_str("---\n");
        definitions.push_str(&text);
    }
    kubectl.apply(&definitions)?;
    let names = "customresourcedefinitions";
    kubectl
        .command()
        .args([
            "wait",
            "--for=condition=Established",
            "--timeout=60s",
            "--all",
            names,
        ])
        .ignore_stdout()
        .run()
        .context("waiting for the gateway's definitions")
}

/// kubectl's words, which it answers with "condition met" once they are there.
pub const DEFINED: [&str; 4] = [
    "wait",
    "--for=condition=Established",
    "--timeout=1s",
    "customresourcedefinition/httpproxies.projectcontour.io",
];

/// Asks for the gateways, each with its class.
pub fn declare(kubectl: &Kubectl<'_>, programs: &NodePrograms) -> Result<()> {
    kubectl.apply(include_str!("node/gateway.yaml"))?;
    match programs.traefik {
        Some(_) => kubectl.apply(include_str!("node/traefik.yaml")),
        None => Ok(()),
    }
}

/// Waits until all gateways take routes.
pub fn wait(kubectl: &Kubectl<'_>, deadline: Instant) -> Result<()> {
    let words = [
        "--namespace",
        "xtask-gateway",
        "wait",
        "--for=condition=Programmed",
        "--timeout=1s",
        "--all",
        "gateways",
    ];
    while kubectl.read(&words).is_none() {
        if Instant::now() > deadline {
            bail!("a gateway is not programmed; its log has the reason");
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Starts all of them.
pub fn start(node: &mut Node, shell: &Shell) -> Result<()> {
    for pair in &PAIRS {
        start_pair(node, shell, pair)?;
    }
    match node.programs.traefik.clone() {
        Some(program) => start_traefik(node, &program),
        None => Ok(()),
    }
}

fn start_traefik(node: &mut Node, program: &Path) -> Result<()> {
    let mut traefik = Command::new(program);
    traefik
        .env("KUBECONFIG", node.parts.places.kubeconfig())
        .args(["--global.checknewversion=false", "--log.level=WARN"])
        .args(["--entrypoints.traefik.address=127.0.0.1:18020", "--ping"])
        .arg("--providers.kubernetesgateway")
        // Its own patience is 2 s, in which a rollout's steps would have to wait for it.
        .arg("--providers.providersthrottleduration=100ms")
        .arg(format!(
            "--providers.kubernetesgateway.statusaddress.ip={}",
            places::ADDRESS
        ));
    for port in 18191..=18195 {
        traefik.arg(format!("--entrypoints.test-{port}.address=:{port}"));
    }
    node.parts.start("traefik", &mut traefik)
}

fn start_pair(node: &mut Node, shell: &Shell, pair: &Pair) -> Result<()> {
    let places = &node.parts.places;
    let contour = &node.programs.contour;
    let bootstrap = places.dir.join(pair.envoy).with_extension("json");
    let admin = places.dir.join(pair.envoy).with_extension("sock");
    let xds = pair.port.to_string();
    cmd!(
        shell,
        "{contour} bootstrap {bootstrap} --namespace xtask-gateway"
    )
    .args(["--xds-address", "127.0.0.1", "--xds-port", &xds])
    .arg("--admin-address")
    .arg(admin)
    .quiet()
    .ignore_stdout()
    .ignore_stderr()
    .run()
    .context("writing Envoy's settings")?;
    let mut serve = Command::new(contour);
    serve
        .args(["serve", "--insecure", "--disable-leader-election"])
        .arg(format!("--kubeconfig={}", places.kubeconfig().display()))
        .arg(format!(
            "--config-path={}",
            places.dir.join(pair.settings).display()
        ))
        .arg(format!("--ingress-class-name={}", pair.class))
        .arg(format!("--ingress-status-address={}", places::ADDRESS));
    for (port, name) in (pair.port..).zip(["xds", "http", "health", "debug-http", "stats"]) {
        serve.arg(format!("--{name}-address=127.0.0.1"));
        serve.arg(format!("--{name}-port={port}"));
    }
    // Of the Gateway API only what its standard channel has.
    for kind in ["tlsroutes", "tcproutes", "backendtlspolicies"] {
        serve.arg(format!("--disable-feature={kind}"));
    }
    let mut envoy = Command::new(&node.programs.envoy);
    envoy
        .arg("--config-path")
        .arg(&bootstrap)
        .args(["--service-cluster", "xtask", "--service-node", "xtask"])
        .args([
            "--concurrency",
            "2",
            "--log-level",
            "warn",
            "--disable-hot-restart",
        ]);
    node.parts.start(pair.contour, &mut serve)?;
    node.parts.start(pair.envoy, &mut envoy)
}
