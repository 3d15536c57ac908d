//! `cargo xtask image`: the service as an OCI image, made without a container engine.
//!
//! The same source gives the same digest: the build maps away directory names, the layer has
//! fixed times and owners, and the compressor is pinned by `Cargo.lock`.

mod archive;
mod build;
pub mod layer;
pub mod layout;
mod load;
#[cfg(feature = "registry")]
mod push;

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context, Result};

use crate::cli::{Cli, ImageArgs};
use crate::config::Pipeline;
use crate::output::{Finished, Output, seconds};
use crate::release::{Recorded, Release, Store};
pub use build::Ahead;
use layout::{ImageConfig, Layout};

pub fn run(args: &ImageArgs, cli: &Cli, output: &Output) -> Result<Finished> {
    let pipeline = Pipeline::load(&cli.pipeline)?;
    // What is wrong with the target is found before the long build.
    let target = args
        .load
        .as_ref()
        .map(|environment| load::Target::of(&pipeline, environment))
        .transpose()?;
    #[cfg(feature = "registry")]
    let registry = args
        .push
        .as_ref()
        .map(|reference| push::Target::parse(reference, args.plain_http))
        .transpose()?;
    let Made { recorded, binary } = make(&pipeline, args, output)?;
    #[cfg(feature = "registry")]
    if let Some(registry) = registry {
        registry.push(&pipeline, &recorded.release.image, output)?;
    }
    if let Some(target) = target {
        target.load(&pipeline, &recorded.release.image, output)?;
    }
    output.detail("next: cargo xtask deploy-staging");
    Ok(Finished::passed()
        .with("release", &recorded.id)
        .with("image", &recorded.release.image)
        .with("version", &recorded.release.version)
        .with("binary", binary))
}

struct Made {
    recorded: Recorded,
    /// The executable that is in its image.
    binary: PathBuf,
}

/// Builds the service (or takes `args.binary`), assembles its image and records the release.
fn make(pipeline: &Pipeline, args: &ImageArgs, output: &Output) -> Result<Made> {
    let service = &pipeline.service;
    let config_dir = args
        .config
        .clone()
        .unwrap_or_else(|| pipeline.root.join(&service.config_dir));
    let manifests = pipeline.manifests_dir();
    // Everything that can be wrong with the arguments is found before the long build.
    let probe = Release::compose(
        String::new(),
        semver::Version::new(0, 0, 0),
        &config_dir,
        manifests.as_deref(),
        &pipeline.root.join(&service.migrations_dir),
    )?;
    let source = build::Source::describe(&service.package)?;
    let version = args
        .version
        .clone()
        .unwrap_or_else(|| source.version.clone());
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        None => build::binary(service, &source, &args.profile, output)?,
    };

    let started = Instant::now();
    let content =
        std::fs::read(&binary).with_context(|| format!("reading {}", binary.display()))?;
    let layout = Layout::open(pipeline.state_dir().join("images"))?;
    let path = format!("app/{}", service.binary);
    let layer = layout.layer(&layer::Entry {
        path: &path,
        content: &content,
    })?;
    let image = layout.image(
        &layer,
        &ImageConfig {
            entrypoint: [vec![format!("/{path}")], service.arguments.clone()].concat(),
            variables: vec![
                format!("IMAGE_VERSION={version}"),
                format!("IMAGE_REVISION={}", source.revision),
            ],
            version: version.to_string(),
            revision: source.revision,
            created: source.date,
        },
    )?;
    output.good(format_args!(
        "image {image} ({:.1} MB, assembled in {})",
        layer.size as f64 / 1e6,
        seconds(started.elapsed())
    ));
    let store = Store::open(pipeline);
    let recorded = store.keep(Release {
        image,
        version,
        ..probe
    })?;
    let twin = store
        .all()?
        .into_iter()
        .find(|other| other.release.version == recorded.release.version && other.id != recorded.id);
    if let Some(twin) = twin {
        output.warn(format_args!(
            "{twin} has the same version; by its version only the newer one is found"
        ));
    }
    output.good(format_args!("release {recorded}"));
    output.event("release", &recorded);
    Ok(Made { recorded, binary })
}
