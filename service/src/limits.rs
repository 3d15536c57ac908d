//! What one client may ask for, and what one process takes on: whatever is more is refused at once,
//! before it costs anything.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use axum::extract::{ConnectInfo, Request};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::response::{IntoResponse, Response};
use governor::clock::{Clock, DefaultClock};
use governor::middleware::StateInformationMiddleware;
use governor::state::keyed::DashMapStateStore;
use governor::{Quota, RateLimiter};
use ipnet::IpNet;
use moka::sync::Cache;
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::api::fault::Fault;
use crate::api::problem::Problem;
use crate::config::{Config, RateLimit};
use crate::metrics::METRICS;

static FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub static LIMIT: HeaderName = HeaderName::from_static("ratelimit");
pub static POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// Paths that whoever watches the service must always reach, by HTTP and by gRPC.
const EXEMPT: [&str; 2] = ["/health/", "/grpc.health.v1.Health/"];

pub fn is_exempt(request: &Request) -> bool {
    let path = request.uri().path();
    EXEMPT.iter().any(|exempt| path.starts_with(exempt))
}

/// Of so many requests that the process takes on, one may be somebody's whose token is being verified.
const STRANGERS: usize = 4;
/// Networks whose tokens were not believed that are remembered.
const MAX_DISTRUSTED: u64 = 10_000;

type Buckets =
    RateLimiter<Client, DashMapStateStore<Client>, DefaultClock, StateInformationMiddleware>;

/// Whose requests count together: those who said who they are, wherever they are, and the others by
/// where they are.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Client {
    Subject(String),
    Network(IpAddr),
}

impl Default for Client {
    fn default() -> Self {
        Self::Network(IpAddr::V6(Ipv6Addr::UNSPECIFIED))
    }
}

/// The limits of one process.
pub struct Limits {
    /// One bucket for each client: GCRA, which lets `burst` requests through at once and
    /// `per_second` in the long run.
    buckets: Buckets,
    clock: DefaultClock,
    settings: RateLimit,
    trusted: Vec<IpNet>,
    places: Semaphore,
    /// Of those whose token is being verified.
    strangers: Semaphore,
    /// Networks that have shown too many tokens which were not to be believed, and until when no more of
    /// them are looked at.
    distrusted: Cache<Client, Instant>,
}

impl Limits {
    pub fn new(config: &Config) -> Self {
        let settings = config.rate_limit.clone();
        let quota = Quota::per_second(settings.per_second).allow_burst(settings.burst);
        Self {
            buckets: RateLimiter::dashmap(quota).with_middleware(),
            clock: DefaultClock::default(),
            settings,
            trusted: config.server.trusted_proxies.clone(),
            places: Semaphore::new(config.server.max_in_flight.get()),
            strangers: Semaphore::new(config.server.max_in_flight.get().div_ceil(STRANGERS)),
            distrusted: Cache::new(MAX_DISTRUSTED),
        }
    }

    /// Forgets clients that have been quiet for so long that nothing counts against them.
    pub fn forget_quiet_clients(&self) {
        self.buckets.retain_recent();
        self.buckets.shrink_to_fit();
    }

    /// Where a request came from.
    pub fn network_of(&self, request: &Request) -> Client {
        let peer = request.extensions().get::<ConnectInfo<SocketAddr>>();
        let peer = peer.map_or(IpAddr::V6(Ipv6Addr::UNSPECIFIED), |peer| peer.0.ip());
        let address = address_of(peer, request.headers(), &self.trusted);
        Client::Network(network_of(address))
    }

    /// Counts a request: the requests that its client has left, or how long it has to wait.
    fn count(&self, client: &Client) -> Result<u32, Duration> {
        match self.buckets.check_key(client) {
            Ok(state) => Ok(state.remaining_burst_capacity()),
            Err(until) => Err(until.wait_time_from(self.clock.now())),
        }
    }

    /// Lets a client's request through, or refuses it: 429 where they ask for too much, 503 where this
    /// process has its hands full.
    #[expect(clippy::result_large_err, reason = "either way it is the answer")]
    pub fn admit(&self, client: &Client) -> Result<Admitted<'_>, Response> {
        self.enter(self.count(client))
    }

    /// A place for somebody whose token has yet to be verified, which costs more than most requests do, and
    /// may wait for its key: they have few, and none while their network has just shown too many that were
    /// not to be believed.
    #[expect(clippy::result_large_err, reason = "either way it is the answer")]
    pub fn place_for_stranger(&self, network: &Client) -> Result<SemaphorePermit<'_>, Response> {
        let until = self.distrusted.get(network);
        match until.and_then(|until| until.checked_duration_since(Instant::now())) {
            Some(wait) => Err(self.too_much(wait)),
            None => self.strangers.try_acquire().map_err(|_| overloaded()),
        }
    }

    /// The same as [`Self::admit`] for somebody whose token was not believed.
    #[expect(clippy::result_large_err, reason = "either way it is the answer")]
    pub fn admit_distrusted(&self, network: Client) -> Result<Admitted<'_>, Response> {
        let counted = self.count(&network);
        if let Err(wait) = counted {
            self.distrusted.insert(network, Instant::now() + wait);
        }
        self.enter(counted)
    }

    #[expect(clippy::result_large_err, reason = "either way it is the answer")]
    fn enter(&self, counted: Result<u32, Duration>) -> Result<Admitted<'_>, Response> {
        let left = counted.map_err(|wait| self.too_much(wait))?;
        let place = self.places.try_acquire().map_err(|_| {
            let mut refusal = overloaded();
            self.tell(refusal.headers_mut(), left, 1);
            refusal
        })?;
        Ok(Admitted(Some(Counted {
            limits: self,
            left,
            _place: place,
        })))
    }

    fn too_much(&self, wait: Duration) -> Response {
        refused("rate-limited");
        let seconds = wait.as_secs() + 1;
        let mut response = Problem::new(Fault::RateLimited).into_response();
        let headers = response.headers_mut();
        headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        self.tell(headers, 0, seconds);
        response
    }

    /// The fields that tell a client what it may do.
    /// <https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/>
    fn tell(&self, headers: &mut HeaderMap, left: u32, seconds: u64) {
        let (burst, rate) = (self.settings.burst, self.settings.per_second);
        let window = burst.get().div_ceil(rate.get());
        for (name, value) in [
            (&LIMIT, format!("\"client\";r={left};t={seconds}")),
            (&POLICY, format!("\"client\";q={burst};w={window}")),
        ] {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(name.clone(), value);
            }
        }
    }
}

