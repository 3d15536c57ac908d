//! `image --load`: an image straight into a cluster on this machine, without a registry. Its nodes
//! find it by its digest, as if they had pulled it.

use std::path::Path;

use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

use super::layout::Layout;
use crate::cargo;
use crate::cluster::{Cluster, KUBECONFIG};
use crate::config::Pipeline;
use crate::output::Output;

/// A cluster whose node takes images from an archive.
enum Node {
    /// kind's cluster of that name. <https://kind.sigs.k8s.io/docs/user/quick-start/>
    Kind(String),
    /// <https://docs.k3s.io/installation/airgap>
    K3s,
    Own(Cluster),
}

pub struct Target {
    node: Node,
    repository: String,
}

impl Target {
    pub fn of(pipeline: &Pipeline, environment: &str) -> Result<Self> {
        let settings = pipeline.kubernetes(environment)?;
        let node = match &settings.context {
            None => {
                let cluster = Cluster::open()?;
                if let Some(given) = std::env::var_os(KUBECONFIG)
                    && *given != *cluster.kubeconfig()
                {
                    bail!(
                        "{KUBECONFIG} = {} names a cluster that is not ours, which takes no images from \
                         this machine; push them to a registry with `cargo xtask image --push`",
                        given.display()
                    );
                }
                cluster.check_node()?;
                Node::Own(cluster)
            }
            Some(context) => match context.strip_prefix("kind-") {
                Some(name) => Node::Kind(name.to_owned()),
                // k3s itself calls its context "default".
                None if context.contains("k3s")
                    || (context == "default" && Path::new("/etc/rancher/k3s").is_dir()) =>
                {
                    Node::K3s
                }
                None => bail!(
                    "the cluster of context {context:?} takes no images from this machine; push them \
                     to a registry with `cargo xtask image --push`"
                ),
            },
        };
        Ok(Self {
            node,
            repository: settings.repository,
        })
    }

    /// Makes the image known to the node, by the name that pods call it by.
    pub fn load(&self, pipeline: &Pipeline, digest: &str, output: &Output) -> Result<()> {
        let shell = Shell::new().context("finding the current directory")?;
        let dir = shell
            .create_temp_dir()
            .context("making a place for the archive")?;
        let archive = dir.path().join("image.tar");
        let name = format!("{}@{digest}", self.repository);
        Layout::open(pipeline.state_dir().join("images"))?.archive(digest, &name, &archive)?;
        let shell = cargo::shell()?;
        match &self.node {
            Node::Own(cluster) => cluster.load(&archive, output)?,
            Node::Kind(cluster) => {
                let load = cmd!(shell, "kind load image-archive {archive} --name {cluster}");
                output.command(&load);
                load.quiet().run().context("loading the image into kind")?;
            }
            Node::K3s => {
                let load = cmd!(shell, "k3s ctr images import {archive}");
                output.command(&load);
                load.quiet().run().context("loading the image into k3s")?;
            }
        }
        output.good(format_args!("the cluster has {name}"));
        Ok(())
    }
}
