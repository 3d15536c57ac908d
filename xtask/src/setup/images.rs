//! Images of the servers that tests use: what a registry has, or, where none can be reached, ones
//! that are put together here from the distribution's packages and Maven's.

mod layer;
mod recipe;

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result};
use xshell::{Shell, cmd};

use super::tools::{Image, Tools};
use crate::cargo;
use crate::files;
use crate::output::Output;
use recipe::RECIPE;

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

/// The image that a server is started from: the ordinary one where it is there.
pub fn of(tools: &Tools, server: &str) -> Result<String> {
    let shell = cargo::shell()?;
    let image = tools.images().get(server);
    let image = image.with_context(|| format!("config/tools.toml names no image for {server}"))?;
    Ok(match is_there(&shell, &image.ordinary) {
        true => image.ordinary.clone(),
        false => image.offline.clone(),
    })
}

/// What tests are going to use, for reports: `postgres:17-alpine`, or the offline one.
pub fn in_use(tools: &Tools) -> Result<Vec<String>> {
    let shell = cargo::shell()?;
    let images = tools.images().values();
    let recipe = recipe::hash();
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
        recipe::build(tools, &shell, output)?;
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
    inspect(shell, image, &format).is_some_and(|made_by| made_by == recipe::hash())
}

fn inspect(shell: &Shell, image: &str, format: &str) -> Option<String> {
    cmd!(shell, "docker image inspect --format {format} {image}")
        .quiet()
        .ignore_stderr()
        .read()
        .ok()
}
