//! The files that steps read: what git tracks and what it does not ignore, by content.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use cargo_metadata::{Metadata, MetadataCommand};
use glob::{MatchOptions, Pattern};
use xshell::cmd;

use super::step::Inputs;
use crate::cargo;
use crate::files;

/// What every package of a workspace is made from.
const OF_EVERY_PACKAGE: &[&str] = &[
    // Features of all members decide how what they share is built.
    "**/Cargo.toml",
    "Cargo.lock",
    ".cargo/**",
    "rust-toolchain",
    "rust-toolchain.toml",
];

/// The content of a workspace: each file's path and what is in it, as `MODE SHA-256` with git's
/// modes (100644, 100755, 120000).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tree {
    files: BTreeMap<String, String>,
    /// When each file's content, mode or name last changed (st_ctime), in nanoseconds: the kernel's
    /// own clock, which no program can set back.
    changed: BTreeMap<String, i128>,
}

/// The packages of a workspace, each with the patterns of the files it is made from.
#[derive(Debug, Default)]
pub struct Packages(BTreeMap<String, Vec<String>>);

impl Tree {
    /// Reads every file under `root`; none where that is no git repository.
    pub fn read(root: &Path) -> Result<Self> {
        let shell = cargo::shell()?;
        shell.change_dir(root);
        let list = cmd!(
            shell,
            "git ls-files -z --cached --others --exclude-standard --deduplicate"
        )
        .quiet()
        .ignore_stderr()
        // Where there is no repository there are no files to tell apart.
        .ignore_status()
        .output()
        .context("asking git for the files; what is cached depends on them")?;
        let mut tree = Self::default();
        for path in list
            .stdout
            .split(|byte| *byte == 0)
            .filter(|p| !p.is_empty())
        {
            let Ok(path) = std::str::from_utf8(path) else {
                bail!("a file's name is not UTF-8: {}", path.escape_ascii());
            };
            if let Some((content, changed)) = examine(&root.join(path))? {
                tree.files.insert(path.to_owned(), content);
                tree.changed.insert(path.to_owned(), changed);
            }
        }
        Ok(tree)
    }

    pub fn files(&self) -> &BTreeMap<String, String> {
        &self.files
    }

    /// The first of `paths` that was touched since `before`, even if it was changed and changed
    /// back.
    pub fn touched_since<'a>(
        &self,
        before: &Self,
        mut paths: impl Iterator<Item = &'a String>,
    ) -> Option<&'a String> {
        paths.find(|path| {
            self.files.get(*path) != before.files.get(*path)
                || self.changed.get(*path) != before.changed.get(*path)
        })
    }

    /// The files that `inputs` name.
    pub fn select(&self, inputs: &Inputs, packages: &Packages) -> Result<BTreeMap<String, String>> {
        let patterns = Patterns::of(inputs, packages)?;
        let selected = self.files.iter().filter(|(path, _)| patterns.match_(path));
        Ok(selected.map(|(k, v)| (k.clone(), v.clone())).collect())
    }
}

/// The patterns of a step's inputs, compiled.
pub struct Patterns(Vec<Pattern>);

impl Patterns {
    pub fn of(inputs: &Inputs, packages: &Packages) -> Result<Self> {
        let mut patterns = inputs.reads.clone();
        for package in &inputs.packages {
            patterns.extend(packages.patterns(package)?.iter().cloned());
        }
        let compile = |pattern: &String| {
            Pattern::new(pattern).with_context(|| format!("{pattern:?} is no pattern of files"))
        };
        Ok(Self(patterns.iter().map(compile).collect::<Result<_>>()?))
    }

    /// Whether one of them fits `path`; `*` stays within a directory, `**` does not.
    pub fn match_(&self, path: &str) -> bool {
        const OPTIONS: MatchOptions = MatchOptions {
            case_sensitive: true,
            require_literal_separator: true,
            require_literal_leading_dot: false,
        };
        self.0
            .iter()
            .any(|pattern| pattern.matches_with(path, OPTIONS))
    }
}

