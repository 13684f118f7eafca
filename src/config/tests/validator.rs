//! A validator of JSON Schema, with the keywords that the config's schema uses. An unknown keyword is an error.

use serde_json::Value;

/// Why the schema refuses a value. `None`: it accepts the value.
pub(super) fn refusal(value: &Value, schema: &Value, root: &Value) -> Option<String> {
    let Value::Object(keywords) = schema else { panic!("a schema is an object: {schema}") };
    keywords.iter().find_map(|(keyword, argument)| {
        let reason = refused_by(keyword, argument, value, schema, root)?;
        Some(format!("{keyword}: {reason}"))
    })
}

fn refused_by(
    keyword: &str,
    argument: &Value,
    value: &Value,
    schema: &Value,
    root: &Value,
) -> Option<String> {
    let unless = |is_valid: bool| (!is_valid).then(|| format!("{value:.80} does not match {argument:.80}"));
    match keyword {
        "$schema" | "$defs" | "title" | "description" | "examples" | "default" | "properties" => {
            properties(value, schema, root).filter(|_| keyword == "properties")
        }
        "$ref" => {
            let pointer = argument.as_str().unwrap().strip_prefix('#').unwrap();
            refusal(value, root.pointer(pointer).unwrap(), root)
        }
        "type" => {
            let types = argument.as_array().cloned().unwrap_or_else(|| vec![argument.clone()]);
            unless(types.iter().any(|name| has_type(value, name.as_str().unwrap())))
        }
        "const" => unless(value == argument),
        "enum" => unless(argument.as_array().unwrap().contains(value)),
        "pattern" => {
            unless(value.as_str().is_none_or(|text| pattern::is_match(argument.as_str().unwrap(), text)))
        }
        "minimum" => unless(value.as_f64().is_none_or(|number| number >= argument.as_f64().unwrap())),
        "maximum" => unless(value.as_f64().is_none_or(|number| number <= argument.as_f64().unwrap())),
        "anyOf" => {
            let reasons: Option<Vec<String>> =
                argument.as_array().unwrap().iter().map(|schema| refusal(value, schema, root)).collect();
            reasons.map(|reasons| format!("({})", reasons.join(" | ")))
        }
        "items" => value.as_array()?.iter().find_map(|item| refusal(item, argument, root)),
        "minItems" => unless(value.as_array()?.len() as u64 >= argument.as_u64().unwrap()),
        "minProperties" => unless(value.as_object()?.len() as u64 >= argument.as_u64().unwrap()),
        "propertyNames" => {
            value.as_object()?.keys().find_map(|key| refusal(&key.as_str().into(), argument, root))
        }
        "required" => {
            let object = value.as_object()?;
            let names = argument.as_array().unwrap().iter().map(|name| name.as_str().unwrap());
            names.filter(|name| !object.contains_key(*name)).map(|name| format!("{name} is missing")).next()
        }
        "additionalProperties" => {
            let known = schema.get("properties").and_then(Value::as_object);
            let mut others = value
                .as_object()?
                .iter()
                .filter(|(name, _)| known.is_none_or(|known| !known.contains_key(*name)));
            match argument {
                Value::Bool(false) => others.next().map(|(name, _)| format!("{name} is unknown")),
                schema => others.find_map(|(_, value)| refusal(value, schema, root)),
            }
        }
        other => panic!("the validator does not know the keyword {other}"),
    }
}

fn properties(value: &Value, schema: &Value, root: &Value) -> Option<String> {
    schema.get("properties")?.as_object()?.iter().find_map(|(name, schema)| {
        refusal(value.get(name)?, schema, root).map(|reason| format!("{name}: {reason}"))
    })
}

fn has_type(value: &Value, name: &str) -> bool {
    match name {
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "array" => value.is_array(),
        "object" => value.is_object(),
        "number" => value.is_number(),
        "integer" => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        other => panic!("there is no type {other}"),
    }
}

/// Regular expressions with `^ $ [] () | ? * + {m,n}` and escapes.
pub(super) mod pattern {
    type Next<'a> = &'a dyn Fn(&str) -> bool;

    /// Whether a part of the text matches.
    pub(in super::super) fn is_match(pattern: &str, text: &str) -> bool {
        if let Some(anchored) = pattern.strip_prefix('^') {
            return alternatives(anchored, text, &|_| true);
        }
        let mut starts = text.char_indices().map(|(at, _)| at).chain([text.len()]);
        starts.any(|at| alternatives(pattern, &text[at..], &|_| true))
    }

    fn alternatives(pattern: &str, text: &str, next: Next<'_>) -> bool {
        split(pattern).iter().any(|alternative| sequence(alternative, text, next))
    }

