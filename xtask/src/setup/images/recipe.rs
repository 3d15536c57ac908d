//! The offline images: what goes into the layer that all of them share, and what is particular to
//! each.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

use super::layer;
use crate::files;
use crate::output::Output;
use crate::setup;
use crate::setup::system::{self, Package};
use crate::setup::tools::Tools;

const MAVEN: Package = Package {
    program: "mvn",
    debian: &["maven", "default-jre-headless"],
    brew: &["maven"],
};
const XZ: Package = Package {
    program: "xz",
    debian: &["xz-utils"],
    brew: &["xz"],
};

/// What is in the layer. Their dependencies come by themselves, but for what every system has.
const PACKAGES: &[&str] = &[
    "dash",
    "coreutils",
    "sed",
    "grep",
    "libstdc++6",
    "redis-server",
    "rabbitmq-server",
    "default-jre-headless",
    "docker-registry",
    "prometheus",
];
/// Dependencies that only serve installing, or that no server here uses.
const UNUSED_PACKAGES: &[&str] = &[
    "adduser_",
    "ca-certificates",
    "cron",
    "debconf",
    "dpkg_",
    "fonts-",
    "libperl",
    "libpython",
    "logrotate",
    "openssl_",
    "perl",
    "python",
    "tar_",
    "usrmerge",
];
/// Files that nobody reads in a container, and plugins that take a second to load.
pub(super) const UNUSED_FILES: &[&str] = &[
    "usr/share/doc/**",
    "usr/share/man/**",
    "usr/share/locale/**",
    "usr/share/info/**",
    "usr/share/javascript/**",
    "usr/bin/promtool",
    "usr/lib/rabbitmq/lib/*/plugins/amqp10_client*/**",
    "usr/lib/rabbitmq/lib/*/plugins/eetcd*/**",
    "usr/lib/rabbitmq/lib/*/plugins/gun*/**",
    "usr/lib/rabbitmq/lib/*/plugins/jose*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_amqp1_0*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_auth*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_aws*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_consistent*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_event*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_federation*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_jms*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_mqtt*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_peer_discovery_*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_prometheus*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_random*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_recent*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_sharding*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_shovel*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_stomp*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_stream*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_top*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_tracing*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_trust*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_web_mqtt*/**",
    "usr/lib/rabbitmq/lib/*/plugins/rabbitmq_web_stomp*/**",
];
/// PostgreSQL of the ordinary image's major version, which the distribution may not have.
const POSTGRES: &str = "io.zonky.test.postgres:embedded-postgres-binaries-linux";
const POSTGRES_VERSION: &str = "17.6.0";

/// Directories of the layer that no package brings, with their modes.
pub(super) const DIRS: &[(&str, u32)] = &[
    ("tmp", 0o1777),
    ("run", 0o755),
    ("root", 0o700),
    ("proc", 0o755),
    ("sys", 0o755),
    ("dev", 0o755),
];
/// Files of the layer that no package brings: path, mode, content.
pub(super) const FILES: &[(&str, u32, &str)] = &[
    (
        "etc/passwd",
        0o644,
        "root:x:0:0::/root:/bin/sh\npostgres:x:999:999::/tmp:/bin/sh\n",
    ),
    ("etc/group", 0o644, "root:x:0:\npostgres:x:999:\n"),
    (
        "etc/docker/registry/offline.yml",
        0o644,
        include_str!("registry.yml"),
    ),
    ("opt/kafka/log4j2.yaml", 0o644, include_str!("log4j2.yaml")),
    ("usr/bin/kafka-dump", 0o755, include_str!("bin/kafka-dump")),
    (
        "usr/bin/kafka-entry",
        0o755,
        include_str!("bin/kafka-entry"),
    ),
    (
        "usr/bin/postgres-entry",
        0o755,
        include_str!("bin/postgres-entry"),
    ),
    (
        "usr/bin/rabbitmq-entry",
        0o755,
        include_str!("bin/rabbitmq-entry"),
    ),
    (
        "usr/bin/redis-entry",
        0o755,
        include_str!("bin/redis-entry"),
    ),
    (
        "usr/bin/registry-entry",
        0o755,
        include_str!("bin/registry-entry"),
    ),
];
const POM: &str = include_str!("pom.xml");

/// What is particular to each image, in a Dockerfile's words.
const IMAGES: &[(&str, &str)] = &[
    (
        "postgres",
        "EXPOSE 5432\nUSER postgres\nENTRYPOINT [\"postgres-entry\"]",
    ),
    ("redis", "EXPOSE 6379\nENTRYPOINT [\"redis-entry\"]"),
    (
        "rabbitmq",
        "EXPOSE 5672 15672\nENTRYPOINT [\"rabbitmq-entry\"]",
    ),
    // One start beforehand leaves its classes in an archive: later ones take a third of the time.
    (
        "kafka",
        "RUN [\"kafka-dump\"]\nEXPOSE 9092\nENTRYPOINT [\"kafka-entry\"]",
    ),
    ("registry", "EXPOSE 5000\nENTRYPOINT [\"registry-entry\"]"),
    ("prometheus", "EXPOSE 9090\nENTRYPOINT [\"prometheus\"]"),
];
/// The label that says by which recipe an image was made.
pub(super) const RECIPE: &str = "dev.xtask.recipe";

