//! Weights of a Gateway API HTTPRoute, and of a GRPCRoute beside it.
//! <https://gateway-api.sigs.k8s.io/reference/spec/#httpbackendref>

use serde_json::{Value, json};

use super::effect::{Protocol, below};
use super::weighted::{Shape, Taken};
use crate::platform::kubernetes::api::{self, Kind};

const VERSION: &str = "gateway.networking.k8s.io/v1";

pub struct Gateway;

impl Shape for Gateway {
    fn kind(&self) -> Kind {
        Kind::new(VERSION, "HTTPRoute")
    }

    fn grpc_kind(&self) -> Option<Kind> {
        Some(Kind::new(VERSION, "GRPCRoute"))
    }

    fn most_rules(&self) -> usize {
        16
    }

    fn fields(&self) -> (&'static str, &'static str) {
        ("rules", "backendRefs")
    }

    fn mark(&self, part: &mut Value, header: &str, value: &str) {
        let header = json!({ "name": header, "value": value });
        let kind = "ResponseHeaderModifier";
        // Of each kind there may be one filter.
        let mut filters = part["filters"].as_array().cloned().unwrap_or_default();
        match filters.iter_mut().find(|filter| filter["type"] == kind) {
            Some(filter) => {
                let set = &mut filter["responseHeaderModifier"]["set"];
                match set.as_array_mut() {
                    Some(set) => set.push(header),
                    None => *set = json!([header]),
                }
            }
            None => filters.push(json!({
                "type": kind, "responseHeaderModifier": { "set": [header] },
            })),
        }
        part["filters"] = filters.into();
    }

    fn restrict(&self, rule: &mut Value, by: Protocol, place: &str, header: &str, value: &str) {
        let mut only = json!({ "headers": [{ "name": header, "value": value }] });
        match (by, place.trim_start_matches('/').split_once('/')) {
            (Protocol::Grpc, Some((service, method))) => {
                only["method"] = json!({ "service": service, "method": method });
            }
            _ => only["path"] = json!({ "type": "Exact", "value": place }),
        }
        rule["matches"] = json!([only]);
    }

    fn place(&self, rule: &Value, by: Protocol) -> Option<String> {
        let mut matches = api::items(&rule["matches"]).peekable();
        if matches.peek().is_none() {
            return match by {
                Protocol::Http => Some(below("/")),
                Protocol::Grpc => Some(HEALTH.to_owned()),
            };
        }
        matches.find_map(|one| match by {
            Protocol::Http => http_place(one),
            Protocol::Grpc => grpc_place(one),
        })
    }

    /// Every parent must have taken this generation; a condition of an older one says nothing.
    fn taken(&self, route: &Value, generation: u64) -> Taken {
        let mut waits = false;
        let mut refused = None;
        for wanted in api::items(&route["spec"]["parentRefs"]) {
            let all = api::items(&route["status"]["parents"]);
            let mut is_taken = false;
            for parent in all.filter(|parent| is_same(&parent["parentRef"], wanted, route)) {
                let is = |name: &str, status: &str| {
                    api::items(&parent["conditions"]).find(|condition| {
                        condition["type"] == name
                            && condition["status"] == status
                            && condition["observedGeneration"].as_u64() >= Some(generation)
                    })
                };
                let no = is("Accepted", "False").or(is("ResolvedRefs", "False"));
                refused = refused.or(no.map(|condition| {
                    format!(
                        "by the gateway {}: {}: {}",
                        parent["parentRef"]["name"].as_str().unwrap_or_default(),
                        condition["reason"].as_str().unwrap_or_default(),
                        condition["message"].as_str().unwrap_or_default()
                    )
                }));
                is_taken |=
                    is("Accepted", "True").is_some() && is("ResolvedRefs", "True").is_some();
            }
            waits |= !is_taken;
        }
        match refused {
            _ if !waits => Taken::Yes,
            Some(why) => Taken::Refused(why),
            None => Taken::NotYet,
        }
    }
}

/// The standard health service, which every server has or says that it has not.
/// <https://github.com/grpc/grpc/blob/master/doc/health-checking.md>
const HEALTH: &str = "/grpc.health.v1.Health/Check";

fn asks_more_than_where(one: &Value) -> bool {
    ["headers", "queryParams"]
        .iter()
        .any(|field| api::items(&one[field]).next().is_some())
}

fn http_place(one: &Value) -> Option<String> {
    if asks_more_than_where(one) || !(one["method"].is_null() || one["method"] == "GET") {
        return None;
    }
    let path = one["path"]["value"].as_str().unwrap_or("/");
    match one["path"]["type"].as_str().unwrap_or("PathPrefix") {
        "PathPrefix" => Some(below(path)),
        "Exact" => Some(path.to_owned()),
        _ => None,
    }
}

/// Of methods nobody knows what they do, so only one that there is not is called.
fn grpc_place(one: &Value) -> Option<String> {
    let method = &one["method"];
    let is_exact = method["type"].as_str().unwrap_or("Exact") == "Exact";
    if asks_more_than_where(one) || !is_exact || !method["method"].is_null() {
        return None;
    }
    match method["service"].as_str() {
        Some(service) => Some(below(&format!("/{service}"))),
        None => Some(HEALTH.to_owned()),
    }
}

