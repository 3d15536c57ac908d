//! Routes with weighted backends, whatever their kind.
//!
//! A router learns of backends and of routes on separate ways. Where a route names a backend that
//! the router has not heard of yet, or has forgotten already, requests fail. So a backend is first
//! introduced without any traffic, and asked by a rule of its own until it answers; and one that
//! loses its traffic stays in the route with weight 0 until the next change.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use serde_json::{Value, json};

use super::{Known, Traffic, Weights, point};
use crate::config::{Kubernetes as Settings, Service};
use crate::http;
use crate::platform::kubernetes::api::{self, Api, Kind};
use crate::platform::kubernetes::fence::Fence;
use crate::platform::kubernetes::render::Bundle;

/// How long a router may take to say that it has taken a route.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long requests may take to follow a route.
const EFFECT: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(50);
const PROBE: Duration = Duration::from_secs(2);
/// Requests in a row that show that a route is in effect, on every one of a router's threads.
const PROBES: u32 = 20;
/// The header by which a rule of the rollout's own is asked, and in which its answers say so.
const PROBE_HEADER: &str = "x-xtask-probe";

/// What to do about answers that do not name their release.
const NAMELESS: &str = "(a gateway that does not heed filters of backends, such as Traefik, can only \
     do without kubernetes.release_header)";

/// What is particular to a kind of route.
pub trait Shape: Send + Sync {
    /// The kinds of objects, the usual one first.
    fn kinds(&self) -> Vec<Kind>;

    /// Below `spec`: the list of rules, and in a rule the list of backends.
    fn fields(&self) -> (&'static str, &'static str);

    /// Lets the answers of a rule, or of one of its backends, carry a header.
    fn mark(&self, part: &mut Value, header: &str, value: &str);

    /// Lets a rule only match requests with this header.
    fn restrict(&self, rule: &mut Value, header: &str, value: &str);

    /// Whether the router has taken this generation of the route, or why it does not.
    fn taken(&self, route: &Value, generation: u64) -> Taken;
}

pub enum Taken {
    Yes,
    NotYet,
    /// So far it refuses; what it lacks may come yet.
    Refused(String),
}

pub struct Weighted<S> {
    pub shape: S,
    pub settings: Settings,
    pub service: Service,
}

/// A backend of ours in a route: the short id of its release, and its weight.
type Backend = (String, u64);

/// A rule that leads to one release, and that only we know how to ask. What it answers shows that
/// this very version of the route is in effect.
struct Probe<'a> {
    short: &'a str,
    secret: &'a str,
}

