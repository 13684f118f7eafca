//! The documents name things that exist: files, sections, config keys.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// All documents, with their text.
fn documents() -> Vec<(PathBuf, String)> {
    let docs = fs::read_dir(root().join("docs")).unwrap().map(|entry| entry.unwrap().path());
    let is_document = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "md");
    let paths = [root().join("README.md"), root().join("CHANGELOG.md")].into_iter().chain(docs);
    let read = |path: PathBuf| {
        let text = fs::read_to_string(&path).unwrap();
        (path, text)
    };
    paths.filter(is_document).map(read).collect()
}

/// The anchor that a heading gets: lower case, dashes for spaces, no punctuation.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn every_link_leads_to_a_file_and_a_section() {
    let mut links = 0;
    for (path, text) in documents() {
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            links += 1;
            let (file, section) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { path.clone() } else { path.parent().unwrap().join(file) };
            // Pictures are not text.
            let Ok(bytes) = fs::read(&target) else { panic!("{path:?}: no file {link}") };
            let target = String::from_utf8_lossy(&bytes);
            let headings = target.lines().filter(|line| line.starts_with('#'));
            let anchors: BTreeSet<String> =
                headings.map(|line| anchor(line.trim_start_matches('#'))).collect();
            assert!(section.is_empty() || anchors.contains(section), "{path:?}: no section {link}");
        }
    }
    assert!(links > 30, "only {links} links were found");
}

#[test]
fn every_source_file_that_a_document_names_exists() {
    let mut files = 0;
    for (path, text) in documents() {
        for name in text.split('`').skip(1).step_by(2) {
            let is_source = Path::new(name).extension().is_some_and(|e| e == "rs" || e == "lua");
            let is_file = is_source || name.ends_with('/');
            let is_path =
                name.starts_with("src/") || name.starts_with("tests/") || name.starts_with("benches/");
            if is_file && is_path {
                files += 1;
                assert!(root().join(name).exists(), "{path:?}: there is no {name}");
            }
        }
    }
    assert!(files > 20, "only {files} files are named");
}

#[test]
fn every_key_of_the_example_configs_is_documented() {
    let reference = fs::read_to_string(root().join("docs/configuration.md")).unwrap();
    let mut keys = BTreeSet::new();
    for file in ["config/tollgate.yaml", "config/minimal.yaml"] {
        let text = fs::read_to_string(root().join(file)).unwrap();
        for line in text.lines() {
            let words = line.split('#').next().unwrap_or_default().split(['{', ',', ' ']);
            keys.extend(words.filter_map(|word| word.strip_suffix(':')).map(str::to_owned));
        }
    }
    let is_key = |key: &&String| !key.is_empty() && key.chars().all(|c| c.is_ascii_lowercase() || c == '_');
    let names_of_the_examples = ["openai", "production", "sandbox", "default", "local"];
    let keys: Vec<&String> =
        keys.iter().filter(is_key).filter(|key| !names_of_the_examples.contains(&key.as_str())).collect();
    assert!(keys.len() > 30, "only {} keys were found", keys.len());
    for key in keys {
        assert!(
            reference.contains(&format!("`{key}")) || reference.contains(&format!(".{key}")),
            "{key} is not documented"
        );
    }
}
