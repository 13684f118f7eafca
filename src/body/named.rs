//! Reads the model of a body whose prompt is not counted.

use super::edit::Span;
use super::spelling::position;
use super::{BodyFault, BodyText, Edit};
use crate::json::Text;
use serde::de::{Deserializer as _, IgnoredAny, MapAccess, Visitor};
use serde_json::value::RawValue;
use std::fmt;

/// The `model` of a body.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct NamedModel {
    /// The name; empty if the body has none.
    pub name: String,
    /// The range of its value, also of a null.
    at: Option<Span>,
}

impl NamedModel {
    /// The edit that replaces the value of `model` by this name. `None`: the body has no such field.
    pub fn replace(&self, name: &str) -> Option<Edit> {
        self.at.map(|at| Edit::json_text(at, name))
    }
}

/// Reads the `model` of a JSON object.
///
/// # Errors
/// The body is not JSON, not an object, nested too deep, or has `model` twice or in another case.
pub fn named_model(json: &[u8]) -> Result<NamedModel, BodyFault> {
    let BodyText(text) = &BodyText::of(json)?;
    let mut deserializer = serde_json::Deserializer::from_str(text);
    deserializer.disable_recursion_limit();
    let mut model = ModelVisitor { text, name: None, raw: "", fault: None };
    let read = deserializer.deserialize_map(&mut model).and_then(|()| deserializer.end());
    match (model.fault.take(), read) {
        (Some(fault), _) => Err(fault),
        (None, Err(e)) => Err(BodyFault::Invalid(format!("is not a valid JSON object: {e}"))),
        (None, Ok(())) => Ok(model.named()),
    }
}

struct ModelVisitor<'b> {
    /// The whole body.
    text: &'b str,
    name: Option<String>,
    /// The value of `model` as the body has it.
    raw: &'b str,
    fault: Option<BodyFault>,
}

impl ModelVisitor<'_> {
    fn named(self) -> NamedModel {
        let at = self.name.is_some().then(|| Span::of(self.text, self.raw));
        NamedModel { name: self.name.unwrap_or_default(), at }
    }
}

impl<'de: 'b, 'b> Visitor<'de> for &mut ModelVisitor<'b> {
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
            self.raw = map.next_value::<&'de RawValue>()?.get();
            let Ok(name) = serde_json::from_str::<Option<Text<'_>>>(self.raw) else {
                let fault = BodyFault::Value { param: "model", expected: "a string" };
                self.fault.get_or_insert(fault);
                continue;
            };
            let name = name.map(|Text(name)| name.into_owned()).unwrap_or_default();
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
    fn the_value_of_the_model_is_replaced_and_nothing_else() {
        for (before, after) in [
            (r#"{ "model" : "rerank-2" ,"query":"q"}"#, r#"{ "model" : "a/\"b" ,"query":"q"}"#),
            (r#"{"mod\u0065l":"r\u0065","x":{"model":1}}"#, r#"{"mod\u0065l":"a/\"b","x":{"model":1}}"#),
            (r#"{"x":"\ud83d","model":null}"#, r#"{"x":"\ud83d","model":"a/\"b"}"#),
        ] {
            let edit = named_model(before.as_bytes()).unwrap().replace("a/\"b").unwrap();
            let edited = crate::body::edited(before.as_bytes(), vec![edit]);
            assert_eq!(std::str::from_utf8(&edited).unwrap(), after);
        }
        assert_eq!(named_model(b"{}").unwrap().replace("a"), None);
    }

    #[test]
    fn a_model_is_read_if_it_is_unambiguous() {
        for (json, model) in [
            (r#"{"model":"rerank-2","query":"q","documents":[{"model":5}]}"#, "rerank-2"),
            (r#"{"mod\u0065l":"m"}"#, "m"),
            (r#"{"model":null}"#, ""),
            (r#"{"\ud83d":"\ude00","model":"m\ud83d"}"#, "m\u{fffd}"),
            ("{}", ""),
        ] {
            assert_eq!(named_model(json.as_bytes()).unwrap().name, model, "{json}");
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
