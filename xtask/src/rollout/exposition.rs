//! Prometheus' text format, as far as counters and histograms need it.
//! <https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format>
//!
//! The crates there are take a brace within a label's value, as in `route="/orders/{id}"`, for the
//! labels' end, and then leave the sample out.

use anyhow::{Context, Result, bail};

/// One line: a name, labels, and a value.
#[derive(Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: Vec<(String, String)>,
    pub value: f64,
}

impl Sample {
    pub fn label(&self, name: &str) -> Option<&str> {
        let found = self.labels.iter().find(|(label, _)| label == name);
        found.map(|(_, value)| value.as_str())
    }
}

/// All samples; a line that is none is an error that shows it.
pub fn parse(text: &str) -> Result<Vec<Sample>> {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| sample(line).with_context(|| format!("in the metric {line:?}")))
        .collect()
}

fn sample(line: &str) -> Result<Sample> {
    let end = line
        .find(|c: char| c == '{' || c.is_whitespace())
        .context("there is no value")?;
    let (name, rest) = line.split_at(end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => labels(rest)?,
        None => (Vec::new(), rest),
    };
    let value = rest
        .split_whitespace()
        .next()
        .context("there is no value")?;
    Ok(Sample {
        name: name.to_owned(),
        labels,
        // Rust reads what Prometheus writes, NaN and +Inf included.
        value: value
            .parse()
            .with_context(|| format!("{value:?} is no number"))?,
    })
}

/// What is between the braces, and what comes after them.
fn labels(text: &str) -> Result<(Vec<(String, String)>, &str)> {
    let mut labels = Vec::new();
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([',', ' ']);
        if let Some(rest) = rest.strip_prefix('}') {
            return Ok((labels, rest));
        }
        let (name, quoted) = rest.split_once("=\"").context("a label has no value")?;
        let (value, after) = unquote(quoted)?;
        labels.push((name.trim().to_owned(), value));
        rest = after;
    }
}

/// A value up to its closing quote, and what comes after it.
fn unquote(text: &str) -> Result<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => match characters.next() {
                Some((_, 'n')) => value.push('\n'),
                Some((_, escaped)) => value.push(escaped),
                None => break,
            },
            other => value.push(other),
        }
    }
    bail!("a label's value has no end")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn braces_quotes_and_time_stamps() {
        let text = "# HELP a b\na{route=\"/v1/{id}\",q=\"say \\\"x\\\" \\\\\\n\"} 3 1700000000\nb +Inf\nc{} NaN\n";
        let samples = parse(text).unwrap();
        assert_eq!(samples[0].label("route"), Some("/v1/{id}"));
        assert_eq!(samples[0].label("q"), Some("say \"x\" \\\n"));
        assert_eq!(samples[0].value, 3.0);
        assert_eq!(samples[1].value, f64::INFINITY);
        assert!(samples[2].value.is_nan());
        for wrong in ["a", "a{", "a{b=\"c} 1", "a{b} 1", "a x"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn any_label_comes_back(value in ".*") {
            let escaped = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
            // Other ends of lines cannot be in a line.
            prop_assume!(!escaped.contains(['\r', '\u{b}', '\u{c}', '\u{85}', '\u{2028}', '\u{2029}']));
            let samples = parse(&format!("a{{b=\"{escaped}\"}} 1")).unwrap();
            prop_assert_eq!(samples[0].label("b"), Some(value.as_str()));
        }

        #[test]
        fn nothing_panics(text in ".*") {
            let _ = parse(&text);
        }
    }
}