    /// Splits at each `|` outside of groups and classes.
    fn split(pattern: &str) -> Vec<&str> {
        let (mut parts, mut start, mut at) = (Vec::new(), 0, 0);
        while at < pattern.len() {
            if pattern[at..].starts_with('|') {
                parts.push(&pattern[start..at]);
                start = at + 1;
                at += 1;
            } else {
                at += atom(&pattern[at..]).len();
            }
        }
        parts.push(&pattern[start..]);
        parts
    }

    /// The first atom of a pattern: a group, a class, an escape or a character.
    fn atom(pattern: &str) -> &str {
        let end = match pattern.chars().next().unwrap() {
            '\\' => 2,
            '[' => {
                let body = if pattern[1..].starts_with("[^") { 3 } else { 2 };
                body + pattern[body..].find(']').unwrap() + 1
            }
            '(' => {
                let mut at = 1;
                while !pattern[at..].starts_with(')') {
                    at += if pattern[at..].starts_with('|') { 1 } else { atom(&pattern[at..]).len() };
                }
                at + 1
            }
            c => c.len_utf8(),
        };
        &pattern[..end]
    }

    fn sequence(pattern: &str, text: &str, next: Next<'_>) -> bool {
        match pattern {
            "" => next(text),
            "$" => text.is_empty() && next(text),
            _ => {
                let atom = atom(pattern);
                let (min, max, rest) = quantifier(&pattern[atom.len()..]);
                repeat(atom, min, max, text, &|text| sequence(rest, text, next))
            }
        }
    }

    fn quantifier(pattern: &str) -> (usize, usize, &str) {
        match pattern.chars().next() {
            Some('?') => (0, 1, &pattern[1..]),
            Some('*') => (0, usize::MAX, &pattern[1..]),
            Some('+') => (1, usize::MAX, &pattern[1..]),
            Some('{') => {
                let (bounds, rest) = pattern[1..].split_once('}').unwrap();
                let (min, max) = bounds.split_once(',').unwrap_or((bounds, bounds));
                (min.parse().unwrap(), max.parse().unwrap(), rest)
            }
            _ => (1, 1, pattern),
        }
    }

    fn repeat(atom: &str, min: usize, max: usize, text: &str, next: Next<'_>) -> bool {
        if let Some(group) = atom.strip_prefix('(') {
            let group = &group[..group.len() - 1];
            let once_more = max > 0
                && alternatives(group, text, &|rest| {
                    repeat(atom, min.saturating_sub(1), max.saturating_sub(1), rest, next)
                });
            return once_more || (min == 0 && next(text));
        }
        let ends = text.char_indices().take(max.min(text.len())).take_while(|(_, c)| matches(atom, *c));
        let mut ends: Vec<usize> = ends.map(|(at, c)| at + c.len_utf8()).collect();
        ends.insert(0, 0);
        ends.iter().enumerate().rev().any(|(count, end)| count >= min && next(&text[*end..]))
    }

    fn matches(atom: &str, c: char) -> bool {
        let mut characters = atom.chars();
        match characters.next().unwrap() {
            '\\' => escape(characters.next().unwrap()).contains(&c),
            '.' => true,
            '[' => {
                let class = &atom[1..atom.len() - 1];
                let (negated, class) = class.strip_prefix('^').map_or((false, class), |class| (true, class));
                in_class(class, c) != negated
            }
            literal => literal == c,
        }
    }

    fn escape(escaped: char) -> Vec<char> {
        if escaped == 's' { vec![' ', '\t', '\n', '\r'] } else { vec![escaped] }
    }

    fn in_class(class: &str, c: char) -> bool {
        let characters: Vec<char> = class.chars().collect();
        let mut at = 0;
        while at < characters.len() {
            if at + 2 < characters.len() && characters[at + 1] == '-' {
                if (characters[at]..=characters[at + 2]).contains(&c) {
                    return true;
                }
                at += 3;
            } else {
                if characters[at] == c {
                    return true;
                }
                at += 1;
            }
        }
        false
    }

    #[test]
    fn patterns_match_as_in_other_engines() {
        for (pattern, matching, others) in [
            ("^a(b|cd)?$", &["a", "ab", "acd"][..], &["", "ac", "abb"][..]),
            ("^[0-9][0-9_]*(\\.[0-9]+)?[kM]?$", &["1", "1_0", "1.5k", "2M"], &["k", "_1", "1.", "1kk"]),
            ("\\$\\{[^}]*\\}", &["${A}", "x${A:-b}y"], &["$A", "${A"]),
            ("^[!-~]{1,3}$", &["a", "~!x"], &["", "a b", "abcd"]),
            ("^(a|b)+c$", &["abac"], &["c", "ab"]),
        ] {
            assert!(matching.iter().all(|text| is_match(pattern, text)), "{pattern}");
            assert!(!others.iter().any(|text| is_match(pattern, text)), "{pattern}");
        }
    }
}
