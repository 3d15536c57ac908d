//! Names that are not known, and what may have been meant.

use anyhow::anyhow;

/// What to say of a name that is none of those there are.
pub fn unknown<'a>(
    what: &str,
    name: &str,
    known: impl Iterator<Item = &'a str> + Clone,
) -> anyhow::Error {
    let hint = nearest(name, known.clone()).map_or_else(String::new, |nearest| {
        format!("; did you mean {nearest:?}?")
    });
    let known: Vec<&str> = known.collect();
    anyhow!(
        "there is no {what} {name:?}; there is {}{hint}",
        known.join(", ")
    )
}

/// The candidate that differs least from `name`, where one is close.
pub fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .map(|candidate| (edits(name, candidate), candidate))
        .min()
        .filter(|(edits, _)| *edits <= 1 + name.len() / 3)
        .map(|(_, candidate)| candidate)
}

/// Levenshtein's distance in bytes.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let substitution = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substitution.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
