//! Reads selected parts of JSON in one pass, without building a tree.

mod scan;
mod surrogates;

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt;

pub(crate) use scan::{Found, MemberScanner, nests_deeper_than, string_length};
pub(crate) use surrogates::replace_lone_surrogates;

/// A string, borrowed where it needs no unescaping (`Cow` by itself is always owned).
#[derive(Deserialize)]
pub(crate) struct Text<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

/// The expected shape of a value, for the error message.
#[derive(Clone, Copy)]
pub(crate) struct Expected(pub(crate) &'static str);

/// Receives the parts of a JSON value as it is parsed. By default each part is accepted and ignored.
pub(crate) trait JsonVisitor<'a> {
    /// The object members that `field` receives; at most 32.
    const FIELDS: &'static [&'static str] = &[];
    /// Whether an object with one of `FIELDS` twice, in any case, is an error: parsers differ in which of the two they use.
    const REJECTS_DUPLICATES: bool = true;

    fn text(&mut self, _text: Cow<'a, str>) -> Result<(), Expected> {
        Ok(())
    }

    /// A number; `None` unless it is a whole number from 0 to 2^64 - 1.
    fn number(&mut self, _number: Option<u64>) -> Result<(), Expected> {
        Ok(())
    }

    fn boolean(&mut self, _value: bool) -> Result<(), Expected> {
        Ok(())
    }

    /// Reads the next element of a list; `false`: the list has ended.
    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        Ok(list.next_element::<IgnoredAny>()?.is_some())
    }

    /// A list has ended.
    fn list_end(&mut self) {}

    /// Reads the value of one of `FIELDS`.
    fn field<M: MapAccess<'a>>(&mut self, _name: &'static str, object: &mut M) -> Result<(), M::Error> {
        object.next_value::<IgnoredAny>().map(drop)
    }

    /// Reads the value of a member that is not in `FIELDS`.
    fn other_field<M: MapAccess<'a>>(&mut self, _name: Cow<'a, str>, object: &mut M) -> Result<(), M::Error> {
        object.next_value::<IgnoredAny>().map(drop)
    }

    /// An object has ended.
    fn object_end(&mut self) {}

    /// An object begins.
    fn object(&mut self) -> Result<(), Expected> {
        Ok(())
    }
}

/// Deserialises a value by passing its parts to a `JsonVisitor`.
pub(crate) struct Visit<'t, T>(pub(crate) &'t mut T);

impl<'a, T: JsonVisitor<'a>> DeserializeSeed<'a> for Visit<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

/// Deserialises a value by passing its parts to a `JsonVisitor`, which any value other than null creates.
struct VisitUnlessNull<'t, T>(&'t mut Option<T>);

impl<'a, T: JsonVisitor<'a> + Default> DeserializeSeed<'a> for VisitUnlessNull<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_option(self)
    }
}

impl<'a, T: JsonVisitor<'a> + Default> Visitor<'a> for VisitUnlessNull<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_none<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_some<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        Visit(self.0.get_or_insert_default()).deserialize(deserializer)
    }
}

fn unexpected<E: serde::de::Error>(expected: Expected) -> E {
    E::custom(format_args!("expected {}", expected.0))
}

impl<'a, T: JsonVisitor<'a>> Visitor<'a> for Visit<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_borrowed_str<E: serde::de::Error>(self, text: &'a str) -> Result<(), E> {
        self.0.text(Cow::Borrowed(text)).map_err(unexpected)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<(), E> {
        self.0.text(Cow::Owned(text.to_owned())).map_err(unexpected)
    }

    fn visit_string<E: serde::de::Error>(self, text: String) -> Result<(), E> {
        self.0.text(Cow::Owned(text)).map_err(unexpected)
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        self.0.boolean(value).map_err(unexpected)
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<(), E> {
        self.0.number(Some(number)).map_err(unexpected)
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.0.number(None).map_err(unexpected)
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.0.number(None).map_err(unexpected)
    }

    fn visit_seq<S: SeqAccess<'a>>(self, mut list: S) -> Result<(), S::Error> {
        while self.0.element(&mut list)? {}
        self.0.list_end();
        Ok(())
    }

    fn visit_map<M: MapAccess<'a>>(self, mut object: M) -> Result<(), M::Error> {
        self.0.object().map_err(unexpected)?;
        let mut seen = 0u32;
        while let Some(Text(key)) = object.next_key()? {
            let exact = T::FIELDS.iter().position(|name| *name == key);
            // Other parsers ignore the case of names.
            let similar =
                || T::FIELDS.iter().position(|name| T::REJECTS_DUPLICATES && name.eq_ignore_ascii_case(&key));
            if let Some(at) = exact.or_else(similar) {
                if T::REJECTS_DUPLICATES && seen & (1 << at) != 0 {
                    return Err(M::Error::custom(format_args!("duplicate field `{key}`")));
                }
                seen |= 1 << at;
            }
            let Some(at) = exact else {
                self.0.other_field(key, &mut object)?;
                continue;
            };
            self.0.field(T::FIELDS[at], &mut object)?;
        }
        self.0.object_end();
        Ok(())
    }
}

