//! JSON bodies of requests to the admin API.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Reads an object with the fields of a type. By itself, serde also takes a list of their values.
pub(super) fn read_object<T: DeserializeOwned>(body: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice::<Map<String, Value>>(body)?;
    serde_json::from_slice(body)
}
