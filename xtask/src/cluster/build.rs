//! The cluster's programs, built once from Go modules and kept in the user's cache by the hash of
//! their module's files.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use xshell::{Shell, cmd};

use super::schemas;
use crate::cargo;
use crate::cli::Supported;
use crate::files;
use crate::output::{Output, seconds};
use crate::setup;
use crate::setup::tools::Tools;

/// A program and the module, a directory beside this file, that pins what it is built from.
struct Module {
    name: &'static str,
    /// What is built; the module's own directory unless it is another module's command.
    package: &'static str,
    /// Files of modules that come along: the module, where they are in it, and as what.
    files: &'static [(&'static str, &'static str, &'static str)],
    /// Files of modules in whose place ones of ours are compiled, or none.
    replaced: &'static [Replaced],
    /// Whether the API server alone needs it, or what comes along.
    is_of_api: bool,
}

/// A file that is compiled in another's place: the module, where it is in it, and ours.
type Replaced = (&'static str, &'static str, Option<&'static str>);

/// The largest first: its build fills both cores for minutes.
const MODULES: [Module; 5] = [
    Module {
        name: "kubernetes",
        package: ".",
        files: &[],
        replaced: &[],
        is_of_api: true,
    },
    Module {
        name: "contour",
        package: "github.com/projectcontour/contour/cmd/contour",
        files: &[
            (
                "sigs.k8s.io/gateway-api",
                "config/crd/standard",
                "gateway-api",
            ),
            (
                "github.com/projectcontour/contour",
                "examples/contour/01-crds.yaml",
                "contour.yaml",
            ),
        ],
        replaced: &[],
        is_of_api: true,
    },
    own("coredns"),
    own("policies"),
    own("pause"),
];

/// What only tests need: another implementation of the Gateway API, and what other versions of Kubernetes
/// say of manifests: their API servers, and a reader with their schemas.
const FOR_TESTS: [Module; 4] = [
    TRAEFIK,
    KUBECONFORM,
    own("apiserver-oldest"),
    own("apiserver-newest"),
];

/// A program of the module's own, and nothing else.
const fn own(name: &'static str) -> Module {
    Module {
        name,
        package: ".",
        files: &[],
        replaced: &[],
        is_of_api: false,
    }
}

const KUBECONFORM: Module = Module {
    name: "kubeconform",
    package: "github.com/yannh/kubeconform/cmd/kubeconform",
    files: &[],
    replaced: &[],
    is_of_api: false,
};

const TRAEFIK: Module = Module {
    name: "traefik",
    package: "github.com/traefik/traefik/v3/cmd/traefik",
    files: &[(
        "sigs.k8s.io/gateway-api",
        "config/crd/standard",
        "gateway-api",
    )],
    // Clouds' clients are half of what would be compiled.
    replaced: &[
        (
            "github.com/go-acme/lego/v4",
            "providers/dns/zz_gen_dns_providers.go",
            Some("dns/providers.go"),
        ),
        (
            TRAEFIK_SOURCES,
            "pkg/provider/ecs/ecs.go",
            Some("ecs/ecs.go"),
        ),
        (TRAEFIK_SOURCES, "pkg/provider/ecs/config.go", None),
        (TRAEFIK_SOURCES, "pkg/provider/ecs/label.go", None),
    ],
    is_of_api: false,
};

const TRAEFIK_SOURCES: &str = "github.com/traefik/traefik/v3";

/// What the API server is made of: files that modules' builds have left.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Programs {
    pub kubernetes: PathBuf,
    /// Of another version of Kubernetes, where one was asked for.
    #[serde(default)]
    api_server: Option<PathBuf>,
    /// Definitions of the gateway's resources.
    pub definitions: Vec<PathBuf>,
}

/// What a node needs more.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodePrograms {
    pub coredns: PathBuf,
    pub contour: PathBuf,
    pub envoy: PathBuf,
    /// Where it has been built.
    pub traefik: Option<PathBuf>,
    pub policies: PathBuf,
    pub pause: PathBuf,
}

impl Programs {
    pub fn built() -> Result<Self> {
        Self::with(None)
    }

