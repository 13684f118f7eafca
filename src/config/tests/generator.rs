//! Random valid configs, made from the descriptions of the keys.

use crate::config::description::{DefaultSpec, SectionSpec, ValueSpec};
use crate::config::top::TOP;
use serde_json::{Map, Value, json};

pub(super) struct Generator {
    state: u64,
    /// Makes every secret and every name of a caller different.
    count: u32,
}

impl Generator {
    pub(super) fn new(seed: u64) -> Self {
        Self { state: seed | 1, count: 0 }
    }

    /// A number below `end`.
    fn below(&mut self, end: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        usize::try_from(self.state >> 16).unwrap() % end
    }

    fn pick<T: Clone>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())].clone()
    }

    fn next(&mut self) -> u32 {
        self.count += 1;
        self.count
    }

    pub(super) fn config(&mut self) -> Value {
        let mut config = self.section(&TOP);
        if !config["default_environment"].is_null() {
            let names: Vec<String> = config["environments"].as_object().unwrap().keys().cloned().collect();
            config["default_environment"] = self.pick(&names).into();
        }
        if !config["store"]["redis"].is_null() && !config["store"]["memory"].is_null() {
            config["store"]["memory"] = false.into();
        }
        config
    }

    fn section(&mut self, spec: &SectionSpec) -> Value {
        let mut entries = Map::new();
        for key in spec.keys {
            if matches!(key.default, DefaultSpec::Required(_)) || self.below(2) == 0 {
                let value = self.known(spec.name, key.name);
                let value = value.unwrap_or_else(|| self.value(&key.value));
                entries.insert(key.name.to_owned(), value);
            }
        }
        self.fit(spec.name, &mut entries);
        Value::Object(entries)
    }

    /// Makes the keys of a section satisfy the rules between them.
    fn fit(&mut self, section: &str, entries: &mut Map<String, Value>) {
        match section {
            "caller" => {
                let number = self.next();
                let digest = format!("{number:064x}");
                let (name, value) = if self.below(2) == 0 {
                    ("sha256", json!(digest))
                } else {
                    ("secret", json!([format!("a-secret-of-caller-{number}"), format!("{number:020}")]))
                };
                entries.remove("secret");
                entries.remove("sha256");
                entries.insert(name.into(), value);
            }
            "model" => {
                let choices = [
                    ("model", "gpt-4o"),
                    ("encoding", "cl100k_base"),
                    ("tokenizer", "fixtures/tokenizer.json"),
                ];
                choices.iter().for_each(|(name, _)| drop(entries.remove(*name)));
                let (name, value) = self.pick(&choices);
                entries.insert(name.into(), value.into());
            }
            "upstream" => {
                // One of the two.
                if entries.contains_key("base_urls") {
                    entries.remove("base_url");
                } else {
                    let url = self.known("upstream", "base_url").unwrap();
                    entries.insert("base_url".into(), url);
                }
            }
            "quota" => {
                let is_calendar = match entries.get("window").and_then(Value::as_str) {
                    Some(window) => window == "calendar",
                    None => entries["per"] == "day",
                };
                entries.remove(if is_calendar { "burst" } else { "timezone" });
            }
            _ => {}
        }
    }

    /// A value for a key whose rules the description does not contain.
    fn known(&mut self, section: &str, key: &str) -> Option<Value> {
        Some(match (section, key) {
            ("server", "listen") => self.pick(&["127.0.0.1:80", "[::1]:8080", "127.0.0.1:0"]).into(),
            ("server", "buffered_bodies") => self.pick(&["1GiB", "2_000MB"]).into(),
            ("server", "trusted_proxies") => json!(["10.0.0.0/8", "2001:db8::1"]),
            ("admin", "listen") => self.pick(&["127.0.0.1:91", "[::1]:9091"]).into(),
            ("upstream", "base_url") => {
                self.pick(&["http://u/v1", "https://[::1]:8443/openai/", "HTTPS://a.b"]).into()
            }
            ("upstream", "base_urls") => {
                json!(["https://[::1]/v1", "HTTPS://b:8443/v1/", "https://c.d:1/v1"])
            }
            ("health", "path") => self.pick(&["/", "/health?full=1"]).into(),
            ("health", "every") => self.pick(&["100ms", "minute"]).into(),
            ("upstream", "headers") => json!({"x-a": "it's \"quoted\": #1", "X-B": 17, "x-empty": ""}),
            ("environment", "upstream") => "one".into(),
            ("route", "upstream") => self.pick(&[json!("one"), json!(["one"])]),
            ("route", "apis") => self.pick(&[json!(["chat"]), json!(["messages", "audio"])]),
            ("route", "model") => self.pick(&["gpt-4o", "a/b: \"c\"", "null", "12"]).into(),
            ("caller", "name") => format!("caller-{}", self.next()).into(),
            ("quota", "per") => self.pick(&["second", "minute", "hour", "day"]).into(),
            ("quota", "timezone") => self.pick(&["UTC", "Europe/Berlin", "Asia/Kathmandu"]).into(),
            ("redis", "url") => self
                .pick(&["redis://r", "rediss://me:a-pass@word@r:1/2?ca_file=/a", "redis+sentinel://:p@a,b/m"])
                .into(),
            ("redis", "prefix") => self.pick(&["text", "null", "12", "a: b", "it's", "é # x"]).into(),
            ("redis", "timeout") => self.pick(&["20ms", "1.5s", "second"]).into(),
            ("otlp", "endpoint") => self.pick(&["http://c:4318", "HTTPS://[::1]/otlp/v1/traces"]).into(),
            ("otlp", "headers") => json!({"x-key": "a-key-of-the-collector"}),
            ("otlp", "sample") => self.pick(&[json!(0), json!(0.25), json!("1.0")]),
            ("reserve", "quantile") => self.pick(&[json!(0.5), json!("0.95"), json!(0.001)]),
            _ => return None,
        })
    }

    fn value(&mut self, spec: &ValueSpec) -> Value {
        match spec {
            ValueSpec::Section(spec) => self.section(spec),
            ValueSpec::Boolean => self.pick(&[json!(true), json!(false), json!("true")]),
            ValueSpec::Duration => self.pick(&["500ms", "1.5s", "5m", "1h", "35d", "minute", "1_0s"]).into(),
            ValueSpec::Size => self.pick(&[json!("512KiB"), json!("1 MiB"), json!(100), json!("1.5MB")]),
            ValueSpec::Amount { min, max } => {
                let number = (7 + self.below(5_000) as u64).clamp(*min, *max);
                self.pick(&[json!(number), json!(number.to_string()), json!("1_5"), json!("1.0k")])
            }
            ValueSpec::Decimal(_) => self.pick(&[json!(0.6), json!("1.5"), json!(2)]),
            ValueSpec::Words(words) => {
                let word = words[self.below(words.len())].0;
                word.parse::<u64>().map_or_else(|_| word.into(), Value::from)
            }
            ValueSpec::List(element) => {
                let length = 1 + self.below(2);
                (0..length).map(|_| self.value(element)).collect()
            }
            ValueSpec::OneOrMore(element) => {
                let element = self.value(element);
                if self.below(2) == 0 { element } else { json!([element]) }
            }
            ValueSpec::Names(_, element) => {
                let names = &["one", "two-2", "3_three"][..=self.below(3)];
                Value::Object(names.iter().map(|name| ((*name).to_owned(), self.value(element))).collect())
            }
            ValueSpec::Either(specs) => {
                let at = self.below(specs.len());
                self.value(&specs[at])
            }
            ValueSpec::Text(_) | ValueSpec::Secret(_) | ValueSpec::SecretUrl(_) => {
                let texts = ["text", "null", "true", "12", "a: b", "a, b]}", "it's", "\"x\\", "é # x", "*"];
                self.pick(&texts).into()
            }
        }
    }
}
