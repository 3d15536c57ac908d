//! Images of the servers that tests use: what a registry has, or, where none can be reached, ones
//! that are put together here from the distribution's packages and Maven's.
//!
//! All the offline ones share one layer. It is written as a tar archive straight out of the
//! packages: nothing is installed and no script of theirs runs.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use glob::Pattern;
use tar::{Archive, Builder, EntryType, Header};
use xshell::{Shell, cmd};

use super::system::{self, Package};
use super::tools::{Image, Tools};
use crate::cargo;
use crate::files;
use crate::output::Output;

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
const UNUSED_FILES: &[&str] = &[
    "usr/share/doc/**",
    "usr/share/man/**",
    "usr/share/locale/**",
    "usr/share/info/**",
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
const DIRS: &[(&str, u32)] = &[
    ("tmp", 0o1777),
    ("run", 0o755),
    ("root", 0o700),
    ("proc", 0o755),
    ("sys", 0o755),
    ("dev", 0o755),
];
/// Files of the layer that no package brings: path, mode, content.
const FILES: &[(&str, u32, &str)] = &[
    (
        "etc/passwd",
        0o644,
        "root:x:0:0::/root:/bin/sh\npostgres:x:999:999::/tmp:/bin/sh\n",
    ),
    ("etc/group", 0o644, "root:x:0:\npostgres:x:999:\n"),
    (
        "etc/docker/registry/offline.yml",
        0o644,
        include_str!("images/registry.yml"),
    ),
    (
        "opt/kafka/log4j2.yaml",
        0o644,
        include_str!("images/log4j2.yaml"),
    ),
    (
        "usr/bin/kafka-dump",
        0o755,
        include_str!("images/bin/kafka-dump"),
    ),
    (
        "usr/bin/kafka-entry",
        0o755,
        include_str!("images/bin/kafka-entry"),
    ),
    (
        "usr/bin/postgres-entry",
        0o755,
        include_str!("images/bin/postgres-entry"),
    ),
    (
        "usr/bin/rabbitmq-entry",
        0o755,
        include_str!("images/bin/rabbitmq-entry"),
    ),
    (
        "usr/bin/redis-entry",
        0o755,
        include_str!("images/bin/redis-entry"),
    ),
    (
        "usr/bin/registry-entry",
        0o755,
        include_str!("images/bin/registry-entry"),
    ),
];
const POM: &str = include_str!("images/pom.xml");

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
];
/// The label that says by which recipe an image was made.
const RECIPE: &str = "dev.xtask.recipe";

/// The servers whose image is neither there nor up to date, with the images they want.
pub fn missing(tools: &Tools) -> Result<Vec<(String, Image)>> {
    let shell = cargo::shell()?;
    let images = tools.images().iter();
    let absent = images.filter(|(_, image)| {
        !is_there(&shell, &image.ordinary) && !is_current(&shell, &image.offline)
    });
    Ok(absent.map(|(n, i)| (n.clone(), i.clone())).collect())
}

/// The images that tests were last found to use here; `None` where none were. Asking the engine
/// each time would take longer than all else that an unchanged run of `ci` does.
pub fn noted() -> Option<String> {
    fs::read_to_string(note().ok()?).ok()
}

fn note() -> Result<PathBuf> {
    Ok(super::cache_dir()?.join("images-in-use"))
}

/// What tests are going to use, for reports: `postgres:17-alpine`, or the offline one.
pub fn in_use(tools: &Tools) -> Result<Vec<String>> {
    let shell = cargo::shell()?;
    let images = tools.images().values();
    let recipe = recipe();
    let name = |image: &Image| {
        if is_there(&shell, &image.ordinary) {
            image.ordinary.clone()
        } else {
            format!("{} (recipe {recipe})", image.offline)
        }
    };
    Ok(images.map(name).collect())
}

/// Pulls the images that are missing, or builds them where they cannot be had.
pub fn ensure(tools: &Tools, output: &Output) -> Result<()> {
    let shell = cargo::shell()?;
    for (_, image) in missing(tools)? {
        let ordinary = &image.ordinary;
        let pull = cmd!(shell, "docker pull --quiet {ordinary}");
        output.command(&pull);
        let ended = pull.quiet().ignore_status().output()?;
        if !ended.status.success() {
            output.detail(format_args!("not to be had: {}", last_line(&ended.stderr)));
            break;
        }
    }
    if !missing(tools)?.is_empty() {
        build(tools, &shell, output)?;
    }
    let names = in_use(tools)?;
    files::write_atomically(&note()?, names.join(" ").as_bytes())?;
    output.detail(format_args!("images: {}", names.join(", ")));
    Ok(())
}

