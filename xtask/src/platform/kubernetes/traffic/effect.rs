//! Whether a route is in effect: the environment itself is asked, until its answers say so.

use std::error::Error;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use reqwest::{RequestBuilder, Response};

use crate::http;

/// How long requests may take to follow a route.
const PATIENCE: Duration = Duration::from_secs(15);
const POLL: Duration = Duration::from_millis(50);
/// For one answer.
const ANSWER: Duration = Duration::from_secs(2);
/// Requests in a row that show that a route is in effect, on every one of a router's threads.
const IN_A_ROW: u32 = 20;
/// The header by which a rule of the rollout's own is asked, and in which its answers say so.
pub const PROBE_HEADER: &str = "x-xtask-probe";

/// What comes after a prefix that a rule matches, to ask it without asking for anything.
const NOTHING: &str = "xtask-probe";

/// A place that nothing is at, below a path.
pub fn below(path: &str) -> String {
    format!("{}/{NOTHING}", path.trim_end_matches('/'))
}

/// What to do about answers that do not name their release.
const NAMELESS: &str = "(a gateway that does not heed filters of backends, such as Traefik, can only \
     do without kubernetes.release_header)";

/// By what answers are recognised.
#[derive(Clone, Copy)]
pub enum Sign<'a> {
    /// One of these releases names itself in this header.
    Releases {
        header: &'a str,
        releases: &'a [&'a str],
    },
    /// The probe with this secret answers.
    Probe(&'a str),
    /// A backend answers the probe with this secret by gRPC, and cannot be told from others.
    Anybody(&'a str),
}

/// By what a route's requests come.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Http,
    Grpc,
}

impl Protocol {
    /// Where only the probe of a route's n-th rule answers.
    pub fn place_of_probe(self, number: usize) -> String {
        match self {
            Self::Http => format!("/{NOTHING}/{number}"),
            Self::Grpc => format!("/xtask.Probe/Rule{number}"),
        }
    }
}

/// From here nobody could be asked at all, which says nothing about the route.
#[derive(Debug)]
pub struct Unreachable;

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("it cannot be asked from here")
    }
}

impl Error for Unreachable {}

/// Who asks an environment.
pub struct Asking<'a> {
    client: reqwest::Client,
    protocol: Protocol,
    address: &'a str,
}

impl<'a> Asking<'a> {
    pub fn by(protocol: Protocol, address: &'a str) -> Result<Self> {
        let client = match protocol {
            Protocol::Http => http::client()?,
            Protocol::Grpc => http::grpc_client()?,
        };
        Ok(Self {
            client,
            protocol,
            address,
        })
    }

    /// Asks at a place until answers carry the sign.
    pub async fn until(&self, place: &str, sign: Sign<'_>) -> Result<()> {
        let url = format!("{}{place}", self.address);
        let (header, values) = match sign {
            Sign::Releases { header, releases } => (header, releases),
            Sign::Probe(ref secret) => (PROBE_HEADER, std::slice::from_ref(secret)),
            Sign::Anybody(_) => ("content-type", ["application/grpc"].as_slice()),
        };
        let is_it = |from: &str| match sign {
            Sign::Anybody(_) => values.iter().any(|value| from.starts_with(value)),
            _ => values.contains(&from),
        };
        let deadline = Instant::now() + PATIENCE;
        let mut in_a_row = 0;
        let (mut last, mut is_reached) = ("nobody".to_owned(), false);
        while in_a_row < IN_A_ROW {
            if Instant::now() > deadline {
                let why = format!(
                    "the router has taken the route, but {url} is still answered by {last}, not by {}",
                    values.join(" or ")
                );
                match is_reached {
                    true => bail!(why),
                    false => return Err(anyhow::Error::new(Unreachable).context(why)),
                }
            }
            let mut request = self.request(&url);
            if let Sign::Probe(secret) | Sign::Anybody(secret) = sign {
                request = request.header(PROBE_HEADER, secret);
            }
            let answer = request.send().await;
            is_reached |= answer.is_ok();
            let from = answer.as_ref().ok().filter(|answer| is_backends(answer));
            let from = from.and_then(|answer| {
                let name = answer.headers().get(header)?;
                name.to_str().ok().map(str::to_owned)
            });
            match from {
                Some(from) if is_it(&from) => in_a_row += 1,
                from => {
                    in_a_row = 0;
                    let wants_name = matches!(sign, Sign::Releases { .. });
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

    fn request(&self, url: &str) -> RequestBuilder {
        /// An empty message: not compressed, and no bytes long.
        const EMPTY: &[u8] = &[0; 5];
        let request = match self.protocol {
            Protocol::Grpc => self
                .client
                .post(url)
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .body(EMPTY),
            Protocol::Http => self.client.get(url),
        };
        request.timeout(ANSWER)
    }
}

/// Whether an answer is a backend's: a router that has none says so by HTTP's status, or by gRPC's.
fn is_backends(answer: &Response) -> bool {
    /// <https://grpc.github.io/grpc/core/md_doc_statuscodes.html>
    const UNAVAILABLE: &str = "14";
    let grpc = answer.headers().get("grpc-status");
    !answer.status().is_server_error() && grpc.is_none_or(|status| status != UNAVAILABLE)
}
