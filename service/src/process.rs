//! The process: the command line, configuration, storage, then ports and signals.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Runtime;

use crate::app::App;
use crate::audit::Verdict;
use crate::auth::{development, login};
use crate::cli::{Audit, Cli, Command};
use crate::config::{self, AuthMode, Config};
use crate::tls::{self, Certificates};
use crate::{server, telemetry, traces};

/// Exit code for a configuration that cannot be used (`EX_CONFIG` of sysexits.h).
const BAD_CONFIG: u8 = 78;

/// Does what the command line says, with what is configured.
pub fn main() -> ExitCode {
    let command = Cli::command();
    let config = match Config::load() {
        Ok(config) => config,
        Err(error) => {
            telemetry::tell(&format!("cannot start: {error}"));
            return ExitCode::from(BAD_CONFIG);
        }
    };
    match run(command, config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            telemetry::tell(&format!("stopped: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Each connection is an open file, and systems allow programs that do not ask for more some thousand.
fn allow_many_connections() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

fn run(command: Command, config: Config) -> anyhow::Result<()> {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    if let Some(workers) = config.server.workers {
        builder.worker_threads(workers.get());
    }
    let runtime = builder.enable_all().build()?;
    let done = carry_out(command, config, &runtime);
    // A thread that waits for a file's lock cannot be told to stop.
    runtime.shutdown_background();
    done
}

fn carry_out(command: Command, config: Config, runtime: &Runtime) -> anyhow::Result<()> {
    match command {
        Command::Serve => {
            runtime.block_on(async {
                let _log = telemetry::start(&config.logging)?;
                let spans = traces::start(&config.tracing)?;
                allow_many_connections();
                let app = App::open(config).await?;
                let sockets = server::Sockets::bind(&app.config)?;
                let served = server::serve(app, sockets, server::terminated()).await;
                // It waits for its own thread, which waits for this runtime.
                let sent = tokio::task::spawn_blocking(move || spans.shutdown()).await?;
                if let Err(error) = sent {
                    telemetry::tell(&format!("the last spans were not sent: {error}"));
                }
                served
            })
        }
        Command::Migrate => {
            let (before, after) = runtime.block_on(App::migrate(config))?;
            telemetry::tell(&match before {
                Some(before) if before == after => format!("the schema is version {after} already"),
                Some(before) => format!("the schema went from version {before} to {after}"),
                None => format!("the schema is new: version {after}"),
            });
            Ok(())
        }
        Command::Replay => {
            let (done, left) = runtime.block_on(App::replay(config))?;
            for letter in &left {
                let (id, consumer, error) = (letter.id, &letter.consumer, &letter.error);
                telemetry::tell(&format!("{consumer} still cannot act on {id}: {error}"));
            }
            telemetry::tell(&format!("{done} events acted on, {} left", left.len()));
            anyhow::ensure!(left.is_empty(), "some events are left");
            Ok(())
        }
        Command::RotateKeys => {
            let changed = runtime.block_on(App::rotate_keys(config))?;
            telemetry::tell(&format!("{changed} contacts were encrypted anew"));
            Ok(())
        }
        Command::Token {
            subject,
            roles,
            seconds,
        } => {
            anyhow::ensure!(
                config.auth.mode == AuthMode::Development,
                "tokens are signed here only with auth.mode = \"development\" \
                 (SERVICE_ENVIRONMENT=development)"
            );
            development::check(config::environment().as_deref())?;
            let token = development::token(&config.auth, &subject, &roles, seconds)?;
            std::io::stdout().write_all(format!("{token}\n").as_bytes())?;
            Ok(())
        }
        Command::Login { program } => {
            let open = |url: &str| telemetry::tell(&format!("open this in a browser: {url}"));
            let token = runtime.block_on(async {
                match program {
                    true => login::program(&config.auth).await,
                    false => login::person(&config.auth, open).await,
                }
            })?;
            std::io::stdout().write_all(format!("{token}\n").as_bytes())?;
            Ok(())
        }
        Command::Audit(Audit::Verify { anchor }) => {
            match runtime.block_on(App::verify_audit(config, anchor.as_deref()))? {
                Verdict::Whole { entries, last } => {
                    telemetry::tell(&format!("the audit log is whole: {entries} entries"));
                    std::io::stdout().write_all(format!("{last}\n").as_bytes())?;
                    Ok(())
                }
                Verdict::Broken { seq, why } => {
                    anyhow::bail!("the audit log is broken at entry {seq}: {why}")
                }
            }
        }
        Command::CheckConfig => {
            config.tls.as_ref().map(Certificates::open).transpose()?;
            for (key, ca) in [
                ("redis.ca", &config.redis.ca),
                ("rabbitmq.ca", &config.rabbitmq.ca),
                ("kafka.ca", &config.kafka.ca),
            ] {
                let Some(ca) = ca else { continue };
                let read = std::fs::read(ca).map_err(Into::into);
                let read = read.and_then(|pem| tls::roots(&pem));
                read.with_context(|| format!("{key} = {}", ca.display()))?;
            }
            if config.auth.mode == AuthMode::Development {
                development::check(config::environment().as_deref())?;
            }
            telemetry::tell(&format!("the configuration is good: {}", config.hash()));
            Ok(())
        }
    }
}