impl Packages {
    /// Asks cargo for the workspace's packages and what each is made from.
    pub fn read(root: &Path) -> Result<Self> {
        let metadata = MetadataCommand::new()
            .current_dir(root)
            .no_deps()
            .other_options(["--offline".to_owned()])
            .exec()
            .context("asking cargo for the workspace's packages")?;
        let names = metadata.packages.iter().map(|p| p.name.to_string());
        let all = names.map(|name| {
            let mut dirs = Vec::new();
            collect(&metadata, root, &name, &mut dirs);
            let files = dirs.iter().map(|dir| match dir.as_str() {
                "" => "**".to_owned(),
                dir => format!("{dir}/**"),
            });
            let patterns = OF_EVERY_PACKAGE.iter().map(|p| (*p).to_owned());
            (name, files.chain(patterns).collect())
        });
        Ok(Self(all.collect()))
    }

    fn patterns(&self, package: &str) -> Result<&[String]> {
        match self.0.get(package) {
            Some(patterns) => Ok(patterns),
            None => {
                let known: Vec<&str> = self.0.keys().map(String::as_str).collect();
                bail!(
                    "a step reads package {package:?}; there is {}",
                    known.join(", ")
                )
            }
        }
    }
}

/// The directories of `package` and of the packages here that it depends on.
fn collect(metadata: &Metadata, root: &Path, package: &str, dirs: &mut Vec<String>) {
    let Some(package) = metadata.packages.iter().find(|p| *p.name == package) else {
        return;
    };
    let Some(dir) = package.manifest_path.parent() else {
        return;
    };
    let dir = dir.strip_prefix(root).unwrap_or(dir).to_string();
    if dirs.contains(&dir) {
        return;
    }
    dirs.push(dir);
    for dependency in &package.dependencies {
        if dependency.path.is_some() {
            collect(metadata, root, &dependency.name, dirs);
        }
    }
}

/// `MODE SHA-256` of a file or link; `None` where there is none (any more).
pub fn describe(path: &Path) -> Result<Option<String>> {
    Ok(examine(path)?.map(|(content, _)| content))
}

fn examine(path: &Path) -> Result<Option<(String, i128)>> {
    let context = || format!("reading {}", path.display());
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => {
            return Ok(None);
        }
        Err(error) => return Err(error).with_context(context),
    };
    let (mode, content) = if metadata.is_symlink() {
        let target = fs::read_link(path).with_context(context)?;
        ("120000", target.into_os_string().into_encoded_bytes())
    } else if metadata.is_dir() {
        // A repository within the repository; its content is not ours.
        return Ok(None);
    } else if metadata.permissions().mode() & 0o111 != 0 {
        ("100755", fs::read(path).with_context(context)?)
    } else {
        ("100644", fs::read(path).with_context(context)?)
    };
    let changed = i128::from(metadata.ctime()) * 1_000_000_000 + i128::from(metadata.ctime_nsec());
    Ok(Some((
        format!("{mode} {}", files::sha256(&content)),
        changed,
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_keep_to_their_directories() {
        let inputs = |pattern: &str| Inputs {
            reads: vec![pattern.to_owned()],
            ..Inputs::default()
        };
        let cases = [
            ("*.toml", "Cargo.toml", true),
            ("*.toml", "xtask/Cargo.toml", false),
            ("**/*.rs", "xtask/src/main.rs", true),
            ("**/*.rs", "build.rs", true),
            (".github/**", ".github/workflows/ci.yml", true),
            ("service/**", "service/src/lib.rs", true),
            ("service/**", "services/src/lib.rs", false),
        ];
        for (pattern, path, fits) in cases {
            let patterns = Patterns::of(&inputs(pattern), &Packages::default()).unwrap();
            assert_eq!(patterns.match_(path), fits, "{pattern} {path}");
        }
    }

    #[test]
    fn a_package_is_made_from_those_it_depends_on() {
        let root = cargo::root().unwrap();
        let packages = Packages::read(&root).unwrap();
        let service = packages.patterns("service").unwrap();
        assert!(service.contains(&"service/**".to_owned()), "{service:?}");
        assert!(!service.contains(&"xtask/**".to_owned()), "{service:?}");
        assert!(packages.patterns("servce").is_err());
    }
}