/// Reads the next value of an object into `receiver`.
pub(crate) fn value<'a, M: MapAccess<'a>>(
    object: &mut M,
    receiver: &mut impl JsonVisitor<'a>,
) -> Result<(), M::Error> {
    object.next_value_seed(Visit(receiver))
}

/// Reads the next value of an object into `receiver`, unless the value is null.
pub(crate) fn optional<'a, M: MapAccess<'a>>(
    object: &mut M,
    receiver: &mut Option<impl JsonVisitor<'a> + Default>,
) -> Result<(), M::Error> {
    object.next_value_seed(VisitUnlessNull(receiver))
}

/// Reads the next element of a list into `receiver`; `false`: the list has ended.
pub(crate) fn element<'a, S: SeqAccess<'a>>(
    list: &mut S,
    receiver: &mut impl JsonVisitor<'a>,
) -> Result<bool, S::Error> {
    Ok(list.next_element_seed(Visit(receiver))?.is_some())
}

/// Returns the JSON text of the next value of an object; `None`: the value is null.
pub(crate) fn raw_unless_null<'a, M: MapAccess<'a>>(object: &mut M) -> Result<Option<&'a str>, M::Error> {
    raw(object).map(|json| Some(json).filter(|json| *json != "null"))
}

/// The whole number that JSON text denotes: also `4096.0` and `1e3`, as other parsers read them. `None`: it is no
/// number, has a fraction, or is not in 0 ..= 2^53.
pub(crate) fn whole_number(json: &str) -> Option<u64> {
    const MAX_EXACT: f64 = 9_007_199_254_740_992.0;
    if let Ok(number) = json.parse() {
        return Some(number).filter(|number| *number <= 1 << 53);
    }
    // Rust also parses words such as `inf`.
    let is_number = json.starts_with(|c: char| c.is_ascii_digit() || c == '-');
    let number: f64 = json.parse().ok().filter(|_| is_number)?;
    // Up to this bound the cast is exact.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    (number.fract() == 0.0 && (0.0..=MAX_EXACT).contains(&number)).then_some(number as u64)
}

/// Reads the next value of an object if it is a string; any other value gives an empty string.
pub(crate) fn string<'a, M: MapAccess<'a>>(object: &mut M) -> Result<Cow<'a, str>, M::Error> {
    let mut text = OneText::default();
    value(object, &mut text)?;
    Ok(text.0)
}

/// Returns the JSON text of the next value of an object.
pub(crate) fn raw<'a, M: MapAccess<'a>>(object: &mut M) -> Result<&'a str, M::Error> {
    object.next_value::<&'a RawValue>().map(RawValue::get)
}

#[derive(Default)]
struct OneText<'a>(Cow<'a, str>);

impl<'a> JsonVisitor<'a> for OneText<'a> {
    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.0 = text;
        Ok(())
    }
}

/// Text in any shape: a string, or a list of parts with a `text` or `thinking`.
#[derive(Default)]
pub(crate) struct LooseText<'a>(pub(crate) Cow<'a, str>);

impl<'a> JsonVisitor<'a> for LooseText<'a> {
    const FIELDS: &'static [&'static str] = &["text", "thinking"];
    const REJECTS_DUPLICATES: bool = false;

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        if self.0.is_empty() {
            self.0 = text;
        } else {
            self.0.to_mut().push_str(&text);
        }
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        element(list, self)
    }

    fn field<M: MapAccess<'a>>(&mut self, _: &'static str, object: &mut M) -> Result<(), M::Error> {
        value(object, self)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for LooseText<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut text = LooseText::default();
        Visit(&mut text).deserialize(deserializer)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_are_read_in_every_notation() {
        for (json, number) in [
            ("7", Some(7)),
            ("0", Some(0)),
            ("-0", Some(0)),
            ("4096.0", Some(4_096)),
            ("1e3", Some(1_000)),
            ("1.5E+1", Some(15)),
            ("2147483648", Some(1 << 31)),
            ("1e400", None),
            ("1.5", None),
            ("-1", None),
            ("-1.0", None),
            ("18446744073709551616", None),
            ("\"5\"", None),
            ("true", None),
            ("[]", None),
            ("inf", None),
            ("", None),
        ] {
            assert_eq!(whole_number(json), number, "{json}");
        }
    }
}
