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

use super::effect::{Asking, Protocol, Sign, Unreachable};
use super::rules::{Backend, Probe, kind_of};
use super::{Bundles, Known, Split, Traffic, Weights, point};
use crate::config::Kubernetes as Settings;
use crate::platform::StaleWriter;
use crate::platform::kubernetes::api::{self, Api, Kind};
use crate::platform::kubernetes::fence::Fence;
use crate::platform::kubernetes::objects;
use crate::platform::kubernetes::render::{Bundle, grpc_route_name};

/// How long a router may take to say that it has taken a route.
const PATIENCE: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(50);

/// On a route whose split nobody has seen in effect yet.
const UNSEEN: &str = "xtask.dev/unseen";

/// What is particular to a kind of route.
pub trait Shape: Send + Sync {
    fn kind(&self) -> Kind;

    /// The kind for calls by gRPC, which may be split beside the other.
    fn grpc_kind(&self) -> Option<Kind> {
        None
    }

    /// How many rules a route may have.
    fn most_rules(&self) -> usize {
        usize::MAX
    }

    /// Below `spec`: the list of rules, and in a rule the list of backends.
    fn fields(&self) -> (&'static str, &'static str);

    /// Lets the answers of a rule, or of one of its backends, carry a header.
    fn mark(&self, part: &mut Value, header: &str, value: &str);

    /// Lets a rule match nothing but requests at this place with this header.
    fn restrict(&self, rule: &mut Value, by: Protocol, place: &str, header: &str, value: &str);

    /// Where a rule of the manifests can be asked without anything being done; `None` where it asks more of
    /// requests than to be somewhere.
    fn place(&self, rule: &Value, by: Protocol) -> Option<String>;

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
}

/// A route that is to be changed.
struct Way {
    /// As the manifests have it.
    manifest: Value,
    /// The backends that it has now.
    present: Vec<Backend>,
    protocol: Protocol,
}

impl Way {
    fn serves_any(&self) -> bool {
        self.present.iter().any(|(_, weight)| *weight > 0)
    }

    /// One that got no traffic so far may be unknown to the router, even if it is in the route.
    fn serves(&self, short: &str) -> bool {
        let mut backends = self.present.iter();
        backends.any(|(other, weight)| other == short && *weight > 0)
    }

    /// What is told of a router that does not follow, where that keeps nobody from going back: that it cannot
    /// be asked from here, and calls by gRPC, which must not hold up all others.
    fn excused(&self, seen: Result<()>, is_back: bool) -> Result<Option<String>> {
        let Err(error) = seen else { return Ok(None) };
        let is_excused = self.protocol == Protocol::Grpc || error.is::<Unreachable>();
        match is_back && is_excused && !error.is::<StaleWriter>() {
            true => Ok(Some(format!("{}: {error:#}", kind_of(&self.manifest)))),
            false => Err(error),
        }
    }
}

impl<S: Shape> Weighted<S> {
    /// The routes that a release's manifests have, the one that is looked at for the weights first.
    async fn ways(&self, api: &Api, bundle: &Bundle) -> Result<Vec<Way>> {
        let mut ways = Vec::new();
        for manifest in [&bundle.route, &bundle.grpc_route].into_iter().flatten() {
            let kind = Kind::of(manifest)?;
            let Some(protocol) = self.protocol(&kind) else {
                continue;
            };
            let current = api.get(&kind, api::name(manifest)).await?;
            ways.push(Way {
                // Where a release comes to nothing, what only it has brought along goes with it.
                manifest: match protocol {
                    Protocol::Grpc => objects::noted(manifest, current.as_ref(), &bundle.id),
                    Protocol::Http => manifest.clone(),
                },
                present: current.map_or_else(Vec::new, |route| self.backends(&route)),
                protocol,
            });
        }
        Ok(ways)
    }

    /// By what requests come to a kind of route, where it is one that is split.
    pub fn protocol(&self, kind: &Kind) -> Option<Protocol> {
        match kind {
            kind if *kind == self.shape.kind() => Some(Protocol::Http),
            kind if Some(kind) == self.shape.grpc_kind().as_ref() => Some(Protocol::Grpc),
            _ => None,
        }
    }

    /// Whether the answers of a probe can be told from others: a router that cannot name releases cannot mark
    /// answers by gRPC at all (Traefik refuses filters for a GRPCRoute's answers). Such a route is written
    /// before the other, and is seen with it.
    pub fn can_mark(&self, by: Protocol) -> bool {
        by == Protocol::Http || self.settings.release_header.is_some()
    }

    fn lacks_route(&self) -> String {
        format!(
            "{} renders no {} named {:?}, which kubernetes.traffic asks for",
            self.settings.overlay,
            self.shape.kind().kind,
            self.settings.name
        )
    }

    /// Nobody is left behind a route for calls by gRPC that the release which gets everything does without.
    async fn remove_grpc(&self, fence: &Fence<'_>) -> Result<()> {
        let Some(kind) = self.shape.grpc_kind() else {
            return Ok(());
        };
        let name = grpc_route_name(&self.settings);
        fence.remove_of(&self.settings.name, &kind, &name).await
    }

