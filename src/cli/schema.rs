//! `tollgate schema`: prints the JSON Schema of the config, or the reference of its keys.

use super::output;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct SchemaArguments {
    /// json: a JSON Schema, for editors. markdown: the reference of all keys, for people
    #[arg(long, value_enum, default_value_t = Format::Json)]
    format: Format,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum Format {
    Json,
    Markdown,
}

pub(super) fn run(arguments: &SchemaArguments) -> anyhow::Result<ExitCode> {
    match arguments.format {
        Format::Json => output::print(&format!("{:#}\n", crate::config::schema()))?,
        Format::Markdown => output::print(&crate::config::reference())?,
    }
    Ok(ExitCode::SUCCESS)
}
