//! Reads the model of a body whose prompt is not counted.

use super::spelling::position;
use super::{BodyFault, BodyText};
use crate::json::Text;
use serde::de::{Deserializer as _, IgnoredAny, MapAccess, Visitor};
use std::fmt;

/// Reads the `model` of a JSON object; empty if it has none.
///
/// # Errors
/// The body is not JSON, not an object, nested too deep, or has `model` twice or in another case.
pub fn named_model(json: &[u8]) -> Result<String, BodyFault> {
    let BodyText(text) = &BodyText::of(json)?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    deserializer.disable_recursion_limit();
    let mut model = ModelVisitor::default();
    let read = deserializer.deserialize_map(&mut model).and_then(|()| deserializer.end());
    match (model.fault, read) {
        (Some(fault), _) => Err(fault),
        (None, Err(e)) => Err(BodyFault::Invalid(format!("is not a valid JSON object: {e}"))),
        (None, Ok(())) => Ok(model.name.unwrap_or_default()),
    }
}

#[derive(Default)]
struct ModelVisitor {
    name: Option<String>,
    fault: Option<BodyFault>,
}

impl<'de> Visitor<'de> for &mut ModelVisitor {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(Text(key)) = map.next_key()? {
            if position(&["model"], &key).is_none() {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = map.next_value::<serde_json::Value>()?;
            let name = match value {
                serde_json::Value::String(name) => name,
                serde_json::Value::Null => String::new(),
                _ => {
                    let fault = BodyFault::Value { param: "model", expected: "a string" };
                    self.fault.get_or_insert(fault);
                    continue;
                }
            };
            let twice = self.name.replace(name).is_some();
            if twice || key != "model" {
                let how = if twice { "twice" } else { "in another case" };
                self.fault.get_or_insert(BodyFault::Invalid(format!("has the field 'model' {how}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_model_is_read_if_it_is_unambiguous() {
        for (json, model) in [
            (r#"{"model":"rerank-2","query":"q","documents":[{"model":5}]}"#, "rerank-2"),
            (r#"{"mod\u0065l":"m"}"#, "m"),
            (r#"{"model":null}"#, ""),
            (r#"{"\ud83d":"\ude00","model":"m\ud83d"}"#, "m\u{fffd}"),
            ("{}", ""),
        ] {
            assert_eq!(named_model(json.as_bytes()).unwrap(), model, "{json}");
        }
        for json in [
            "",
            "[]",
            "{",
            "{}{}",
            r#"{"model":5}"#,
            r#"{"model":"a","model":"b"}"#,
            r#"{"model":"a","Model":"b"}"#,
            r#"{"MODEL":"a"}"#,
        ] {
            assert!(named_model(json.as_bytes()).is_err(), "{json}");
        }
        let nested = |levels: usize| format!(r#"{{"x":{}{}}}"#, "[".repeat(levels), "]".repeat(levels));
        assert!(named_model(nested(127).as_bytes()).is_ok() && named_model(nested(128).as_bytes()).is_err());
        assert!(named_model(b"{\"a\":\"\xff\"}").is_err());
    }
}