    /// Whoever looks at the weights may go on from them.
    async fn note_seen(&self, fence: &Fence<'_>) -> Result<()> {
        let seen = |route: &Value| {
            api::annotation(route, UNSEEN)?;
            Some(json!({ "metadata": { "annotations": { UNSEEN: null } } }))
        };
        fence
            .change(&self.shape.kind(), &self.settings.name, seen)
            .await
    }

    /// Writes the route; its generation, and what was taken over.
    async fn write(
        &self,
        fence: &Fence<'_>,
        wanted: &Value,
        weights: &Weights,
    ) -> Result<(u64, Option<String>)> {
        let (applied, taken_over) = super::apply(fence, wanted, weights).await?;
        let generation = applied["metadata"]["generation"].as_u64().unwrap_or(0);
        Ok((generation, taken_over))
    }

    /// Waits until the router says that it has taken the route.
    async fn taken(&self, api: &Api, way: &Way, generation: u64) -> Result<()> {
        let (kind, name) = (Kind::of(&way.manifest)?, api::name(&way.manifest));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let route = api.get(&kind, name).await?.context("the route is gone")?;
            let taken = self.shape.taken(&route, generation);
            if matches!(taken, Taken::Yes) {
                return Ok(());
            }
            if Instant::now() > deadline {
                match taken {
                    Taken::Refused(why) => bail!("the route {name} is refused: {why}"),
                    _ => bail!(
                        "no router has taken the route {name} within {} s: is there the one that it \
                         names, and is its controller running?",
                        PATIENCE.as_secs()
                    ),
                }
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Waits until a way is in effect: a router that says it has taken a route may yet act on the one
    /// before.
    async fn see(&self, way: &Way, sign: Sign<'_>) -> Result<()> {
        let (by, settings) = (way.protocol, &self.settings);
        let address = match (by, &settings.grpc_address) {
            (Protocol::Http, _) => settings.address.as_deref().unwrap_or_default(),
            (Protocol::Grpc, Some(address)) => address,
            (Protocol::Grpc, None) => {
                bail!("kubernetes.grpc_address is missing, so it cannot be asked")
            }
        };
        let asking = Asking::by(by, address)?;
        let sign = match sign {
            Sign::Probe(secret) if !self.can_mark(by) => Sign::Anybody(secret),
            sign => sign,
        };
        let places: Vec<String> = match sign {
            Sign::Probe(_) | Sign::Anybody(_) if !self.has_room(&way.manifest) => Vec::new(),
            Sign::Probe(_) | Sign::Anybody(_) => {
                let rules = self.ours(&way.manifest).enumerate();
                rules.map(|(n, _)| by.place_of_probe(n)).collect()
            }
            Sign::Releases { .. } => {
                let rules = self.ours(&way.manifest);
                rules
                    .filter_map(|rule| self.shape.place(rule, by))
                    .collect()
            }
        };
        for place in places {
            asking.until(&place, sign).await?;
        }
        Ok(())
    }

    /// Waits until a split between these releases is in effect.
    async fn follows(
        &self,
        api: &Api,
        way: &Way,
        written: &Written,
        releases: &[&str],
    ) -> Result<()> {
        self.taken(api, way, written.generation).await?;
        self.see(way, Sign::Probe(&written.secret)).await?;
        match &self.settings.release_header {
            Some(header) => self.see(way, Sign::Releases { header, releases }).await,
            None => Ok(()),
        }
    }
}

/// A split that a router was given.
struct Written {
    generation: u64,
    /// Of the rule to probe it by.
    secret: String,
}

#[async_trait]
impl<S: Shape> Traffic for Weighted<S> {
    async fn split(&self, api: &Api, known: &Known) -> Result<Split> {
        let route = api.get(&self.shape.kind(), &self.settings.name).await?;
        let Some(route) = route else {
            return Ok(Split::default());
        };
        let backends = self.backends(&route);
        let sum: u64 = backends.iter().map(|(_, weight)| weight).sum();
        let weights = backends
            .into_iter()
            .filter(|(_, weight)| *weight > 0)
            .filter_map(|(short, weight)| {
                let percent = (weight * 100 + sum / 2) / sum;
                let release = known.get(&short)?.clone();
                Some((release, u8::try_from(percent).unwrap_or(100)))
            })
            .collect();
        Ok(Split {
            weights,
            unseen: api::annotation(&route, UNSEEN).is_some(),
        })
    }

    async fn route(
        &self,
        fence: &Fence<'_>,
        bundle: &Bundle,
        front: &Value,
        weights: &Weights,
        bundles: &Bundles,
    ) -> Result<Option<String>> {
        let ways = self.ways(fence.api, bundle).await?;
        if ways.iter().all(|way| way.protocol == Protocol::Grpc) {
            bail!("{}", self.lacks_route());
        }
        // One release for everything: nobody's edit of the route may keep a way back closed.
        let is_back = weights.len() == 1;
        if is_back && bundle.grpc_route.is_none() {
            self.remove_grpc(fence).await?;
        }
        let split: Vec<Backend> = weights
            .iter()
            .map(|(release, weight)| (release.short().to_owned(), u64::from(*weight)))
            .collect();
        let mut told = Vec::new();
        for way in ways.iter().filter(|way| way.serves_any()) {
            for (short, _) in split.iter().filter(|(short, _)| !way.serves(short)) {
                let mut introduced: Vec<Backend> = way.present.clone();
                introduced.retain(|(_, weight)| *weight > 0);
                introduced.push((short.clone(), 0));
                let secret = format!("{short}-{}", fence.token);
                let probe = Probe {
                    short,
                    secret: &secret,
                };
                let wanted = self.wanted(&way.manifest, &introduced, Some(&probe), bundles);
                let (generation, _) = self.write(fence, &wanted, weights).await?;
                let seen = match self.taken(fence.api, way, generation).await {
                    Ok(()) => self.see(way, Sign::Probe(&secret)).await,
                    not_taken => not_taken,
                };
                told.extend(way.excused(seen, is_back)?);
            }
        }
        // Those are ready by now; whoever is killed after the next write need not come back to this.
        told.extend(point(fence, front, weights).await?);
        let releases: Vec<&str> = split.iter().map(|(short, _)| short.as_str()).collect();
        let mut unseen = Vec::new();
        // The one that is looked at for the weights comes last: what ends in between is done again.
        for way in ways.iter().rev() {
            let mut split = split.clone();
            for (short, weight) in &way.present {
                // What nobody gets requests from any more may go; what loses them just now stays.
                if *weight > 0 && !releases.contains(&short.as_str()) {
                    split.push((short.clone(), 0));
                }
            }
            // It has a rule of its own to be seen by: between two splits of the same releases, no other
            // answer tells which one is in effect.
            let secret = format!("{}-{}", fence.token, json!(split));
            let secret: String = secret
                .chars()
                .filter(|c| c.is_ascii_alphanumeric())
                .collect();
            let probe = releases.last().map(|short| Probe {
                short,
                secret: &secret,
            });
            let mut wanted = self.wanted(&way.manifest, &split, probe.as_ref(), bundles);
            if way.protocol == Protocol::Http {
                wanted["metadata"]["annotations"][UNSEEN] = json!("true");
            }
            let (generation, taken_over) = self.write(fence, &wanted, weights).await?;
            told.extend(taken_over);
            let written = Written { generation, secret };
            match weights.len() {
                0 => self.taken(fence.api, way, generation).await?,
                // Nothing waits for another way before it goes back.
                1 => unseen.push((way, written)),
                _ => self.follows(fence.api, way, &written, &releases).await?,
            }
        }
        for (way, written) in unseen.iter().rev() {
            let seen = self.follows(fence.api, way, written, &releases).await;
            told.extend(way.excused(seen, is_back)?);
        }
        self.note_seen(fence).await?;
        Ok((!told.is_empty()).then(|| told.join("; ")))
    }

    async fn settle(&self, fence: &Fence<'_>, stable: &Bundle, bundles: &Bundles) -> Result<()> {
        for way in self.ways(fence.api, stable).await? {
            if !way.present.is_empty() {
                let wanted = self.wanted(&way.manifest, &way.present, None, bundles);
                let (generation, _) = self.write(fence, &wanted, &Vec::new()).await?;
                let taken = self.taken(fence.api, &way, generation).await;
                way.excused(taken, true)?;
            }
        }
        Ok(())
    }

    fn check(&self, bundle: &Bundle) -> Result<()> {
        let (settings, kind) = (&self.settings, self.shape.kind());
        let kinds = |route: &Option<Value>| route.as_ref().map(Kind::of).transpose();
        if kinds(&bundle.route)?.as_ref() != Some(&kind) {
            bail!("{}", self.lacks_route());
        }
        if let Some(grpc) = kinds(&bundle.grpc_route)? {
            let name = grpc_route_name(settings);
            if Some(&grpc) != self.shape.grpc_kind().as_ref() {
                bail!(
                    "{}: beside a {} nothing splits the {} {name:?}",
                    settings.overlay,
                    kind.kind,
                    grpc.kind,
                );
            }
            if settings.grpc_address.is_none() {
                bail!(
                    "{} renders the {} {name:?}, and kubernetes.grpc_address is missing: where clients \
                     reach it",
                    settings.overlay,
                    grpc.kind,
                );
            }
        }
        for route in [&bundle.route, &bundle.grpc_route].into_iter().flatten() {
            self.check_rules(route)?;
        }
        Ok(())
    }

    fn objects(&self) -> Vec<(Kind, String)> {
        let name = &self.settings.name;
        let mut objects = vec![
            (self.shape.kind(), name.clone()),
            (Kind::new("v1", "Service"), name.clone()),
        ];
        let grpc = self.shape.grpc_kind().into_iter();
        objects.extend(grpc.map(|kind| (kind, grpc_route_name(&self.settings))));
        objects
    }
}
