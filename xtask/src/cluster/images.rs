//! The images that the node has: those that were loaded, and those of servers for tests.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use xshell::cmd;

use super::{Cluster, root};
use crate::files;
use crate::output::Output;
use crate::setup::tools::Tools;
use crate::setup::{images, system};

/// The servers whose images the node has.
const SERVERS: [&str; 2] = ["postgres", "prometheus"];

impl Cluster {
    /// Makes the images of an archive known to the node: `docker save`'s, or an OCI layout's.
    pub fn load(&self, archive: &Path, output: &Output) -> Result<()> {
        self.check_node()?;
        let archive = std::path::absolute(archive).context("resolving the archive's path")?;
        if !system::is_root() {
            return root::run(&["load".as_ref(), archive.as_ref()]);
        }
        let import = self
            .inside("ctr")?
            .args(["--namespace", "k8s.io", "images", "import"]);
        let import = import.args(["--snapshotter", "overlayfs"]).arg(archive);
        output.command(&import);
        import
            .quiet()
            .ignore_stdout()
            .run()
            .context("loading the image")
    }

    /// What the node has under the name of a server: a repository and a digest.
    pub fn image(&self, server: &str) -> Result<String> {
        self.check_node()?;
        let images: BTreeMap<String, String> = files::read_json(&self.places.images())?;
        images
            .get(server)
            .cloned()
            .with_context(|| format!("the cluster has no image of {server}"))
    }

    /// Gives the node images that the integration tests start servers from.
    pub(super) fn load_servers(&self, output: &Output) -> Result<()> {
        let tools = Tools::open()?;
        let images = SERVERS.map(|server| images::of(&tools, server));
        let images = images.into_iter().collect::<Result<Vec<String>>>()?;
        let names = &images;
        let archive = self.places.dir.join("servers.tar");
        let save = cmd!(self.shell, "docker save --output {archive} {names...}");
        output.command(&save);
        save.quiet()
            .run()
            .context("taking images from the container engine")?;
        self.load(&archive, output)?;
        std::fs::remove_file(&archive).context("removing the archive")?;
        let ctr = ["--namespace", "k8s.io", "images"];
        let list = self.inside("ctr")?.args(ctr).arg("list").quiet().read()?;
        let mut names = BTreeMap::new();
        for (server, image) in SERVERS.iter().zip(&images) {
            let there = list.lines().find_map(|line| {
                let mut fields = line.split_whitespace();
                let (name, _kind, digest) = (fields.next()?, fields.next()?, fields.next()?);
                let is_it = name.ends_with(&format!("/{image}"));
                is_it.then_some((name, digest))
            });
            let (name, digest) =
                there.with_context(|| format!("the node has no {image} after it was loaded"))?;
            let by_digest = format!("xtask.local/{server}@{digest}");
            let tag = self.inside("ctr")?.args(ctr).args(["tag", "--force"]);
            let tag = tag.args([name, &by_digest]);
            tag.quiet().ignore_stdout().run()?;
            names.insert(server, by_digest);
        }
        files::write_json(&self.places.images(), &names)
    }
}
