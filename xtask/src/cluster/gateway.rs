//! The cluster's gateway: Contour steers Envoy, and both are processes of the node. It takes
//! routes of the Gateway API and Contour's own HTTPProxy.

use std::fs;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

use super::build::Programs;
use super::node::{Node, Part};
use super::places;
use super::{Kubectl, POLL};

/// Where Contour tells Envoy what to do.
const XDS_PORT: &str = "18001";

/// Installs the definitions of its resources, its class and the gateway itself.
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
        .context("waiting for the gateway's definitions")?;
    kubectl.apply(include_str!("node/gateway.yaml"))
}

/// Waits until the gateway takes routes.
pub fn wait(kubectl: &Kubectl<'_>, deadline: Instant) -> Result<()> {
    let words = [
        "--namespace",
        "xtask-gateway",
        "get",
        "gateway",
        "gateway",
        "--output",
        r#"jsonpath={.status.conditions[?(@.type=="Programmed")].status}"#,
    ];
    while kubectl.read(&words).as_deref() != Some("True") {
        if Instant::now() > deadline {
            bail!("the gateway is not programmed; its log has the reason");
        }
        std::thread::sleep(POLL);
    }
    Ok(())
}

/// Starts both processes.
pub fn start(node: &Node, shell: &Shell) -> Result<[Part; 2]> {
    let places = &node.places;
    let contour = &node.programs.contour;
    let bootstrap = places.dir.join("envoy.json");
    let admin = places.dir.join("envoy-admin.sock");
    cmd!(
        shell,
        "{contour} bootstrap {bootstrap} --namespace xtask-gateway"
    )
    .args(["--xds-address", "127.0.0.1", "--xds-port", XDS_PORT])
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
            places.dir.join("contour.yaml").display()
        ))
        .args(["--xds-address=127.0.0.1", &format!("--xds-port={XDS_PORT}")])
        .arg(format!("--ingress-status-address={}", places::ADDRESS))
        // Of the Gateway API only what its standard channel has.
        .args(
            ["tlsroutes", "tcproutes", "backendtlspolicies"]
                .map(|kind| format!("--disable-feature={kind}")),
        );
    let mut envoy = Command::new(&node.programs.envoy);
    envoy
        .arg("--config-path")
        .arg(&bootstrap)
        .args(["--service-cluster", "xtask", "--service-node", "xtask"])
        .args(["--concurrency", "2", "--log-level", "warn"]);
    Ok([
        node.part("contour", &mut serve)?,
        node.part("envoy", &mut envoy)?,
    ])
}