/// Whoever has an IPv6 network has all of its addresses (RFC 6177), so they are one client.
fn network_of(client: IpAddr) -> IpAddr {
    match client {
        IpAddr::V4(_) => client,
        IpAddr::V6(address) => IpAddr::V6(Ipv6Addr::from_bits(
            address.to_bits() & !u128::from(u64::MAX),
        )),
    }
}

/// Who sent a request. What `X-Forwarded-For` says is believed as far as trusted proxies have written
/// it: each adds, at the end, whom it was called by. The rest anybody may have written.
fn address_of(peer: IpAddr, headers: &HeaderMap, trusted: &[IpNet]) -> IpAddr {
    let fields = headers.get_all(&FORWARDED_FOR);
    let fields = fields.iter().collect::<Vec<_>>().into_iter().rev();
    let mut hops = fields.flat_map(|field| field.to_str().unwrap_or_default().rsplit(','));
    let mut client = peer.to_canonical();
    while trusted.iter().any(|network| network.contains(&client)) {
        match hops.next().and_then(parsed) {
            Some(before) => client = before.to_canonical(),
            None => break,
        }
    }
    client
}

/// An address as proxies write it, some with a port.
fn parsed(text: &str) -> Option<IpAddr> {
    let text = text.trim();
    let with_port = || text.parse::<SocketAddr>().ok().map(|socket| socket.ip());
    text.parse().ok().or_else(with_port)
}

/// A request that was let through; its place in the process is its own until this goes. `None` for one
/// that was not counted.
#[must_use]
pub struct Admitted<'limits>(Option<Counted<'limits>>);

struct Counted<'limits> {
    limits: &'limits Limits,
    /// Requests that its client has left.
    left: u32,
    _place: SemaphorePermit<'limits>,
}

impl Admitted<'_> {
    pub fn uncounted() -> Self {
        Self(None)
    }

    /// Tells the client what it has left.
    pub fn tell(self, response: &mut Response) {
        if let Some(Counted { limits, left, .. }) = self.0 {
            limits.tell(response.headers_mut(), left, 1);
        }
    }
}

fn overloaded() -> Response {
    refused("overloaded");
    Problem::new(Fault::Overloaded).into_response()
}

fn refused(why: &'static str) {
    METRICS.http_refused.get_or_create(&[("why", why)]).inc();
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The client, for a peer, the fields that it sent, and whom to trust.
    fn found(peer: &str, fields: &[&str], trusted: &[&str]) -> String {
        let mut headers = HeaderMap::new();
        for field in fields {
            headers.append(&FORWARDED_FOR, HeaderValue::from_str(field).unwrap());
        }
        let trusted: Vec<IpNet> = trusted.iter().map(|text| text.parse().unwrap()).collect();
        address_of(peer.parse().unwrap(), &headers, &trusted).to_string()
    }

    #[test]
    fn only_trusted_proxies_are_believed() {
        let inside = ["10.0.0.0/8", "fd00::/8"];
        for (peer, fields, wanted) in [
            // Nobody trusts the peer: what it says is its own invention.
            ("9.9.9.9", &["1.1.1.1"][..], "9.9.9.9"),
            ("10.0.0.1", &[], "10.0.0.1"),
            ("10.0.0.1", &["1.1.1.1"], "1.1.1.1"),
            // What stands before the first address that is not trusted may be forged.
            ("10.0.0.1", &["7.7.7.7, 1.1.1.1, 10.0.0.2"], "1.1.1.1"),
            ("10.0.0.1", &["7.7.7.7", "1.1.1.1", "10.0.0.2"], "1.1.1.1"),
            ("10.0.0.1", &["10.0.0.3"], "10.0.0.3"),
            ("10.0.0.1", &["1.1.1.1, nonsense"], "10.0.0.1"),
            ("10.0.0.1", &["1.1.1.1:4711"], "1.1.1.1"),
            ("::ffff:10.0.0.1", &["1.1.1.1"], "1.1.1.1"),
            ("fd00::1", &["[2001:db8::7]:80"], "2001:db8::7"),
        ] {
            assert_eq!(found(peer, fields, &inside), wanted, "{peer} {fields:?}");
        }
    }

    #[test]
    fn a_network_is_one_client() {
        let bucket = |text: &str| network_of(text.parse().unwrap());
        assert_eq!(bucket("2001:db8:0:1::7"), bucket("2001:db8:0:1:ffff::9"));
        assert_ne!(bucket("2001:db8:0:1::7"), bucket("2001:db8:0:2::7"));
        assert_ne!(bucket("1.1.1.1"), bucket("1.1.1.2"));
    }
}