/// Whether two of a route's references are to the same parent.
fn is_same(one: &Value, other: &Value, route: &Value) -> bool {
    let namespace = |parent: &Value| match &parent["namespace"] {
        Value::Null => route["metadata"]["namespace"].clone(),
        named => named.clone(),
    };
    namespace(one) == namespace(other)
        && ["name", "sectionName", "port"]
            .iter()
            .all(|field| one[field] == other[field])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn route(observed: u64, resolved: &str) -> Value {
        let condition = |name: &str, status: &str| {
            json!({
                "type": name, "status": status, "observedGeneration": observed,
                "reason": "R", "message": "m",
            })
        };
        json!({
            "spec": { "parentRefs": [{ "name": "g" }] },
            "status": { "parents": [{
                "parentRef": { "name": "g" },
                "conditions": [condition("Accepted", "True"), condition("ResolvedRefs", resolved)],
            }] },
        })
    }

    #[test]
    fn an_older_generation_says_nothing() {
        assert!(matches!(Gateway.taken(&route(1, "True"), 2), Taken::NotYet));
        assert!(matches!(Gateway.taken(&route(2, "True"), 2), Taken::Yes));
        assert!(matches!(
            Gateway.taken(&route(2, "False"), 2),
            Taken::Refused(_)
        ));
        // Two answers about one parent are none about another.
        let mut two = route(2, "True");
        two["spec"]["parentRefs"] = json!([{ "name": "g" }, { "name": "g", "sectionName": "s" }]);
        let answer = two["status"]["parents"][0].clone();
        two["status"]["parents"] = json!([answer.clone(), answer.clone()]);
        assert!(matches!(Gateway.taken(&two, 2), Taken::NotYet));
        two["status"]["parents"][1]["parentRef"]["sectionName"] = json!("s");
        assert!(matches!(Gateway.taken(&two, 2), Taken::Yes));
        let silent = json!({ "spec": { "parentRefs": [{ "name": "g" }] } });
        assert!(matches!(Gateway.taken(&silent, 1), Taken::NotYet));
    }

    #[test]
    fn a_header_joins_those_that_are_set_already() {
        let own = json!({
            "type": "ResponseHeaderModifier",
            "responseHeaderModifier": { "set": [{ "name": "a", "value": "1" }] },
        });
        let mut rule = json!({ "filters": [own] });
        Gateway.mark(&mut rule, "b", "2");
        let set = json!([{ "name": "a", "value": "1" }, { "name": "b", "value": "2" }]);
        assert_eq!(rule["filters"][0]["responseHeaderModifier"]["set"], set);
        let mut bare = json!({});
        Gateway.mark(&mut bare, "b", "2");
        assert_eq!(bare["filters"].as_array().map(Vec::len), Some(1));
    }

    #[test]
    fn a_rule_that_is_restricted_is_met_by_nothing_else() {
        let headers = json!([{ "name": "h", "value": "v" }]);
        for (way, only) in [
            (
                Protocol::Http,
                json!([{ "path": { "type": "Exact", "value": "/a/b" }, "headers": headers }]),
            ),
            (
                Protocol::Grpc,
                json!([{ "method": { "service": "a", "method": "b" }, "headers": headers }]),
            ),
        ] {
            let mut rule = json!({ "matches": [{ "path": { "value": "/v1" } }] });
            Gateway.restrict(&mut rule, way, "/a/b", "h", "v");
            assert_eq!(rule["matches"], only);
        }
    }

    #[test]
    fn a_rule_is_asked_where_it_answers_and_nothing_is_done() {
        let http = |matches: Value| Gateway.place(&json!({ "matches": matches }), Protocol::Http);
        let path = |kind: &str| json!({ "path": { "type": kind, "value": "/v1/" } });
        assert_eq!(http(json!([])).as_deref(), Some("/xtask-probe"));
        assert_eq!(
            http(json!([path("PathPrefix")])).as_deref(),
            Some("/v1/xtask-probe")
        );
        assert_eq!(http(json!([path("Exact")])).as_deref(), Some("/v1/"));
        assert_eq!(http(json!([path("RegularExpression")])), None);
        let post = json!({ "method": "POST" });
        assert_eq!(http(json!([post])), None);
        assert_eq!(
            http(json!([post, { "method": "GET" }])).as_deref(),
            Some("/xtask-probe")
        );
        assert_eq!(http(json!([{ "headers": [{}] }])), None);

        let grpc = |method: Value| {
            let rule = json!({ "matches": [{ "method": method }] });
            Gateway.place(&rule, Protocol::Grpc)
        };
        assert_eq!(
            Gateway.place(&json!({}), Protocol::Grpc).as_deref(),
            Some(HEALTH)
        );
        assert_eq!(
            grpc(json!({ "service": "s" })).as_deref(),
            Some("/s/xtask-probe")
        );
        assert_eq!(grpc(json!({ "service": "s", "method": "Delete" })), None);
        assert_eq!(
            grpc(json!({ "service": "s", "type": "RegularExpression" })),
            None
        );
    }
}