/// The hash of all that decides what is in the images.
pub(super) fn hash() -> String {
    let text = format!(
        "{PACKAGES:?}{UNUSED_PACKAGES:?}{UNUSED_FILES:?}{POSTGRES}{POSTGRES_VERSION}{DIRS:?}\
         {FILES:?}{POM}{IMAGES:?}"
    );
    files::sha256(text.as_bytes())[..12].to_owned()
}

pub(super) fn build(tools: &Tools, shell: &Shell, output: &Output) -> Result<()> {
    if system::find("apt-get").is_none() || system::find("dpkg-deb").is_none() {
        bail!(
            "the tests' images cannot be pulled, and are built only on Debian and its relatives; \
             pull them where there is a network: {}",
            super::missing(tools)?
                .iter()
                .map(|(_, image)| image.ordinary.as_str())
                .collect::<Vec<_>>()
                .join(" ")
        );
    }
    output.step("building the servers' images, about half a minute");
    system::install(MAVEN, output)?;
    system::install(XZ, output)?;
    let dir = setup::cache_dir()?.join(format!("images.{}", std::process::id()));
    let built = build_in(&dir, tools, shell, output);
    let _ = fs::remove_dir_all(&dir);
    built.context("building the servers' images")
}

fn build_in(dir: &Path, tools: &Tools, shell: &Shell, output: &Output) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
    let packages = download_packages(dir, shell, output)?;
    let jars = download_jars(dir, shell, output)?;
    output.detail("putting the layer together");
    let layer = dir.join("layer.tar");
    layer::assemble(&packages, &jars, &layer)?;
    let base = format!("offline/base:{}", hash());
    let import = cmd!(shell, "docker import {layer} {base}");
    output.command(&import);
    import.quiet().ignore_stdout().run()?;
    let recipe = hash();
    for (name, lines) in IMAGES {
        let Some(image) = tools.images().get(*name) else {
            continue;
        };
        let tag = &image.offline;
        // Data in tests' servers is thrown away, so there is nothing to wait for at the end.
        let dockerfile =
            format!("FROM {base}\n{lines}\nSTOPSIGNAL SIGKILL\nLABEL {RECIPE}={recipe}\n");
        let build = cmd!(shell, "docker build --quiet --tag {tag} -");
        output.command(&build);
        let ended = build
            .env("DOCKER_BUILDKIT", "0")
            .stdin(dockerfile)
            .quiet()
            .ignore_status()
            .output()?;
        if !ended.status.success() {
            bail!(
                "building {tag}: {}\n{}",
                super::last_line(&ended.stderr),
                String::from_utf8_lossy(&ended.stdout)
            );
        }
    }
    Ok(())
}

/// The packages with all they depend on, as if nothing were installed here.
fn download_packages(dir: &Path, shell: &Shell, output: &Output) -> Result<Vec<PathBuf>> {
    let archives = dir.join("archives");
    fs::create_dir_all(archives.join("partial")).context("making a place for packages")?;
    let status = dir.join("status");
    fs::write(&status, "").context("writing an empty list of packages")?;
    let packages = PACKAGES;
    let download = || {
        let command = cmd!(
            shell,
            "apt-get -o Dir::State::status={status} -o Dir::Cache::archives={archives}
             -o Debug::NoLocking=1 -o APT::Install-Recommends=0 -o APT::Sandbox::User=root
             --yes -qq --download-only install {packages...}"
        );
        output.command(&command);
        command.quiet().ignore_stdout().run()
    };
    if download().is_err() {
        system::refresh(output)?;
        download().context("downloading packages")?;
    }
    let entries = fs::read_dir(&archives).context("reading the packages")?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.ends_with(".deb")
                && !UNUSED_PACKAGES
                    .iter()
                    .any(|unused| name.starts_with(unused))
        })
        .collect();
    files.sort();
    Ok(files)
}

/// Kafka's jars, and PostgreSQL as a compressed archive.
fn download_jars(dir: &Path, shell: &Shell, output: &Output) -> Result<Vec<PathBuf>> {
    let pom = dir.join("pom.xml");
    fs::write(&pom, POM).context("writing the POM")?;
    let jars = dir.join("jars");
    let fetch = cmd!(
        shell,
        "mvn -q -B -Dstyle.color=never -f {pom} dependency:copy-dependencies -DincludeScope=runtime -DoutputDirectory={jars}"
    );
    output.command(&fetch);
    fetch
        .quiet()
        .ignore_stdout()
        .run()
        .context("fetching Kafka")?;
    let machine = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64v8",
        other => bail!("there is no PostgreSQL for {other} machines"),
    };
    let unpack = cmd!(
        shell,
        "mvn -q -B -Dstyle.color=never -f {pom} dependency:unpack -Dartifact={POSTGRES}-{machine}:{POSTGRES_VERSION} -DoutputDirectory={jars}"
    );
    output.command(&unpack);
    unpack
        .quiet()
        .ignore_stdout()
        .run()
        .context("fetching PostgreSQL")?;
    let entries = fs::read_dir(&jars).context("reading what Maven fetched")?;
    let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_image_of_the_recipe_is_pinned() {
        let tools = Tools::open().unwrap();
        let pinned: Vec<&str> = tools.images().keys().map(String::as_str).collect();
        let mut made: Vec<&str> = IMAGES.iter().map(|(name, _)| *name).collect();
        made.sort_unstable();
        assert_eq!(pinned, made);
    }
}
