//! `tollgate man`: manual pages of all commands.

use super::output;
use anyhow::Context as _;
use clap::Command;
use clap_mangen::Man;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct ManArguments {
    /// Folder that gets one page for each command [default: the main page goes to standard output]
    #[arg(value_name = "DIR")]
    folder: Option<PathBuf>,
}

/// The content of a page besides the options of its command.
struct PageNotes {
    /// The name of the command; empty for the main page.
    command: &'static str,
    /// Commands to copy, each with its effect.
    examples: &'static [(&'static str, &'static str)],
    /// Files that the command uses, besides those that it names itself.
    files: &'static [(&'static str, &'static str)],
    /// Environment variables, besides those that the config mentions.
    variables: &'static [(&'static str, &'static str)],
}

const CONFIG_FILE: (&str, &str) =
    ("config/tollgate.yaml", "The config, unless --config or TOLLGATE_CONFIG names another.");
const STORE_FILE: (&str, &str) =
    ("data/tollgate.db", "The store: counters and usage. Its path is store.path of the config.");
const CONFIG_VARIABLE: (&str, &str) = ("TOLLGATE_CONFIG", "Path of the config file, if --config is absent.");
const OVERRIDES: (&str, &str) = (
    "TOLLGATE__A__B",
    "Overrides the setting a.b of the config, for example TOLLGATE__SERVER__LISTEN=0.0.0.0:8080.",
);
const LOG_VARIABLE: (&str, &str) = ("RUST_LOG", "Selects the log lines that are written. Default: info.");
const CERTIFICATES: (&str, &str) =
    ("SSL_CERT_FILE", "PEM file of the authorities that are trusted instead of those of the system.");

const EXIT_STATUS: &[(&str, &str)] = &[
    ("0", "Success."),
    ("1", "The command failed while running."),
    ("2", "The command line or the config is wrong, or a check of servers found a fault."),
];

const PAGES: &[PageNotes] = &[
    PageNotes {
        command: "",
        examples: &[
            ("tollgate demo", "Try the gateway with a simulated backend"),
            ("tollgate init", "Write a config to start from"),
            ("tollgate serve --config config/tollgate.yaml", "Run the gateway"),
        ],
        files: &[CONFIG_FILE, STORE_FILE],
        variables: &[CONFIG_VARIABLE, OVERRIDES, LOG_VARIABLE, CERTIFICATES],
    },
    PageNotes {
        command: "serve",
        examples: &[
            ("tollgate serve --config /etc/tollgate.yaml", "Run the gateway"),
            ("kill -HUP PID", "Reload the config of a running gateway"),
            ("kill -TERM PID", "Stop a gateway after its requests in flight"),
            ("kill -USR2 PID", "Replace a gateway by the installed version, without a gap"),
        ],
        files: &[CONFIG_FILE, STORE_FILE],
        variables: &[CONFIG_VARIABLE, OVERRIDES, LOG_VARIABLE, CERTIFICATES],
    },
    PageNotes {
        command: "demo",
        examples: &[("tollgate demo", "Run a gateway, and print requests to try")],
        files: &[],
        variables: &[LOG_VARIABLE],
    },
    PageNotes {
        command: "check",
        examples: &[
            ("tollgate check --config new.yaml", "Report all faults of a config"),
            ("tollgate check --print", "Print the effective config"),
            ("tollgate check --online", "Also try the upstreams and Redis"),
        ],
        files: &[CONFIG_FILE],
        variables: &[CONFIG_VARIABLE, OVERRIDES, CERTIFICATES],
    },
    PageNotes {
        command: "schema",
        examples: &[
            (
                "tollgate schema > config/tollgate.schema.json",
                "Write the schema next to the config. Editors find it if the first line of the config is: # yaml-language-server: $schema=tollgate.schema.json",
            ),
            ("tollgate schema --format markdown | less", "Read the reference of all keys"),
        ],
        files: &[],
        variables: &[],
    },
    PageNotes {
        command: "count",
        examples: &[
            ("tollgate count request.json --explain", "Explain the estimate of a request body"),
            ("tollgate count --jsonl < bodies.jsonl", "Estimate many bodies, one a line"),
        ],
        files: &[],
        variables: &[CONFIG_VARIABLE],
    },
    PageNotes {
        command: "simulate",
        examples: &[(
            "tollgate simulate --config config/tollgate.yaml --trace trace.csv",
            "Replay a trace through the quotas of the config",
        )],
        files: &[CONFIG_FILE],
        variables: &[CONFIG_VARIABLE, OVERRIDES],
    },
    PageNotes {
        command: "init",
        examples: &[(
            "tollgate init /etc/tollgate.yaml",
            "Write a config that accepts the key of one caller",
        )],
        files: &[CONFIG_FILE],
        variables: &[CONFIG_VARIABLE],
    },
    PageNotes {
        command: "new-key",
        examples: &[("tollgate new-key web-app", "Make a key, and the line for the config")],
        files: &[],
        variables: &[],
    },
    PageNotes {
        command: "hash-key",
        examples: &[("printf %s \"$KEY\" | tollgate hash-key", "Print the digest of a key for the config")],
        files: &[],
        variables: &[],
    },
    PageNotes {
        command: "usage",
        examples: &[
            ("tollgate usage --from 30d --group-by environment,model", "Print the usage of a month"),
            ("tollgate usage --format csv > usage.csv", "Export it"),
        ],
        files: &[CONFIG_FILE, STORE_FILE],
        variables: &[CONFIG_VARIABLE, OVERRIDES],
    },
    PageNotes {
        command: "backup",
        examples: &[("tollgate backup /backup/tollgate.db", "Copy the store of a running gateway")],
        files: &[CONFIG_FILE, STORE_FILE],
        variables: &[CONFIG_VARIABLE, OVERRIDES],
    },
    PageNotes {
        command: "health",
        examples: &[
            ("tollgate health", "Exit with 0 if the gateway of the config is ready"),
            ("tollgate health --live --address 127.0.0.1:9090", "Exit with 0 if the process runs"),
        ],
        files: &[CONFIG_FILE],
        variables: &[CONFIG_VARIABLE, OVERRIDES],
    },
    PageNotes {
        command: "completions",
        examples: &[(
            "tollgate completions bash > /etc/bash_completion.d/tollgate",
            "Install the completions of a shell",
        )],
        files: &[],
        variables: &[],
    },
    PageNotes {
        command: "man",
        examples: &[
            ("tollgate man | man -l -", "Show the main page"),
            ("tollgate man /usr/local/share/man/man1", "Install all pages"),
        ],
        files: &[],
        variables: &[],
    },
];