    /// Those for an API server of a version of Kubernetes, the cluster's own unless another is named.
    pub fn with(supported: Option<Supported>) -> Result<Self> {
        let contour = home("contour")?;
        // Traefik wants the newer ones, and Contour does not mind.
        let newest = match TRAEFIK.is_built() {
            true => home(TRAEFIK.name)?,
            false => contour.clone(),
        };
        let newest = newest.join("gateway-api");
        let mut definitions: Vec<PathBuf> = fs::read_dir(newest)
            .context("the cluster's programs are missing; `cargo xtask cluster up` builds them")?
            .flatten()
            .map(|entry| entry.path())
            // A list of what is in the others.
            .filter(|path| !path.ends_with("kustomization.yaml"))
            .collect();
        definitions.sort();
        definitions.push(contour.join("contour.yaml"));
        Ok(Self {
            kubernetes: program("kubernetes")?,
            api_server: supported.map(|it| program(it.module())).transpose()?,
            definitions,
        })
    }

    pub fn api_server(&self) -> &Path {
        self.api_server.as_deref().unwrap_or(&self.kubernetes)
    }

    /// By the module that it was built from.
    pub fn api_server_name(&self) -> String {
        let name = self.api_server().file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }
}

impl Supported {
    fn module(self) -> &'static str {
        match self {
            Self::Oldest => "apiserver-oldest",
            Self::Newest => "apiserver-newest",
        }
    }
}

impl NodePrograms {
    pub fn built() -> Result<Self> {
        let traefik = TRAEFIK.is_built().then(|| program(TRAEFIK.name));
        Ok(Self {
            coredns: program("coredns")?,
            contour: program("contour")?,
            envoy: Tools::open()?.program("envoy")?,
            traefik: traefik.transpose()?,
            policies: program("policies")?,
            pause: program("pause")?,
        })
    }
}

impl Module {
    fn is_built(&self) -> bool {
        program(self.name).is_ok_and(|program| program.is_file())
    }

    /// The version that is built, by the hash of its files.
    fn version(&self) -> String {
        format!("{} {}", self.name, hash(self.name).unwrap_or_default())
    }
}

/// Those that are not built.
fn unbuilt(modules: &'static [Module]) -> impl Iterator<Item = &'static Module> {
    modules.iter().filter(|module| !module.is_built())
}

/// What is not built, for people.
pub fn missing() -> Vec<&'static str> {
    unbuilt(&MODULES).map(|module| module.name).collect()
}

/// The versions that are built, by the modules' hashes.
pub fn version() -> String {
    let versions: Vec<String> = MODULES.iter().map(Module::version).collect();
    versions.join(", ")
}

/// What only tests need and is not built, for people.
pub fn missing_for_tests() -> Vec<&'static str> {
    unbuilt(&FOR_TESTS).map(|module| module.name).collect()
}

/// The versions of what only tests need, where all of it is built.
pub fn for_tests() -> Option<String> {
    FOR_TESTS.iter().all(Module::is_built).then(|| {
        let versions: Vec<String> = FOR_TESTS.iter().map(Module::version).collect();
        versions.join(", ")
    })
}

/// Where kubeconform is once it is built, its schemas beside it.
pub fn kubeconform() -> Result<PathBuf> {
    program(KUBECONFORM.name)
}

/// Builds what is not there.
pub fn ensure(output: &Output) -> Result<()> {
    let tools = Tools::open()?;
    tools.install("envoy", output)?;
    for module in unbuilt(&MODULES) {
        ensure_module(module, output)?;
    }
    Ok(())
}

/// Builds what the API server alone needs and is not there.
pub fn ensure_api(supported: Option<Supported>, output: &Output) -> Result<()> {
    let of_version = |module: &Module| supported.is_some_and(|it| it.module() == module.name);
    let needed = unbuilt(&MODULES).filter(|module| module.is_of_api);
    for module in needed.chain(unbuilt(&FOR_TESTS).filter(|module| of_version(module))) {
        ensure_module(module, output)?;
    }
    Ok(())
}

/// Builds what reads manifests, which takes seconds.
pub fn ensure_kubeconform(output: &Output) -> Result<()> {
    match KUBECONFORM.is_built() {
        true => Ok(()),
        false => ensure_module(&KUBECONFORM, output),
    }
}

