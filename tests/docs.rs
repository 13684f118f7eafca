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

/// All Rust files below a folder.
fn source_files(folder: &Path, into: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            source_files(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.push(path);
        }
    }
}

#[test]
fn every_threat_names_tests_that_exist() {
    let mut files = Vec::new();
    ["src", "tests"].iter().for_each(|folder| source_files(&root().join(folder), &mut files));
    let code: String = files.iter().map(|file| fs::read_to_string(file).unwrap()).collect();
    let text = fs::read_to_string(root().join("docs/security.md")).unwrap();
    let rows: Vec<&str> = text.lines().filter(|line| line.starts_with("| T")).collect();
    for (n, row) in rows.iter().enumerate() {
        assert!(row.starts_with(&format!("| T{} |", n + 1)), "{row}");
        let tests = row.trim_end_matches('|').rsplit('|').next().unwrap();
        let names: Vec<&str> = tests.split('`').skip(1).step_by(2).collect();
        assert!(!names.is_empty(), "{row}");
        for name in names {
            let exists = code.contains(&format!("fn {name}(")) || root().join(name).exists();
            assert!(exists, "there is no test {name}");
        }
    }
    assert_eq!(rows.len(), 32, "one row for each threat");
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

/// The codes of the table of errors below a heading of docs/errors.md, each with its status.
fn documented_codes(heading: &str) -> BTreeSet<(String, String)> {
    let document = fs::read_to_string(root().join("docs/errors.md")).unwrap();
    let section = document.split(&format!("\n## {heading}\n")).nth(1).unwrap();
    let table = section.split("\n\n").find(|part| part.trim_start().starts_with("| status")).unwrap();
    let header: Vec<&str> = table.trim_start().lines().next().unwrap().split('|').map(str::trim).collect();
    let column = header.iter().position(|name| *name == "`code`").unwrap();
    let mut codes = BTreeSet::new();
    for row in table.trim_start().lines().skip(2) {
        let cells: Vec<&str> = row.split('|').map(str::trim).collect();
        let names = cells[column].split(", ").map(|name| name.trim_matches('`').to_owned());
        codes.extend(names.map(|name| (cells[1].to_owned(), name)));
    }
    codes
}

/// All sources of a module: `src/NAME.rs`, and the files in `src/NAME/`.
fn sources(module: &str) -> String {
    fn add(path: &Path, text: &mut String) {
        if path.is_dir() {
            fs::read_dir(path).unwrap().for_each(|entry| add(&entry.unwrap().path(), text));
        } else if path.extension().is_some_and(|e| e == "rs") {
            let source = fs::read_to_string(path).unwrap();
            text.push_str(source.split("#[cfg(test)]\nmod tests {").next().unwrap());
        }
    }
    let mut text = String::new();
    add(&root().join(format!("src/{module}.rs")), &mut text);
    add(&root().join(format!("src/{module}")), &mut text);
    text
}

/// The pairs of a status and a code in source text: `S::NOT_FOUND, INVALID, "unknown_path"`.
fn codes_in(source: &str) -> BTreeSet<(String, String)> {
    const STATUSES: [(&str, &str); 18] = [
        ("BAD_REQUEST", "400"),
        ("UNAUTHORIZED", "401"),
        ("FORBIDDEN", "403"),
        ("NOT_FOUND", "404"),
        ("METHOD_NOT_ALLOWED", "405"),
        ("REQUEST_TIMEOUT", "408"),
        ("CONFLICT", "409"),
        ("LENGTH_REQUIRED", "411"),
        ("PAYLOAD_TOO_LARGE", "413"),
        ("URI_TOO_LONG", "414"),
        ("UNSUPPORTED_MEDIA_TYPE", "415"),
        ("UNPROCESSABLE_ENTITY", "422"),
        ("TOO_MANY_REQUESTS", "429"),
        ("REQUEST_HEADER_FIELDS_TOO_LARGE", "431"),
        ("INTERNAL_SERVER_ERROR", "500"),
        ("BAD_GATEWAY", "502"),
        ("SERVICE_UNAVAILABLE", "503"),
        ("GATEWAY_TIMEOUT", "504"),
    ];
    let is_code = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let mut codes = BTreeSet::new();
    for rest in source.split("S::").chain(source.split("StatusCode::")).skip(1) {
        let mut parts = rest.split([',', ')']).map(str::trim);
        let Some((_, status)) = STATUSES.iter().find(|(name, _)| parts.clone().next() == Some(name)) else {
            continue;
        };
        let texts =
            parts.by_ref().skip(1).take(2).filter_map(|part| part.strip_prefix('"')?.strip_suffix('"'));
        // An error of the gateway has a type before its code.
        if let Some(code) = texts.filter(|text| is_code(text)).last() {
            codes.insert(((*status).to_owned(), code.to_owned()));
        }
    }
    codes
}

#[test]
fn every_error_code_of_the_gateway_is_documented_and_every_documented_code_exists() {
    let source = sources("error");
    let codes = codes_in(&source);
    assert!(codes.len() > 20, "{codes:?}");
    assert_eq!(documented_codes("Errors of the gateway"), codes);
}

#[test]
fn every_error_code_of_the_admin_api_is_documented_and_every_documented_code_exists() {
    let mut codes = codes_in(&sources("admin"));
    assert!(codes.len() > 15, "{codes:?}");
    // The code of a refused reload is not beside its status.
    codes.insert(("422".to_owned(), "invalid_config".to_owned()));
    assert_eq!(documented_codes("Errors of the admin API"), codes);
}

#[test]
fn the_runbook_has_a_row_for_every_alert() {
    let alerts = fs::read_to_string(root().join("config/prometheus/alerts.yaml")).unwrap();
    let operations = fs::read_to_string(root().join("docs/operations.md")).unwrap();
    let (_, runbook) = operations.split_once("\n## Runbook\n").unwrap();
    let names: Vec<_> = alerts.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(names.len() > 5, "{names:?}");
    let missing: Vec<_> = names.iter().filter(|name| !runbook.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "no row in the runbook: {missing:?}");
}