/// The last line that a command complained with.
fn last_line(said: &[u8]) -> String {
    let said = String::from_utf8_lossy(said);
    said.trim_end()
        .lines()
        .last()
        .unwrap_or_default()
        .to_owned()
}

/// Whether the engine has an image of that name.
fn is_there(shell: &Shell, image: &str) -> bool {
    inspect(shell, image, "{{.Id}}").is_some()
}

/// Whether it was made by the recipe as it is now.
fn is_current(shell: &Shell, image: &str) -> bool {
    let format = format!("{{{{index .Config.Labels \"{RECIPE}\"}}}}");
    inspect(shell, image, &format).is_some_and(|made_by| made_by == recipe())
}

fn inspect(shell: &Shell, image: &str, format: &str) -> Option<String> {
    cmd!(shell, "docker image inspect --format {format} {image}")
        .quiet()
        .ignore_stderr()
        .read()
        .ok()
}

/// The hash of all that decides what is in the images.
fn recipe() -> String {
    let text = format!(
        "{PACKAGES:?}{UNUSED_PACKAGES:?}{UNUSED_FILES:?}{POSTGRES}{POSTGRES_VERSION}{DIRS:?}\
         {FILES:?}{POM}{IMAGES:?}"
    );
    files::sha256(text.as_bytes())[..12].to_owned()
}

fn build(tools: &Tools, shell: &Shell, output: &Output) -> Result<()> {
    if system::find("apt-get").is_none() || system::find("dpkg-deb").is_none() {
        bail!(
            "the tests' images cannot be pulled, and are built only on Debian and its relatives; \
             pull them where there is a network: {}",
            missing(tools)?
                .iter()
                .map(|(_, image)| image.ordinary.as_str())
                .collect::<Vec<_>>()
                .join(" ")
        );
    }
    output.step("building the servers' images, about half a minute");
    system::install(MAVEN, output)?;
    system::install(XZ, output)?;
    let dir = super::cache_dir()?.join(format!("images.{}", std::process::id()));
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
    assemble(&packages, &jars, &layer)?;
    let base = format!("offline/base:{}", recipe());
    let import = cmd!(shell, "docker import {layer} {base}");
    output.command(&import);
    import.quiet().ignore_stdout().run()?;
    let recipe = recipe();
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
                last_line(&ended.stderr),
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

/// Writes the layer: the packages' files, the jars, and our own.
fn assemble(packages: &[PathBuf], jars: &[PathBuf], layer: &Path) -> Result<()> {
    let file = File::create(layer).with_context(|| format!("creating {}", layer.display()))?;
    let mut tar = Builder::new(BufWriter::new(file));
    let mut written = HashSet::new();
    let unused: Vec<Pattern> = UNUSED_FILES
        .iter()
        .map(|pattern| Pattern::new(pattern))
        .collect::<Result<_, _>>()
        .context("in the list of unused files")?;
    // What was of the root is of /usr in every distribution by now.
    for name in ["bin", "sbin", "lib", "lib64"] {
        written.insert(format!("usr/{name}"));
        directory(&mut tar, &format!("usr/{name}/"), 0o755)?;
        let mut link = header(0o777, 0);
        link.set_entry_type(EntryType::Symlink);
        tar.append_link(&mut link, name, format!("usr/{name}"))?;
    }
    for (name, mode) in DIRS {
        written.insert((*name).to_owned());
        directory(&mut tar, &format!("{name}/"), *mode)?;
    }
    for package in packages {
        let shell = cargo::shell()?;
        let unpack = cmd!(shell, "dpkg-deb --fsys-tarfile {package}");
        copy(unpack, "", &unused, &mut tar, &mut written)
            .with_context(|| format!("unpacking {}", package.display()))?;
    }
    for jar in jars {
        let name = jar.file_name().unwrap_or_default().to_string_lossy();
        if name.ends_with(".jar") {
            let content = fs::read(jar).with_context(|| format!("reading {}", jar.display()))?;
            let mut header = header(0o644, content.len() as u64);
            tar.append_data(&mut header, format!("opt/kafka/libs/{name}"), &content[..])?;
        } else if name.ends_with(".txz") {
            let shell = cargo::shell()?;
            let unpack = cmd!(shell, "xz --decompress --stdout {jar}");
            copy(unpack, "opt/postgres/", &unused, &mut tar, &mut written)
                .context("unpacking PostgreSQL")?;
        }
    }
    for (name, mode, content) in FILES {
        let mut header = header(*mode, content.len() as u64);
        tar.append_data(&mut header, name, content.as_bytes())?;
    }
    tar.into_inner()?.flush().context("writing the layer")
}

/// Copies the archive that `command` prints, under `prefix`, with directories of `/usr` in place.
fn copy(
    command: xshell::Cmd<'_>,
    prefix: &str,
    unused: &[Pattern],
    tar: &mut Builder<BufWriter<File>>,
    written: &mut HashSet<String>,
) -> Result<()> {
    let mut child = Command::from(command)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("starting the unpacking")?;
    let stdout = child.stdout.take().context("it has no output")?;
    let mut archive = Archive::new(stdout);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let Some(path) = place(&entry.path()?, prefix) else {
            continue;
        };
        if unused.iter().any(|pattern| pattern.matches(&path)) {
            continue;
        }
        // Packages share directories; an engine takes each path of a layer once.
        if !written.insert(path.clone()) {
            continue;
        }
        let mut header = entry.header().clone();
        header.set_uid(0);
        header.set_gid(0);
        match header.entry_type() {
            EntryType::Symlink => {
                let target = entry.link_name()?.unwrap_or_default().into_owned();
                tar.append_link(&mut header, &path, target)?;
            }
            EntryType::Link => {
                let target = entry.link_name()?.unwrap_or_default().into_owned();
                let target = place(&target, prefix).context("a link to nowhere")?;
                tar.append_link(&mut header, &path, target)?;
            }
            EntryType::Directory => {
                tar.append_data(&mut header, format!("{path}/"), std::io::empty())?;
            }
            _ => tar.append_data(&mut header, &path, &mut entry)?,
        }
    }
    // Padding after the archive's end; a closed pipe would be an error to the other side.
    std::io::copy(&mut archive.into_inner().by_ref(), &mut std::io::sink())?;
    if !child.wait().context("waiting for the unpacking")?.success() {
        bail!("it failed");
    }
    Ok(())
}

