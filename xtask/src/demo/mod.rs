pub fn run(_: &crate::cli::DemoArgs, _: &crate::cli::Cli, _: &crate::output::Output) -> anyhow::Result<crate::output::Finished> { unimplemented!() }
