//! Weights of a Contour HTTPProxy.
//! <https://projectcontour.io/docs/1.33/config/request-routing/#upstream-weighting>

use serde_json::{Value, json};

use super::effect::{Protocol, below};
use super::weighted::{Shape, Taken};
use crate::platform::kubernetes::api::{self, Kind};

pub struct HttpProxy;

impl Shape for HttpProxy {
    fn kind(&self) -> Kind {
        Kind::new("projectcontour.io/v1", "HTTPProxy")
    }

    fn fields(&self) -> (&'static str, &'static str) {
        ("routes", "services")
    }

    fn mark(&self, part: &mut Value, header: &str, value: &str) {
        let header = json!({ "name": header, "value": value });
        match part["responseHeadersPolicy"]["set"].as_array_mut() {
            Some(headers) => headers.push(header),
            None => part["responseHeadersPolicy"]["set"] = json!([header]),
        }
    }

    fn restrict(&self, rule: &mut Value, _by: Protocol, place: &str, header: &str, value: &str) {
        let header = json!({ "name": header, "exact": value });
        rule["conditions"] = json!([{ "prefix": place }, { "header": header }]);
    }

    fn place(&self, rule: &Value, _by: Protocol) -> Option<String> {
        let mut conditions = api::items(&rule["conditions"]);
        let Some(first) = conditions.next() else {
            return Some(below("/"));
        };
        let place = match (first["prefix"].as_str(), first["exact"].as_str()) {
            (Some(prefix), None) => below(prefix),
            (None, Some(exact)) => exact.to_owned(),
            _ => return None,
        };
        conditions.next().is_none().then_some(place)
    }

    fn taken(&self, route: &Value, generation: u64) -> Taken {
        let valid = api::items(&route["status"]["conditions"]).find(|condition| {
            condition["type"] == "Valid"
                && condition["observedGeneration"].as_u64() >= Some(generation)
        });
        match valid {
            Some(valid) if valid["status"] == "True" => Taken::Yes,
            Some(_) => {
                let why = route["status"]["description"].as_str().unwrap_or_default();
                Taken::Refused(why.to_owned())
            }
            None => Taken::NotYet,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_asked_where_it_answers() {
        let place = |conditions: Value| {
            HttpProxy.place(&json!({ "conditions": conditions }), Protocol::Http)
        };
        assert_eq!(place(json!([])).as_deref(), Some("/xtask-probe"));
        let v1 = json!({ "prefix": "/v1" });
        assert_eq!(place(json!([v1])).as_deref(), Some("/v1/xtask-probe"));
        assert_eq!(place(json!([{ "exact": "/v1" }])).as_deref(), Some("/v1"));
        assert_eq!(place(json!([v1, { "header": {} }])), None);
        assert_eq!(place(json!([{ "regex": "/v." }])), None);
    }
}
