//! Walking through YAML whose every node knows its place.

use saphyr::{MarkedYaml, YamlData};

pub type Node<'a> = MarkedYaml<'a>;

/// The value of a mapping's key.
pub fn get<'n, 'a>(node: &'n Node<'a>, name: &str) -> Option<&'n Node<'a>> {
    entries(node)
        .find(|(key, _)| key.data.as_str() == Some(name))
        .map(|(_, value)| value)
}

/// The keys and values of a mapping; none of anything else.
pub fn entries<'n, 'a>(node: &'n Node<'a>) -> impl Iterator<Item = (&'n Node<'a>, &'n Node<'a>)> {
    let entries = match &node.data {
        YamlData::Mapping(entries) => Some(entries.iter()),
        _ => None,
    };
    entries.into_iter().flatten()
}

/// The items of a list; none of anything else.
pub fn items<'n, 'a>(node: &'n Node<'a>) -> impl Iterator<Item = &'n Node<'a>> {
    match &node.data {
        YamlData::Sequence(items) => items.as_slice(),
        _ => &[],
    }
    .iter()
}

/// The text of a node; `None` where it is something else.
pub fn text<'n>(node: &'n Node<'_>) -> Option<&'n str> {
    node.data.as_str()
}

/// The line that a node begins on, from 1.
pub fn line(node: &Node<'_>) -> usize {
    node.span.start.line().max(1)
}