/// Where a file of a package goes: `./bin/x` to `usr/bin/x`; `None` for the root itself.
fn place(path: &Path, prefix: &str) -> Option<String> {
    let path = path.to_string_lossy();
    let path = path.trim_start_matches("./").trim_matches('/');
    if path.is_empty() || path == "." {
        return None;
    }
    let first = path.split('/').next().unwrap_or_default();
    let moved = prefix.is_empty() && ["bin", "sbin", "lib", "lib64"].contains(&first);
    Some(if moved {
        format!("usr/{path}")
    } else {
        format!("{prefix}{path}")
    })
}

fn directory(tar: &mut Builder<BufWriter<File>>, path: &str, mode: u32) -> Result<()> {
    let mut header = header(mode, 0);
    header.set_entry_type(EntryType::Directory);
    Ok(tar.append_data(&mut header, path, std::io::empty())?)
}

fn header(mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_root_move_below_usr() {
        let cases = [
            ("./bin/sh", "", Some("usr/bin/sh")),
            (
                "./lib/x86_64-linux-gnu/libc.so.6",
                "",
                Some("usr/lib/x86_64-linux-gnu/libc.so.6"),
            ),
            ("./library/x", "", Some("library/x")),
            ("./", "", None),
            (
                "bin/postgres",
                "opt/postgres/",
                Some("opt/postgres/bin/postgres"),
            ),
        ];
        for (path, prefix, wanted) in cases {
            assert_eq!(place(Path::new(path), prefix).as_deref(), wanted, "{path}");
        }
    }

    #[test]
    fn each_image_of_the_recipe_is_pinned() {
        let tools = Tools::open().unwrap();
        let pinned: Vec<&str> = tools.images().keys().map(String::as_str).collect();
        let mut made: Vec<&str> = IMAGES.iter().map(|(name, _)| *name).collect();
        made.sort_unstable();
        assert_eq!(pinned, made);
    }
}
