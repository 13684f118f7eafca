//! Fuzzes configs: none causes a panic, and every fault has a text.

use tollgate::config::parse;

pub(crate) fn check(text: &[u8]) {
    let Ok(text) = std::str::from_utf8(text) else { return };
    // These read files of this machine, or wait for one.
    if ["file", "/dev", "/proc", "tokenizer", "cert"].iter().any(|word| text.contains(word)) {
        return;
    }
    let variable = |name: &str| name.len().is_multiple_of(2).then(|| "value-of-a-variable".to_owned());
    if let Err(faults) = parse(text, "t.yaml", &variable, &[]) {
        let faults = faults.to_string();
        assert!(faults.contains("t.yaml") && !faults.contains("value-of-a-variable"), "{faults}\n{text}");
    }
}
