//! Reads a YAML file with its variables and overrides, checks it, and returns a [`Config`].

use super::effective::{self, Secrets};
use super::fault::{Fault, Faults, Findings};
use super::setting::{Section, Setting};
use super::top::TOP;
use super::{Config, EffectiveConfig, Environment};
use super::{environments, listeners, models, overrides, store, telemetry, upstreams, variables, yaml};
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;

/// Maximum size of a config file in bytes.
const MAX_FILE_BYTES: usize = 4 << 20;

/// A valid configuration and its warnings.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// The settings.
    pub config: Config,
    /// Settings that are allowed but probably not intended.
    pub warnings: Vec<Fault>,
}

/// Reads a file. Variables and overrides come from the environment of the process.
///
/// # Errors
/// Returns all faults of the file at once.
pub(crate) fn load(path: &Path) -> Result<Loaded, Faults> {
    let name = path.display().to_string();
    // Before the file is read, so that a later change has another time.
    let file_modified_ms = modified_ms(path);
    let text = read_text(path).map_err(|message| Faults::of_file(&name, message))?;
    let unicode = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        Some((name.into_string().ok()?, value.to_string_lossy().into_owned()))
    };
    let variables = std::env::vars_os().filter_map(unicode);
    let overrides: Vec<_> = variables.filter(|(name, _)| name.starts_with(overrides::PREFIX)).collect();
    let mut loaded = parse(&text, &name, &|variable| std::env::var(variable).ok(), &overrides)?;
    loaded.config.file_modified_ms = file_modified_ms;
    loaded.config.file = Some(path.to_owned());
    Ok(loaded)
}

/// When the file was last modified, in milliseconds since the Unix epoch.
pub(crate) fn modified_ms(path: &Path) -> u64 {
    let modified = std::fs::metadata(path).and_then(|file| file.modified()).ok();
    let since = modified.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok()).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn read_text(path: &Path) -> Result<String, String> {
    if path.is_dir() {
        return Err("this is a directory; name the config file in it".to_owned());
    }
    let mut bytes = Vec::new();
    // One byte more than the limit, so that `parse` can detect a larger file.
    let max = MAX_FILE_BYTES as u64 + 1;
    let read = std::fs::File::open(path).and_then(|file| file.take(max).read_to_end(&mut bytes));
    read.map_err(|error| format!("the file cannot be read: {error}"))?;
    String::from_utf8(bytes).map_err(|error| {
        let valid = String::from_utf8_lossy(&error.as_bytes()[..error.utf8_error().valid_up_to()]);
        format!("the file is not UTF-8 (line {}); save it as UTF-8", 1 + valid.matches('\n').count())
    })
}

/// Reads a config from its text. `name` is the file name for messages. `environment` returns the value of a variable
/// that the text mentions. Each override is the name of a variable that begins with `TOLLGATE__`, and its value.
///
/// # Errors
/// Returns all faults of the config at once.
pub fn parse(
    text: &str,
    name: &str,
    environment: &dyn Fn(&str) -> Option<String>,
    overrides: &[(String, String)],
) -> Result<Loaded, Faults> {
    if text.len() > MAX_FILE_BYTES {
        return Err(Faults::of_file(name, format!("the config is larger than {} MiB", MAX_FILE_BYTES >> 20)));
    }
    let findings = Findings::new(name);
    let config = yaml::parse(text, &findings).and_then(|mut root| {
        // Overrides come first: an overridden setting may mention a variable that is not set.
        let mut overrides: Vec<_> = overrides.iter().collect();
        overrides.sort();
        for (variable, value) in overrides {
            overrides::apply(&mut root, variable, value, &findings);
        }
        variables::fill_in(&mut root, environment, &findings);
        let config = read(&Setting { node: &root, path: String::new(), findings: &findings });
        let effective = effective::of(&root, Secrets::Masked);
        config.map(|config| Config { named_files: findings.named_files(), effective, ..config })
    });
    let warnings = findings.into_warnings()?;
    // There is a config if there is no fault. This error is only a safeguard.
    let config = config.ok_or_else(|| Faults::of_file(name, "the config cannot be read".to_owned()))?;
    Ok(Loaded { config, warnings })
}

fn read(root: &Setting<'_>) -> Option<Config> {
    let top = root.section(&TOP)?;
    let (server, admin) = listeners::read(&top);
    let upstreams = upstreams::read(&top);
    let environments = environments::read(&top, &upstreams);
    let default_environment = default_environment(&top, &environments);
    let models = models::read(&top);
    let store = store::read(&top);
    let telemetry = telemetry::read(&top);
    let file_modified_ms = 0;
    Some(Config {
        server,
        admin,
        upstreams,
        environments,
        default_environment,
        models,
        store,
        telemetry,
        file_modified_ms,
        file: None,
        named_files: Vec::new(),
        effective: EffectiveConfig::default(),
    })
}

/// The index of the environment that `default_environment` names. The name is compared with all environments of the
/// file, also with those that have faults.
fn default_environment(top: &Section<'_>, environments: &[Arc<Environment>]) -> Option<usize> {
    let setting = top.get("default_environment")?;
    let section = top.get("environments").and_then(|setting| setting.as_map());
    let names = section.map_or(Vec::new(), |section| section.names());
    let name = names[setting.index_of_name("environment", &names)?];
    environments.iter().position(|environment| environment.name == name)
}