/// Builds what only tests need and is not there.
pub fn ensure_for_tests(output: &Output) -> Result<()> {
    for module in unbuilt(&FOR_TESTS) {
        ensure_module(module, output)?;
    }
    Ok(())
}

fn ensure_module(module: &Module, output: &Output) -> Result<()> {
    let tools = Tools::open()?;
    tools.install("go", output)?;
    let began = Instant::now();
    output.detail(format_args!(
        "building {} from Go modules, once for this machine{}",
        module.name,
        match module.name {
            "kubernetes" => "; on two cores it takes some ten minutes",
            "traefik" => "; on two cores it takes some three minutes",
            name if is_api_server(name) => "; on two cores it takes some four minutes",
            _ => "",
        }
    ));
    build(module, &tools.program("go")?, output)
        .with_context(|| format!("building {} for the cluster", module.name))?;
    let taken = seconds(began.elapsed());
    output.detail(format_args!("{} is built after {taken}", module.name));
    Ok(())
}

/// Whole or not at all: built beside its place, then renamed.
fn build(module: &Module, go: &Path, output: &Output) -> Result<()> {
    let home = home(module.name)?;
    let building = home.with_extension(format!("new-{}", std::process::id()));
    fs::create_dir_all(&building).with_context(|| format!("creating {}", building.display()))?;
    let built = build_in(module, go, &building, output);
    if built.is_ok() {
        let _ = fs::remove_dir_all(&home);
        fs::rename(&building, &home).with_context(|| format!("creating {}", home.display()))?;
        remove_old(module, &home);
    } else {
        let _ = fs::remove_dir_all(&building);
    }
    built
}

fn build_in(module: &Module, go: &Path, dir: &Path, output: &Output) -> Result<()> {
    let sources = sources(module.name)?;
    let shell = cargo::shell()?;
    shell.change_dir(&sources);
    for (name, value) in [
        ("CGO_ENABLED", "0"),
        ("GOFLAGS", "-mod=readonly -trimpath -buildvcs=false"),
        // What is installed, and no other version from elsewhere.
        ("GOTOOLCHAIN", "local"),
        ("GOWORK", "off"),
    ] {
        shell.set_var(name, value);
    }
    let program = dir.join(module.name);
    let (package, flags) = (module.package, link_flags(module.name, &sources)?);
    let compiled = compile_flags(module.name);
    let mut build = cmd!(
        shell,
        "{go} build -gcflags {compiled} -ldflags {flags} -o {program}"
    );
    let replaced = dir.join("replaced");
    if !module.replaced.is_empty() {
        let modfile = replace(module, &shell, go, &sources, &replaced)?;
        build = build.arg("-modfile").arg(modfile);
    }
    let build = build.arg(package);
    output.command(&build);
    build.quiet().run()?;
    let _ = fs::remove_dir_all(replaced);
    for (module, from, to) in module.files {
        copy(&module_dir(&shell, go, module)?.join(from), &dir.join(to))?;
    }
    if module.name == KUBECONFORM.name {
        schemas::write(&shell, go, &sources, &dir.join("schemas"))?;
    }
    Ok(())
}

/// Copies of the modules of which some files are ours, in `dir`, and a go.mod that names them: Go
/// compiles its own cache only as it is. <https://go.dev/ref/mod#go-mod-file-replace>
fn replace(
    module: &Module,
    shell: &Shell,
    go: &Path,
    sources: &Path,
    dir: &Path,
) -> Result<PathBuf> {
    let mut pins = fs::read_to_string(sources.join("go.mod")).context("reading go.mod")?;
    for (name, file, ours) in module.replaced {
        let copied = dir.join(name);
        if !copied.is_dir() {
            copy(&module_dir(shell, go, name)?, &copied)?;
            writeln!(pins, "replace {name} => {}", copied.display())?;
        }
        let theirs = copied.join(file);
        fs::remove_file(&theirs).with_context(|| {
            format!("{name} has no {file} any more, in whose place ours is compiled")
        })?;
        if let Some(ours) = ours {
            copy(&sources.join(ours), &theirs)?;
        }
    }
    let modfile = dir.join("go.mod");
    files::replace(&modfile, pins.as_bytes())?;
    copy(&sources.join("go.sum"), &dir.join("go.sum"))?;
    Ok(modfile)
}