/// By what answers are recognised.
enum Sign<'a> {
    /// One of these releases names itself.
    Releases(Vec<&'a str>),
    /// The probe with this secret answers.
    Probe(&'a str),
}

impl<S: Shape> Weighted<S> {
    async fn current(&self, api: &Api) -> Result<Option<Value>> {
        for kind in self.shape.kinds() {
            if let Some(route) = api.get(&kind, &self.settings.name).await? {
                return Ok(Some(route));
            }
        }
        Ok(None)
    }

    /// The backends of the first rule that leads to releases.
    fn backends(&self, route: &Value) -> Vec<Backend> {
        let (rules, backends) = self.shape.fields();
        let prefix = format!("{}-", self.settings.name);
        let ours = |rule: &Value| -> Vec<Backend> {
            api::items(&rule[backends])
                .filter_map(|backend| {
                    let short = backend["name"].as_str()?.strip_prefix(&prefix)?;
                    Some((short.to_owned(), backend["weight"].as_u64().unwrap_or(1)))
                })
                .collect()
        };
        api::items(&route["spec"][rules])
            .map(ours)
            .find(|backends| !backends.is_empty())
            .unwrap_or_default()
    }

    /// The route of the manifests with these backends, and a rule to probe it by.
    fn wanted(&self, route: &Value, split: &[Backend], probe: Option<&Probe<'_>>) -> Result<Value> {
        let (rules, backends) = self.shape.fields();
        let name = self.settings.name.as_str();
        let mut wanted = route.clone();
        let mut probes = Vec::new();
        let mut ours = 0;
        for rule in wanted["spec"][rules].as_array_mut().into_iter().flatten() {
            let like = api::items(&rule[backends])
                .find(|backend| backend["name"] == name)
                .cloned();
            // A rule that leads elsewhere is none of a rollout's business.
            let Some(like) = like else { continue };
            ours += 1;
            let backend = |short: &str, weight: u64| {
                let mut backend = like.clone();
                backend["name"] = json!(format!("{name}-{short}"));
                backend["weight"] = json!(weight);
                if let Some(header) = &self.settings.release_header {
                    self.shape.mark(&mut backend, header, short);
                }
                backend
            };
            if let Some(Probe { short, secret }) = probe {
                let mut own = rule.clone();
                own[backends] = json!([backend(short, 100)]);
                self.shape.restrict(&mut own, PROBE_HEADER, secret);
                self.shape.mark(&mut own, PROBE_HEADER, secret);
                probes.push(own);
            }
            rule[backends] = split
                .iter()
                .map(|(short, weight)| backend(short, *weight))
                .collect();
        }
        if ours == 0 {
            bail!(
                "{}: no rule of the route {} leads to the Service {name}",
                self.settings.overlay,
                api::name(route)
            );
        }
        if let Some(rules) = wanted["spec"][rules].as_array_mut() {
            rules.extend(probes);
        }
        Ok(wanted)
    }

    /// Applies the route and waits until it is taken. With `firm`, fields that somebody else has
    /// come to own are taken over, and told.
    async fn apply(&self, fence: &Fence<'_>, wanted: &Value, firm: bool) -> Result<Option<String>> {
        let (applied, taken_over) = match fence.apply(wanted).await {
            Err(error) if firm && api::is_owned_by_others(&error) => {
                (fence.take_over(wanted).await?, Some(format!("{error:#}")))
            }
            applied => (applied?, None),
        };
        let generation = applied["metadata"]["generation"].as_u64().unwrap_or(0);
        let kind = Kind::of(wanted)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let route = fence.api.get(&kind, api::name(wanted)).await?;
            let route = route.context("the route is gone")?;
            let taken = self.shape.taken(&route, generation);
            if matches!(taken, Taken::Yes) {
                return Ok(taken_over);
            }
            if Instant::now() > deadline {
                match taken {
                    Taken::Refused(why) => {
                        bail!("the route {} is refused: {why}", api::name(wanted))
                    }
                    _ => bail!(
                        "no router has taken the route {} within {} s: is there the one that it \
                         names, and is its controller running?",
                        api::name(wanted),
                        PATIENCE.as_secs()
                    ),
                }
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Asks the environment until its answers carry the sign: a router that says it has taken a
    /// route may yet act on the one before.
    async fn see(&self, sign: Sign<'_>) -> Result<()> {
        let release_header = self.settings.release_header.as_deref();
        let (header, values) = match &sign {
            Sign::Releases(releases) => (release_header.unwrap_or_default(), releases.clone()),
            Sign::Probe(secret) => (PROBE_HEADER, vec![*secret]),
        };
        let client = http::client()?;
        let address = self.settings.address.as_deref().unwrap_or_default();
        let url = format!("{address}{}", self.service.ready_path);
        let deadline = Instant::now() + EFFECT;
        let mut in_a_row = 0;
        let mut last = "nobody".to_owned();
        while in_a_row < PROBES {
            if Instant::now() > deadline {
                bail!(
                    "the router has taken the route, but {url} is still answered by {last}, not by \
                     {}",
                    values.join(" or ")
                );
            }
            let mut request = client.get(&url).timeout(PROBE);
            if let Sign::Probe(secret) = sign {
                request = request.header(PROBE_HEADER, secret);
            }
            let answer = request.send().await;
            let from = answer
                .as_ref()
                .ok()
                .filter(|answer| !answer.status().is_server_error());
            let from = from.and_then(|answer| {
                let name = answer.headers().get(header)?;
                name.to_str().ok().map(str::to_owned)
            });
            match from {
                Some(from) if values.contains(&from.as_str()) => in_a_row += 1,
                from => {
                    in_a_row = 0;
                    let wants_name = matches!(sign, Sign::Releases(_));
                    last = from.unwrap_or_else(|| match answer {
                        Ok(answer) if wants_name && answer.status().is_success() => {
                            format!("somebody without the header {header} {NAMELESS}")
                        }
                        Ok(answer) => format!("nobody ({})", answer.status()),
                        Err(error) => format!("nobody ({error})"),
                    });
                    tokio::time::sleep(POLL).await;
                }
            }
        }
        Ok(())
    }
}

#[async_trait]
impl<S: Shape> Traffic for Weighted<S> {
    async fn weights(&self, api: &Api, known: &Known) -> Result<Weights> {
        let Some(route) = self.current(api).await? else {
            return Ok(Vec::new());
        };
        let backends = self.backends(&route);
        let sum: u64 = backends.iter().map(|(_, weight)| weight).sum();
        Ok(backends
            .into_iter()
            .filter(|(_, weight)| *weight > 0)
            .filter_map(|(short, weight)| {
                let percent = (weight * 100 + sum / 2) / sum;
                let release = known.get(&short)?.clone();
                Some((release, u8::try_from(percent).unwrap_or(100)))
            })
            .collect())
    }

    async fn route(
        &self,
        fence: &Fence<'_>,
        bundle: &Bundle,
        front: &Value,
        weights: &Weights,
    ) -> Result<Option<String>> {
        let kinds = self.shape.kinds();
        let route = bundle
            .route
            .as_ref()
            .filter(|route| Kind::of(route).is_ok_and(|kind| kinds.contains(&kind)));
        let route = route.with_context(|| {
            format!(
                "{} renders no {} named {:?}, which kubernetes.traffic asks for",
                self.settings.overlay, kinds[0].kind, self.settings.name
            )
        })?;
        let current = self.current(fence.api).await?;
        let present = current
            .as_ref()
            .map_or_else(Vec::new, |route| self.backends(route));
        let is_served = present.iter().any(|(_, weight)| *weight > 0);
        let mut split: Vec<Backend> = weights
            .iter()
            .map(|(release, weight)| (release.short().to_owned(), u64::from(*weight)))
            .collect();
        let is_in =
            |backends: &[Backend], short: &str| backends.iter().any(|(other, _)| other == short);

        // One release for everything: nobody's edit of the route may keep a way back closed.
        let firm = weights.len() == 1;
        // One that got no traffic so far may be unknown to the router, even if it is in the route.
        let serves = |short: &str| {
            let mut backends = present.iter();
            backends.any(|(other, weight)| other == short && *weight > 0)
        };
        for (short, _) in split
            .iter()
            .filter(|(short, _)| is_served && !serves(short))
        {
            let mut introduced: Vec<Backend> = present.clone();
            introduced.retain(|(_, weight)| *weight > 0);
            introduced.push((short.clone(), 0));
            let secret = format!("{short}-{}", fence.token);
            let probe = Probe {
                short,
                secret: &secret,
            };
            let wanted = self.wanted(route, &introduced, Some(&probe))?;
            self.apply(fence, &wanted, firm).await?;
            self.see(Sign::Probe(&secret)).await?;
        }
        for (short, weight) in present {
            // What nobody gets requests from any more may go; what loses them just now stays.
            if weight > 0 && !is_in(&split, &short) {
                split.push((short, 0));
            }
        }
        // Those are ready by now; whoever is killed after the next write need not come back to this.
        point(fence, front, weights).await?;
        // Where answers do not name their release, the new route has a rule of its own to be seen by.
        let secret = format!("{}-{}", fence.token, json!(split));
        let secret: String = secret
            .chars()
            .filter(|c| c.is_ascii_alphanumeric())
            .collect();
        let probe = weights.last().map(|(release, _)| Probe {
            short: release.short(),
            secret: &secret,
        });
        let probe = probe.filter(|_| self.settings.release_header.is_none());
        let wanted = self.wanted(route, &split, probe.as_ref())?;
        let taken_over = self.apply(fence, &wanted, firm).await?;
        if probe.is_some() {
            self.see(Sign::Probe(&secret)).await?;
        } else if !weights.is_empty() {
            let releases = weights.iter().map(|(release, _)| release.short());
            self.see(Sign::Releases(releases.collect())).await?;
        }
        Ok(taken_over)
    }

    async fn settle(&self, fence: &Fence<'_>, stable: &Bundle) -> Result<()> {
        let Some(current) = self.current(fence.api).await? else {
            return Ok(());
        };
        if let Some(route) = &stable.route {
            let wanted = self.wanted(route, &self.backends(&current), None)?;
            self.apply(fence, &wanted, false).await?;
        }
        Ok(())
    }

    fn objects(&self) -> Vec<(Kind, String)> {
        let mut kinds = self.shape.kinds();
        kinds.push(Kind::new("v1", "Service"));
        kinds
            .into_iter()
            .map(|kind| (kind, self.settings.name.clone()))
            .collect()
    }
}
