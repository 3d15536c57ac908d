//! Weights of a Contour HTTPProxy.
//! <https://projectcontour.io/docs/1.33/config/request-routing/#upstream-weighting>

use serde_json::{Value, json};

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

    fn restrict(&self, rule: &mut Value, header: &str, value: &str) {
        let condition = json!({ "header": { "name": header, "exact": value } });
        match rule["conditions"].as_array_mut() {
            Some(conditions) => conditions.push(condition),
            None => rule["conditions"] = json!([condition]),
        }
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