/// Where a module's files are, once it has been downloaded.
fn module_dir(shell: &Shell, go: &Path, module: &str) -> Result<PathBuf> {
    let format = "{{.Dir}}";
    cmd!(shell, "{go} mod download {module}").quiet().run()?;
    let found = cmd!(shell, "{go} list -m -f {format} {module}")
        .quiet()
        .read()?;
    Ok(found.trim().into())
}

/// What debuggers read is stripped in the end, and need not be made. An API server for tests answers for a
/// minute: a quick build of it is worth more than a quick program.
fn compile_flags(module: &str) -> &'static str {
    match is_api_server(module) {
        true => "all=-dwarf=0 -N -l",
        false => "all=-dwarf=0",
    }
}

/// Whether it is an API server alone, of another version than the cluster's.
fn is_api_server(module: &str) -> bool {
    module.starts_with("apiserver-")
}

/// Without a version Kubernetes' parts take themselves for v0.0.0, and decide by it.
fn link_flags(module: &str, sources: &Path) -> Result<String> {
    let mut flags = "-s -w".to_owned();
    if module != "kubernetes" && !is_api_server(module) {
        return Ok(flags);
    }
    let pins = fs::read_to_string(sources.join("go.mod")).context("reading go.mod")?;
    let version = pins
        .lines()
        .find_map(|line| {
            let line = line.trim().trim_start_matches("require ");
            line.strip_prefix("k8s.io/kubernetes ")
        })
        .context("go.mod names no k8s.io/kubernetes")?;
    let parsed = semver::Version::parse(version.trim_start_matches('v'))
        .with_context(|| format!("in go.mod: {version}"))?;
    for package in [
        "k8s.io/component-base/version",
        "k8s.io/client-go/pkg/version",
    ] {
        let set = |name: &str, value: &str| format!(" -X {package}.{name}={value}");
        flags += &set("gitVersion", version);
        flags += &set("gitMajor", &parsed.major.to_string());
        flags += &set("gitMinor", &parsed.minor.to_string());
        flags += &set("gitTreeState", "clean");
    }
    Ok(flags)
}

/// A file or a directory of files; what is in Go's cache is read-only, and the copy is not.
fn copy(from: &Path, to: &Path) -> Result<()> {
    if !from.is_dir() {
        let content = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        return files::replace(to, &content);
    }
    for entry in fs::read_dir(from).with_context(|| format!("reading {}", from.display()))? {
        let entry = entry.with_context(|| format!("reading {}", from.display()))?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    Ok(())
}

/// What older files of the module were built into is of no use any more.
fn remove_old(module: &Module, home: &Path) {
    let entries = home.parent().map(fs::read_dir);
    for entry in entries.into_iter().flatten().flatten().flatten() {
        let name = entry.file_name();
        let is_old = name
            .to_string_lossy()
            .strip_prefix(module.name)
            .is_some_and(|rest| rest.starts_with('-'));
        if is_old && entry.path() != home {
            // A cluster may still run from it; its files live on until it ends.
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

fn program(module: &str) -> Result<PathBuf> {
    Ok(home(module)?.join(module))
}

fn home(module: &str) -> Result<PathBuf> {
    let name = format!("{module}-{}", hash(module)?);
    Ok(setup::cache_dir()?.join("cluster").join(name))
}

/// Of the module's files: the first digits of a SHA-256 over names and contents.
fn hash(module: &str) -> Result<String> {
    let dir = sources(module)?;
    let reading = || format!("reading {}", dir.display());
    let mut paths = files::below(&dir).with_context(reading)?;
    paths.sort();
    let mut all = Vec::new();
    for path in paths {
        let content = fs::read(&path).with_context(|| format!("reading {}", path.display()))?;
        let name = path.strip_prefix(&dir).unwrap_or(&path);
        all.extend(name.as_os_str().as_encoded_bytes());
        all.extend(files::sha256(&content).into_bytes());
    }
    Ok(files::sha256(&all)[..12].to_owned())
}

fn sources(module: &str) -> Result<PathBuf> {
    let dir = cargo::root()?.join("xtask/src/cluster/go").join(module);
    if !dir.is_dir() {
        bail!(
            "{} is missing: it says what the cluster is built from",
            dir.display()
        );
    }
    Ok(dir)
}
