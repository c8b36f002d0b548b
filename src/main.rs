//! Parses the command line and runs one subcommand.

use std::process::ExitCode;

use clap::Parser;
use shortkit_webhooks::cli::Cli;

fn main() -> ExitCode {
    Cli::parse().run()
}
