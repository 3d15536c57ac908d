//! The process: configuration first, then storage, then ports, then signals.

use std::process::ExitCode;

use service::app::App;
use service::config::Config;
use service::{server, telemetry};

/// Exit code for a configuration that cannot be used (`EX_CONFIG` of sysexits.h).
const BAD_CONFIG: u8 = 78;

fn main() -> ExitCode {
    let config = match Config::load() {
        Ok(config) => config,
        Err(error) => {
            telemetry::fatal(&format!("cannot start: {error}"));
            return ExitCode::from(BAD_CONFIG);
        }
    };
    match run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            telemetry::fatal(&format!("stopped: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn run(config: Config) -> anyhow::Result<()> {
    telemetry::logs(&config.logging)?;
    let metrics = telemetry::metrics()?;
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?
        .block_on(async {
            let app = App::open(config, metrics).await?;
            let sockets = server::Sockets::bind(&app.config.server)?;
            server::serve(app, sockets, server::terminated()).await
        })
}
