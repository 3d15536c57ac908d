//! Whether a route is in effect: the environment itself is asked, until its answers say so.

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

/// What to do about answers that do not name their release.
const NAMELESS: &str = "(a gateway that does not heed filters of backends, such as Traefik, can only \
     do without kubernetes.release_header)";

/// By what answers are recognised.
pub enum Sign<'a> {
    /// One of these releases names itself in this header.
    Releases {
        header: &'a str,
        releases: &'a [&'a str],
    },
    /// The probe with this secret answers.
    Probe(&'a str),
}

/// How an environment is asked.
pub struct Asking {
    client: reqwest::Client,
    url: String,
    is_grpc: bool,
}

impl Asking {
    pub fn by_http(url: &str) -> Result<Self> {
        Ok(Self {
            client: http::client()?,
            url: url.to_owned(),
            is_grpc: false,
        })
    }

    /// By the standard health service. One that has none says so, and so is there.
    /// <https://github.com/grpc/grpc/blob/master/doc/health-checking.md>
    pub fn by_grpc(address: &str) -> Result<Self> {
        Ok(Self {
            client: http::grpc_client()?,
            url: format!("{address}/grpc.health.v1.Health/Check"),
            is_grpc: true,
        })
    }

    /// Asks until answers carry the sign.
    pub async fn until(&self, sign: Sign<'_>) -> Result<()> {
        let (header, values) = match sign {
            Sign::Releases { header, releases } => (header, releases),
            Sign::Probe(ref secret) => (PROBE_HEADER, std::slice::from_ref(secret)),
        };
        let deadline = Instant::now() + PATIENCE;
        let mut in_a_row = 0;
        let mut last = "nobody".to_owned();
        while in_a_row < IN_A_ROW {
            if Instant::now() > deadline {
                bail!(
                    "the router has taken the route, but {} is still answered by {last}, not by {}",
                    self.url,
                    values.join(" or ")
                );
            }
            let mut request = self.request();
            if let Sign::Probe(secret) = sign {
                request = request.header(PROBE_HEADER, secret);
            }
            let answer = request.send().await;
            let from = answer.as_ref().ok().filter(|answer| is_backends(answer));
            let from = from.and_then(|answer| {
                let name = answer.headers().get(header)?;
                name.to_str().ok().map(str::to_owned)
            });
            match from {
                Some(from) if values.contains(&from.as_str()) => in_a_row += 1,
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

    fn request(&self) -> RequestBuilder {
        /// An empty message: not compressed, and no bytes long.
        const EMPTY: &[u8] = &[0; 5];
        let request = match self.is_grpc {
            true => self
                .client
                .post(&self.url)
                .header("content-type", "application/grpc")
                .header("te", "trailers")
                .body(EMPTY),
            false => self.client.get(&self.url),
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
