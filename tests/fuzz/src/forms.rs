//! Fuzzes multipart forms: a lenient parser finds no other model in a form than the gateway.

use tollgate::fuzzed::form_model;

const DELIMITER: &[u8] = b"--x";

pub(crate) fn check(form: &[u8]) {
    let Ok(model) = form_model(form, "x") else { return };
    let models = models(form);
    assert!(models.len() <= 1, "{model:?} {}", form.escape_ascii());
    // The gateway decodes other texts.
    if let [Some(lenient)] = &models[..]
        && lenient.is_ascii()
    {
        assert_eq!(*lenient, model.as_bytes(), "{}", form.escape_ascii());
    }
}

/// The fields `model` of a form, for a parser that takes any line end, white space behind a delimiter, and parts behind the
/// end of the form. `None`: the head is not the usual one.
fn models(form: &[u8]) -> Vec<Option<Vec<u8>>> {
    let (mut found, mut in_head, mut value) = (Vec::new(), false, None);
    for line in lines(form) {
        let text = line.trim_ascii_end();
        if text.starts_with(DELIMITER) && matches!(text[DELIMITER.len()..], [] | [b'-', b'-', ..]) {
            close(&mut found, value.take());
            in_head = text.len() == DELIMITER.len();
        } else if in_head && text.is_empty() {
            in_head = false;
        } else if in_head {
            let head = text.to_ascii_lowercase();
            let named = count(&head, b"name=\"model\"") - count(&head, b"filename=\"model\"");
            if head.starts_with(b"content-disposition:") && named > 0 {
                found.resize(found.len() + named, None);
                let is_usual = head == b"content-disposition: form-data; name=\"model\"";
                value = (is_usual && named == 1).then(Vec::new);
            }
        } else if let Some(value) = &mut value {
            value.extend_from_slice(line);
        }
    }
    close(&mut found, value);
    found
}

/// Ends a field. The last line end belongs to the delimiter.
fn close(found: &mut [Option<Vec<u8>>], value: Option<Vec<u8>>) {
    let Some(mut value) = value else { return };
    let end = [&b"\r\n"[..], b"\n", b"\r"].into_iter().find(|end| value.ends_with(end)).unwrap_or_default();
    value.truncate(value.len() - end.len());
    if let Some(last) = found.last_mut() {
        *last = Some(value);
    }
}

/// The lines with their ends: CR, LF, or both.
fn lines(form: &[u8]) -> impl Iterator<Item = &[u8]> {
    let mut before = 0;
    form.split_inclusive(move |&byte| {
        // A CR before a LF is no end.
        before += 1;
        byte == b'\n' || byte == b'\r' && form.get(before) != Some(&b'\n')
    })
}

fn count(text: &[u8], word: &[u8]) -> usize {
    memchr::memmem::find_iter(text, word).count()
}
