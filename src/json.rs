//! What the readers of requests and of answers share about JSON.

use serde::Deserialize;
use serde::de::{Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::borrow::Cow;
use std::fmt;

/// A string, borrowed where it needs no unescaping (`Cow` by itself is always owned).
#[derive(Deserialize)]
pub(crate) struct Text<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

/// Text in whatever shape: a string, null, or a list of parts of which the `text` counts.
#[derive(Default)]
pub(crate) struct LooseText<'a>(pub(crate) Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for LooseText<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = LooseText<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<LooseText<'de>, E> {
                Ok(LooseText(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<LooseText<'de>, E> {
                Ok(LooseText(Cow::Owned(text.to_owned())))
            }

            fn visit_unit<E>(self) -> Result<LooseText<'de>, E> {
                Ok(LooseText::default())
            }

            fn visit_bool<E>(self, _: bool) -> Result<LooseText<'de>, E> {
                Ok(LooseText::default())
            }

            fn visit_u64<E>(self, _: u64) -> Result<LooseText<'de>, E> {
                Ok(LooseText::default())
            }

            fn visit_i64<E>(self, _: i64) -> Result<LooseText<'de>, E> {
                Ok(LooseText::default())
            }

            fn visit_f64<E>(self, _: f64) -> Result<LooseText<'de>, E> {
                Ok(LooseText::default())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<LooseText<'de>, A::Error> {
                let mut all = String::new();
                while let Some(part) = seq.next_element::<LooseText<'de>>()? {
                    all.push_str(&part.0);
                }
                Ok(LooseText(Cow::Owned(all)))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<LooseText<'de>, A::Error> {
                let mut all = LooseText::default();
                while let Some(key) = map.next_key::<Cow<'de, str>>()? {
                    match &*key {
                        "text" | "thinking" => all = map.next_value()?,
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                        }
                    }
                }
                Ok(all)
            }
        }
        deserializer.deserialize_any(Any)
    }
}
