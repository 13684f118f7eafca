//! Settings of the documented configuration that this version does not support yet.
//!
//! The gateway accepts them, so that a config file needs no change later, and warns that they have no effect.

use super::setting::Section;

/// A section, one of its settings, and what the gateway does instead.
const UNSUPPORTED: &[(&str, &str, &str)] = &[("server", "tls", "the gateway serves callers by plain HTTP")];

/// Warns about every setting that has no effect yet.
pub(super) fn warn_unsupported(top: &Section<'_>) {
    for (section, name, instead) in UNSUPPORTED {
        let section = top.get(section).and_then(|section| section.as_map());
        if let Some(setting) = section.and_then(|section| section.get(name)) {
            setting.warn(format!("this setting has no effect in this version: {instead}; remove it"));
        }
    }
}