/// Writes the pages of `command`, the whole command line.
pub(super) fn run(command: Command, arguments: &ManArguments) -> anyhow::Result<ExitCode> {
    let pages = pages(command)?;
    match &arguments.folder {
        Some(folder) => {
            std::fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
            for (name, text) in &pages {
                write(&folder.join(name), text)?;
            }
            output::print(&format!("Wrote {} pages to {}.\n", pages.len(), folder.display()))?;
        }
        None => output::print(pages.first().map_or("", |(_, text)| text))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// The file name and the text of each page. The main page is the first.
fn pages(command: Command) -> anyhow::Result<Vec<(String, String)>> {
    let mut command = command.disable_help_subcommand(true);
    command.build();
    let others = command.get_subcommands().cloned().collect::<Vec<_>>();
    std::iter::once(command).chain(others).map(page).collect()
}

fn page(command: Command) -> anyhow::Result<(String, String)> {
    let notes = PAGES.iter().find(|page| match page.command {
        "" => command.get_name() == "tollgate",
        name => command.get_name() == name,
    });
    let has_subcommands = command.has_subcommands();
    let subcommands: Vec<String> =
        command.get_subcommands().map(|command| format!("tollgate-{}(1)", command.get_name())).collect();
    let man = Man::new(command).manual("Tollgate");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if has_subcommands {
        man.render_subcommands_section(&mut page)?;
    }
    let mut text = String::from_utf8(page)?;
    if let Some(notes) = notes {
        add_examples(notes.examples, &mut text);
        add_list("EXIT STATUS", EXIT_STATUS, &mut text);
        add_list("FILES", notes.files, &mut text);
        add_list("ENVIRONMENT", notes.variables, &mut text);
    }
    let others = if has_subcommands { subcommands.join(", ") } else { "tollgate(1)".to_owned() };
    let _ = writeln!(text, ".SH \"SEE ALSO\"\n{}", escape(&others));
    Ok((man.get_filename(), text))
}

fn add_examples(examples: &[(&str, &str)], text: &mut String) {
    // Writing to a string cannot fail.
    text.push_str(".SH EXAMPLES\n");
    for (command, effect) in examples {
        let (command, effect) = (escape(command), escape(effect));
        let _ = writeln!(text, ".PP\n{effect}:\n.PP\n.RS 4\n.nf\n{command}\n.fi\n.RE");
    }
}

fn add_list(title: &str, items: &[(&str, &str)], text: &mut String) {
    if items.is_empty() {
        return;
    }
    let _ = writeln!(text, ".SH \"{title}\"");
    for (name, meaning) in items {
        let _ = writeln!(text, ".TP\n\\fB{}\\fR\n{}", escape(name), escape(meaning));
    }
}

/// Text in the language of manual pages.
fn escape(text: &str) -> String {
    let text = text.replace('\\', "\\e").replace('-', "\\-");
    if text.starts_with(['.', '\'']) { format!("\\&{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn every_command_has_a_page_with_its_options_examples_and_exit_status() {
        let mut command = super::super::Arguments::command().disable_help_subcommand(true);
        command.build();
        let pages = pages(super::super::Arguments::command()).unwrap();
        assert_eq!(pages.len(), PAGES.len());
        assert_eq!(pages[0].0, "tollgate.1");
        for subcommand in command.get_subcommands() {
            let name = format!("tollgate-{}.1", subcommand.get_name());
            let (_, text) = pages.iter().find(|(file, _)| *file == name).unwrap();
            assert!(
                pages[0].1.contains(&escape(&format!("tollgate-{}(1)", subcommand.get_name()))),
                "{name}"
            );
            for section in ["NAME", "SYNOPSIS", "OPTIONS", "EXAMPLES", "EXIT STATUS"] {
                assert!(
                    text.contains(&format!(".SH {section}")) || text.contains(&format!(".SH \"{section}\"")),
                    "{name}: {section}"
                );
            }
            for argument in subcommand.get_arguments() {
                let long = argument.get_long().map(|long| escape(&format!("--{long}")));
                let value = || argument.get_value_names().unwrap().first().unwrap().to_string();
                let shown = long.unwrap_or_else(value);
                assert!(text.contains(&shown), "{name}: {shown}\n{text}");
            }
        }
    }
}
