//! What a release changes in its environment, for people: one line for each value.

use std::collections::BTreeMap;

use serde_json::Value;

use super::api;
use super::render::Bundle;

/// Beyond so many lines nobody reads them.
const MOST: usize = 40;

/// Values by their places.
type Values = BTreeMap<String, String>;

pub fn lines(stable: Option<&Bundle>, candidate: &Bundle) -> Vec<String> {
    let before = stable.map_or_else(Values::new, values);
    let after = values(candidate);
    if before.is_empty() {
        let objects: Vec<String> = candidate.all().map(title).collect();
        return vec![format!("new: {}", objects.join(", "))];
    }
    let mut lines = Vec::new();
    for (place, value) in &after {
        match before.get(place) {
            Some(old) if old == value => {}
            Some(old) => lines.push(format!("~ {place}: {old} -> {value}")),
            None => lines.push(format!("+ {place}: {value}")),
        }
    }
    let gone = before.keys().filter(|place| !after.contains_key(*place));
    lines.extend(gone.map(|place| format!("- {place}")));
    let surplus = lines.len().saturating_sub(MOST);
    if surplus > 0 {
        lines.truncate(MOST);
        lines.push(format!("… and {surplus} more"));
    }
    lines
}

fn title(object: &Value) -> String {
    let kind = object["kind"].as_str().unwrap_or_default();
    format!("{kind} {}", api::name(object))
}

fn values(bundle: &Bundle) -> Values {
    let mut values = Values::new();
    for object in bundle.all() {
        // What differs between any two releases says nothing: their names, and what names them.
        let own = |text: &str| text.replace(bundle.id.short(), "RELEASE");
        let title = match object["kind"].as_str() {
            Some("ConfigMap") => format!("ConfigMap {}", without_hash(api::name(object))),
            _ => own(&title(object)),
        };
        for part in ["spec", "data"] {
            flatten(&format!("{title} {part}"), &object[part], &mut values);
        }
    }
    for value in values.values_mut() {
        *value = value.replace(bundle.id.short(), "RELEASE");
    }
    values
}

/// The hash that kustomize adds to a generated name is the content's.
fn without_hash(name: &str) -> &str {
    name.rsplit_once('-').map_or(name, |(name, _)| name)
}

fn flatten(place: &str, value: &Value, into: &mut Values) {
    match value {
        Value::Null => {}
        Value::Object(fields) => {
            for (name, value) in fields {
                flatten(&format!("{place}.{name}"), value, into);
            }
        }
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                // Where items have names, their order does not matter.
                let name = item["name"]
                    .as_str()
                    .map_or_else(|| i.to_string(), str::to_owned);
                flatten(&format!("{place}[{name}]"), item, into);
            }
        }
        // Of settings their keys are told, of other files their lines.
        Value::String(text) if text.contains('\n') => {
            if place.ends_with(".toml")
                && let Ok(settings) = toml::from_str(text)
            {
                return flatten(place, &settings, into);
            }
            for line in text
                .lines()
                .map(str::trim)
                .filter(|line| !line.is_empty() && !line.starts_with('#'))
            {
                let line = line.split(" #").next().unwrap_or(line);
                let (key, value) = line.split_once('=').unwrap_or((line, ""));
                into.insert(format!("{place}: {}", key.trim()), value.trim().to_owned());
            }
        }
        other => {
            into.insert(place.to_owned(), other.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn keys_of_one_name_are_told_apart_by_their_sections() {
        let text = "# told\n[redis]\nurl = \"a\" # there\n[[rabbitmq]]\nurl = \"b\"\n";
        let mut values = Values::new();
        flatten("data", &json!({ "default.toml": text }), &mut values);
        let all: Vec<_> = values.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(
            all,
            [
                "data.default.toml.rabbitmq[0].url=\"b\"",
                "data.default.toml.redis.url=\"a\""
            ]
        );
    }

    #[test]
    fn what_is_no_settings_is_told_by_its_lines() {
        let mut values = Values::new();
        flatten(
            "data",
            &json!({ "a.toml": "one = 1\ntwo =\n" }),
            &mut values,
        );
        assert_eq!(values.len(), 2, "{values:?}");
    }
}
