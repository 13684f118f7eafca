//! Fuzzes multipart forms: if the gateway reads a model from a form, no other spelling of a model is in it.

use tollgate::fuzzed::form_model;

pub(crate) fn check(form: &[u8]) {
    let Ok(model) = form_model(form, "x") else { return };
    let mut names = 0;
    // The heads of all parts, found without a parser. A delimiter begins a line. The bytes before the first one are no
    // part.
    let lines = [b"\n", form].concat();
    for part in split(&lines, b"\n--x\r\n").into_iter().skip(1) {
        let end = part.windows(4).position(|four| four == b"\r\n\r\n").unwrap_or(0);
        let head = String::from_utf8_lossy(&part[..end]).to_lowercase();
        let dispositions = head.lines().filter(|line| line.starts_with("content-disposition:"));
        let named =
            |line: &str| line.matches("name=\"model\"").count() - line.matches("filename=\"model\"").count();
        names += dispositions.map(named).sum::<usize>();
    }
    assert!(names <= 1, "{model:?} {}", form.escape_ascii());
}

fn split<'f>(form: &'f [u8], delimiter: &[u8]) -> Vec<&'f [u8]> {
    let (mut parts, mut rest) = (Vec::new(), form);
    while let Some(at) = rest.windows(delimiter.len()).position(|bytes| bytes == delimiter) {
        parts.push(&rest[..at]);
        rest = &rest[at + delimiter.len()..];
    }
    parts.push(rest);
    parts
}
