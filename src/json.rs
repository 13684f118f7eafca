//! Reading JSON of which only some is wanted, in one pass and without a tree.

use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use std::borrow::Cow;
use std::fmt;

/// A string, borrowed where it needs no unescaping (`Cow` by itself is always owned).
#[derive(Deserialize)]
pub(crate) struct Text<'a>(#[serde(borrow)] pub(crate) Cow<'a, str>);

/// Why a value of some shape is not taken: what it should have been.
#[derive(Clone, Copy)]
pub(crate) struct Expected(pub(crate) &'static str);

/// What takes a JSON value apart as it is parsed. Values of every shape are taken, and passed over where
/// nothing is done with them.
pub(crate) trait Take<'a> {
    /// The members of an object that are taken.
    const FIELDS: &'static [&'static str] = &[];
    /// Whether an object that has one of them twice is refused: other parsers may take the other one.
    const ONCE: bool = true;

    fn text(&mut self, _text: Cow<'a, str>) -> Result<(), Expected> {
        Ok(())
    }

    /// Whole numbers from 0 have a value, others none.
    fn number(&mut self, _number: Option<u64>) -> Result<(), Expected> {
        Ok(())
    }

    fn boolean(&mut self, _value: bool) -> Result<(), Expected> {
        Ok(())
    }

    /// The next element of a list; `false`: there is none.
    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        Ok(list.next_element::<IgnoredAny>()?.is_some())
    }

    /// A list has come to its end.
    fn list_end(&mut self) {}

    /// The value of one of `FIELDS`.
    fn field<M: MapAccess<'a>>(&mut self, _name: &'static str, object: &mut M) -> Result<(), M::Error> {
        object.next_value::<IgnoredAny>().map(drop)
    }

    /// The value of a member that is not among `FIELDS`.
    fn any_field<M: MapAccess<'a>>(&mut self, _name: Cow<'a, str>, object: &mut M) -> Result<(), M::Error> {
        object.next_value::<IgnoredAny>().map(drop)
    }

    /// An object has come to its end.
    fn object_end(&mut self) {}

    /// An object begins.
    fn object(&mut self) -> Result<(), Expected> {
        Ok(())
    }
}

/// Deserialises by handing every part to a `Take`.
pub(crate) struct To<'t, T>(pub(crate) &'t mut T);

impl<'a, T: Take<'a>> DeserializeSeed<'a> for To<'_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'a>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

fn refused<E: serde::de::Error>(expected: Expected) -> E {
    E::custom(format_args!("expected {}", expected.0))
}

impl<'a, T: Take<'a>> Visitor<'a> for To<'_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_borrowed_str<E: serde::de::Error>(self, text: &'a str) -> Result<(), E> {
        self.0.text(Cow::Borrowed(text)).map_err(refused)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<(), E> {
        self.0.text(Cow::Owned(text.to_owned())).map_err(refused)
    }

    fn visit_string<E: serde::de::Error>(self, text: String) -> Result<(), E> {
        self.0.text(Cow::Owned(text)).map_err(refused)
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<(), E> {
        self.0.boolean(value).map_err(refused)
    }

    fn visit_u64<E: serde::de::Error>(self, number: u64) -> Result<(), E> {
        self.0.number(Some(number)).map_err(refused)
    }

    fn visit_i64<E: serde::de::Error>(self, _: i64) -> Result<(), E> {
        self.0.number(None).map_err(refused)
    }

    fn visit_f64<E: serde::de::Error>(self, _: f64) -> Result<(), E> {
        self.0.number(None).map_err(refused)
    }

    fn visit_seq<S: SeqAccess<'a>>(self, mut list: S) -> Result<(), S::Error> {
        while self.0.element(&mut list)? {}
        self.0.list_end();
        Ok(())
    }

    fn visit_map<M: MapAccess<'a>>(self, mut object: M) -> Result<(), M::Error> {
        self.0.object().map_err(refused)?;
        let mut seen = 0u32;
        while let Some(Text(key)) = object.next_key()? {
            let Some(at) = T::FIELDS.iter().position(|name| *name == key) else {
                self.0.any_field(key, &mut object)?;
                continue;
            };
            if T::ONCE && seen & (1 << at) != 0 {
                return Err(M::Error::custom(format_args!("duplicate field `{key}`")));
            }
            seen |= 1 << at;
            self.0.field(T::FIELDS[at], &mut object)?;
        }
        self.0.object_end();
        Ok(())
    }
}

/// The next value of an object, handed to `taker`.
pub(crate) fn value<'a, M: MapAccess<'a>>(object: &mut M, taker: &mut impl Take<'a>) -> Result<(), M::Error> {
    object.next_value_seed(To(taker))
}

/// The next element of a list, handed to `taker`; `false`: there is none.
pub(crate) fn element<'a, S: SeqAccess<'a>>(
    list: &mut S,
    taker: &mut impl Take<'a>,
) -> Result<bool, S::Error> {
    Ok(list.next_element_seed(To(taker))?.is_some())
}

/// The next value of an object if it is a string, else empty.
pub(crate) fn string<'a, M: MapAccess<'a>>(object: &mut M) -> Result<Cow<'a, str>, M::Error> {
    let mut text = OneText::default();
    value(object, &mut text)?;
    Ok(text.0)
}

/// The next value of an object as it is written.
pub(crate) fn raw<'a, M: MapAccess<'a>>(object: &mut M) -> Result<&'a str, M::Error> {
    object.next_value::<&'a RawValue>().map(RawValue::get)
}

#[derive(Default)]
struct OneText<'a>(Cow<'a, str>);

impl<'a> Take<'a> for OneText<'a> {
    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.0 = text;
        Ok(())
    }
}

/// Text in whatever shape: a string, or a list of parts of which the `text` counts.
#[derive(Default)]
pub(crate) struct LooseText<'a>(pub(crate) Cow<'a, str>);

impl<'a> Take<'a> for LooseText<'a> {
    const FIELDS: &'static [&'static str] = &["text", "thinking"];
    const ONCE: bool = false;

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
        To(&mut text).deserialize(deserializer)?;
        Ok(text)
    }
}
