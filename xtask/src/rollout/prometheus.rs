//! Counters from Prometheus, Thanos or Mimir, by their HTTP API.
//! <https://prometheus.io/docs/prometheus/latest/querying/api/#instant-queries>
//!
//! Processes are scraped one after another, each every `interval`, so their newest samples are of
//! different moments. Compared as they are, one process' ten seconds would stand against another's
//! twenty. So all counters are taken at one moment in the past, two intervals ago, between the
//! samples before and after it. Nothing is extrapolated: what is counted in one window is not
//! counted in the next, and sums are those of the processes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;
use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde::Deserialize;

use super::metrics::{Metrics, histogram};
use super::windows::Counts;
use crate::config::{Prometheus as Settings, Secret};
use crate::http;
use crate::platform::{InstanceCounts, Platform};
use crate::release::ReleaseId;

/// How far back the moment is at which counters are taken, in intervals: one scrape may fail.
const LAG: u32 = 2;
/// How far back samples are asked for, in intervals.
const RANGE: u32 = 5;
/// An answer that is larger has not been asked for with enough labels.
const LARGEST: usize = 16 << 20;

pub struct PrometheusMetrics<'a> {
    platform: &'a dyn Platform,
    server: Server,
    /// The environment's selectors.
    requests: String,
    errors: String,
    latency: Option<String>,
}

/// Where queries are sent, and as whom.
struct Server {
    settings: Settings,
    client: reqwest::Client,
    headers: HeaderMap,
}

/// Of a series' samples: seconds since the Unix epoch, and the value as text.
type Sample = (f64, String);

#[derive(Debug, Deserialize)]
struct Answer {
    status: String,
    #[serde(default)]
    error: String,
    #[serde(default)]
    warnings: Vec<String>,
    data: Option<Data>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Data {
    result_type: String,
    #[serde(default)]
    result: serde_json::Value,
}

#[derive(Debug, Deserialize)]
struct Series {
    metric: BTreeMap<String, String>,
    values: Vec<Sample>,
}

/// A process: its release's label, and its own name.
type Process = (String, String);

impl<'a> PrometheusMetrics<'a> {
    /// `values` are what `{names}` in queries stand for.
    pub fn open(
        settings: &Settings,
        values: &[(&str, &str)],
        platform: &'a dyn Platform,
    ) -> Result<Self> {
        let fill = |query: &String| {
            values.iter().fold(query.clone(), |query, (name, value)| {
                query.replace(&format!("{{{name}}}"), value)
            })
        };
        Ok(Self {
            platform,
            requests: fill(&settings.requests),
            errors: fill(&settings.errors),
            latency: settings.latency.as_ref().map(fill),
            server: Server::open(settings)?,
        })
    }
}

impl Server {
    fn open(settings: &Settings) -> Result<Self> {
        let mut headers = HeaderMap::new();
        for (name, value) in &settings.headers {
            let wrong = || format!("prometheus.headers.{name}");
            headers.insert(
                HeaderName::try_from(name).with_context(wrong)?,
                HeaderValue::try_from(value).with_context(wrong)?,
            );
        }
        Ok(Self {
            settings: settings.clone(),
            client: http::client()?,
            headers,
        })
    }

    /// The token, or the user's password; a file is read each time, as it may be a new one.
    fn password(&self) -> Result<Option<String>> {
        let secret = self.settings.secret.as_ref().map(Secret::read);
        secret.transpose().context("prometheus.secret")
    }

    /// The samples that a selector matches, up to `now`.
    async fn ask(&self, selector: &str, now: f64) -> Result<Vec<Series>> {
        let settings = &self.settings;
        let range = (settings.interval.0 * RANGE).as_millis();
        let url = format!("{}/api/v1/query", settings.url.trim_end_matches('/'));
        let timeout = settings.timeout.0;
        let mut request = self.client.get(&url).headers(self.headers.clone()).query(&[
            ("query", format!("{selector}[{range}ms]")),
            ("time", format!("{now:.3}")),
            ("timeout", format!("{}ms", timeout.as_millis())),
            // Thanos: half of the stores' answers is no answer.
            ("partial_response", "false".to_owned()),
        ]);
        request = match (self.password()?, &settings.username) {
            (Some(password), Some(user)) => request.basic_auth(user, Some(password)),
            (Some(token), None) => request.bearer_auth(token),
            (None, _) => request,
        };
        let answer = async {
            let mut response = request.timeout(timeout).send().await?;
            let status = response.status();
            let mut body = Vec::new();
            while let Some(chunk) = response.chunk().await? {
                body.extend_from_slice(&chunk);
                if body.len() > LARGEST {
                    break;
                }
            }
            Ok::<_, reqwest::Error>((status, body))
        };
        let (status, body) = answer.await.with_context(|| format!("asking {url}"))?;
        if body.len() > LARGEST {
            bail!("{url} answers with more than {LARGEST} bytes; select fewer series: {selector}");
        }
        read(status, &body).with_context(|| format!("{url} on {selector}"))
    }

    /// What each process had counted at `at`.
    fn sums(&self, series: &[Series], at: f64) -> Result<BTreeMap<Process, f64>> {
        let mut sums = BTreeMap::new();
        for (key, _, value) in self.values(series, at)? {
            *sums.entry(key).or_default() += value;
        }
        Ok(sums)
    }

    /// The series' values at `at`, with their process and all their labels. Of a process that has been
    /// started anew around then, what it had counted before and after is not to be told apart: it is
    /// left out.
    fn values<'s>(&self, series: &'s [Series], at: f64) -> Result<Vec<(Process, &'s Series, f64)>> {
        let (release, instance) = (&self.settings.release_label, &self.settings.instance_label);
        let (mut values, mut broken) = (Vec::new(), BTreeSet::new());
        for series in series {
            let label = |name: &String| {
                series.metric.get(name).cloned().with_context(|| {
                    let labels: Vec<&str> = series.metric.keys().map(String::as_str).collect();
                    format!("a series has no label {name}; it has {}", labels.join(", "))
                })
            };
            let process = (label(release)?, label(instance)?);
            match value_at(&series.values, at)? {
                Value::Counted(value) => values.push((process, series, value)),
                Value::NotYet => {}
                Value::Broken => drop(broken.insert(process)),
            }
        }
        values.retain(|(process, ..)| !broken.contains(process));
        Ok(values)
    }
}

#[async_trait]
impl Metrics for PrometheusMetrics<'_> {
    async fn sample(&self) -> Result<Vec<InstanceCounts>> {
        let now = jiff::Timestamp::now().as_millisecond() as f64 / 1000.0;
        let server = &self.server;
        let interval = server.settings.interval.0;
        let at = now - self.lag().as_secs_f64();
        let requests = server.ask(&self.requests, now).await?;
        check_age(&requests, now, interval)
            .with_context(|| format!("{} on {}", server.settings.url, self.requests))?;
        let counted = server.sums(&requests, at)?;
        let errors = server.sums(&server.ask(&self.errors, now).await?, at)?;
        let mut buckets: BTreeMap<Process, _> = BTreeMap::new();
        if let Some(latency) = &self.latency {
            for (key, series, value) in server.values(&server.ask(latency, now).await?, at)? {
                let bound = series
                    .metric
                    .get("le")
                    .and_then(|le| le.parse::<f64>().ok());
                let bound = bound.context("a series of prometheus.latency has no label le")?;
                let of_process: &mut std::collections::HashMap<u64, f64> =
                    buckets.entry(key).or_default();
                *of_process.entry(bound.to_bits()).or_default() += value;
            }
        }
        let status = self.platform.status().await?;
        let full = |label: &str| -> Option<ReleaseId> {
            let mut ids = status.releases.iter().map(|release| &release.release);
            ids.find(|id| id.short() == label || id.as_str() == label)
                .cloned()
        };
        let counts = counted.into_iter().filter_map(|(key, requests)| {
            Some(InstanceCounts {
                release: full(&key.0)?,
                counts: Counts {
                    requests: requests as u64,
                    errors: errors.get(&key).copied().unwrap_or(0.0) as u64,
                    latency: buckets.get(&key).and_then(histogram),
                },
                instance: key.1,
            })
        });
        Ok(counts.collect())
    }

    fn lag(&self) -> Duration {
        self.server.settings.interval.0 * LAG
    }
}

/// The series of an answer that is whole.
fn read(status: reqwest::StatusCode, body: &[u8]) -> Result<Vec<Series>> {
    let answer: Answer = match serde_json::from_slice(body) {
        Ok(answer) => answer,
        Err(_) if !status.is_success() => bail!("the answer is {status}"),
        Err(error) => return Err(error).context("the answer is not the query API's"),
    };
    if answer.status != "success" {
        bail!("{status}: {}", answer.error);
    }
    // Warnings tell of stores that did not answer.
    if let Some(warning) = answer.warnings.first() {
        bail!("the data is partial: {warning}");
    }
    let data = answer.data.context("the answer has no data")?;
    if data.result_type != "matrix" {
        bail!(
            "the answer is a {}, but a selector's samples are wanted: metric{{label=\"value\"}}",
            data.result_type
        );
    }
    serde_json::from_value(data.result).context("the answer is not the query API's")
}

/// Refuses samples that are all too old: then nothing is scraped any more.
fn check_age(series: &[Series], now: f64, interval: Duration) -> Result<()> {
    let newest = series
        .iter()
        .filter_map(|series| series.values.last())
        .map(|(time, _)| *time)
        .fold(f64::NEG_INFINITY, f64::max);
    if newest == f64::NEG_INFINITY {
        bail!("there are no samples: is the service scraped, and are the labels right?");
    }
    let age = now - newest;
    if age > (interval * LAG).as_secs_f64() {
        bail!(
            "the newest sample is {age:.0} s old, with an interval of {} s: nothing is scraped any \
             more, or the clocks differ",
            interval.as_secs_f64()
        );
    }
    Ok(())
}

/// A counter at a moment.
#[derive(Debug, PartialEq)]
enum Value {
    /// Between two of its samples.
    Counted(f64),
    /// Its process was not there, or had not counted that.
    NotYet,
    /// Its process has been started anew, or is gone.
    Broken,
}

fn value_at(samples: &[Sample], at: f64) -> Result<Value> {
    let number = |(_, text): &Sample| -> Result<f64> {
        let value: f64 = text
            .parse()
            .with_context(|| format!("a sample has the value {text:?}"))?;
        if !(value.is_finite() && value >= 0.0) {
            bail!("a counter has the value {text}");
        }
        Ok(value)
    };
    let after = samples.partition_point(|(time, _)| *time <= at);
    if after == 0 {
        return Ok(Value::NotYet);
    }
    let Some(later) = samples.get(after) else {
        return Ok(Value::Broken);
    };
    let earlier = &samples[after - 1];
    let (from, to) = (number(earlier)?, number(later)?);
    if to < from {
        return Ok(Value::Broken);
    }
    let part = (at - earlier.0) / (later.0 - earlier.0);
    Ok(Value::Counted(from + (to - from) * part))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[(f64, f64)]) -> Vec<Sample> {
        let text = |(time, value): &(f64, f64)| (*time, value.to_string());
        values.iter().map(text).collect()
    }

    #[test]
    fn counters_are_taken_at_one_moment() {
        let values = samples(&[(10.0, 100.0), (20.0, 200.0), (30.0, 400.0)]);
        let at = |at| value_at(&values, at).unwrap();
        assert_eq!(at(9.9), Value::NotYet);
        assert_eq!(at(10.0), Value::Counted(100.0));
        assert_eq!(at(15.0), Value::Counted(150.0));
        assert_eq!(at(25.0), Value::Counted(300.0));
        assert_eq!(at(30.0), Value::Broken, "it may be gone");
        let restarted = samples(&[(10.0, 100.0), (20.0, 4.0), (30.0, 8.0)]);
        assert_eq!(value_at(&restarted, 19.0).unwrap(), Value::Broken);
        assert_eq!(value_at(&restarted, 25.0).unwrap(), Value::Counted(6.0));
    }

    /// Processes that are scraped at different moments get equal windows all the same.
    #[test]
    fn windows_are_equal_whenever_processes_are_scraped() {
        let interval = 15.0;
        let counted = |offset: f64, from: f64, to: f64| {
            // 10 requests a second, scraped every 15 s from `offset` on.
            let times = (0..20).map(|i| offset + f64::from(i) * interval);
            let values: Vec<(f64, f64)> = times.map(|time| (time, time * 10.0)).collect();
            let values = samples(&values);
            let value = |at| match value_at(&values, at).unwrap() {
                Value::Counted(value) => value,
                other => panic!("{other:?}"),
            };
            value(to) - value(from)
        };
        for offset in [0.0, 3.0, 14.0] {
            let window = counted(offset, 100.0, 120.0);
            assert!((window - 200.0).abs() < 1e-6, "{offset}: {window}");
        }
    }

    #[test]
    fn what_is_no_whole_answer_is_an_error() {
        let ok = reqwest::StatusCode::OK;
        let refused = |status: u16, body: &str, wanted: &str| {
            let status = reqwest::StatusCode::from_u16(status).unwrap();
            let error = format!("{:#}", read(status, body.as_bytes()).unwrap_err());
            assert!(error.contains(wanted), "{body}: {error}");
        };
        refused(502, "<html>", "502 Bad Gateway");
        refused(200, "<html>", "not the query API's");
        refused(
            422,
            r#"{"status":"error","errorType":"bad_data","error":"parse error: unexpected"}"#,
            "parse error",
        );
        refused(
            200,
            r#"{"status":"success","data":{"resultType":"matrix","result":[]},"warnings":["store a"]}"#,
            "partial: store a",
        );
        refused(
            200,
            r#"{"status":"success","data":{"resultType":"scalar","result":[1,"1"]}}"#,
            "is a scalar",
        );
        let body = r#"{"status":"success","data":{"resultType":"matrix","result":[
            {"metric":{"pod":"a"},"values":[[10,"1"],[20.5,"NaN"]]}]}}"#;
        let series = read(ok, body.as_bytes()).unwrap();
        let error = value_at(&series[0].values, 15.0).unwrap_err().to_string();
        assert!(error.contains("NaN"), "{error}");
    }

    /// A process that is started anew begins without some of its series: what it had counted must not
    /// come as one window's.
    #[test]
    fn a_process_that_was_started_anew_is_left_out() {
        let series = |pod: &str, status: &str, values: &[(f64, f64)]| Series {
            metric: [("release", "a"), ("pod", pod), ("status", status)]
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .into(),
            values: samples(values),
        };
        let all = [
            series("old", "200", &[(10.0, 5.0), (20.0, 6.0), (30.0, 7.0)]),
            series("new", "200", &[(10.0, 100.0), (20.0, 3.0), (30.0, 4.0)]),
            series("new", "503", &[(10.0, 50.0)]),
        ];
        let server = server("http://localhost", "");
        let sums = |at| server.sums(&all, at).unwrap();
        let old = ("a".to_owned(), "old".to_owned());
        assert_eq!(sums(15.0), BTreeMap::from([(old.clone(), 5.5)]));
        // As long as a series of its is seen to have ended, it is not whole.
        assert_eq!(sums(25.0), BTreeMap::from([(old, 6.5)]));
    }

    /// Answers one request with `body`, after `delay`; what was asked is returned.
    fn serve(body: &'static str, delay: Duration) -> (String, std::thread::JoinHandle<String>) {
        use std::io::{Read, Write};
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/tenants/", listener.local_addr().unwrap());
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = Vec::new();
            let mut part = [0; 1024];
            while !asked.ends_with(b"\r\n\r\n") {
                let read = stream.read(&mut part).unwrap();
                asked.extend_from_slice(&part[..read]);
            }
            std::thread::sleep(delay);
            let length = body.len();
            // Whoever gave up waiting is not told.
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}"
            );
            String::from_utf8(asked).unwrap()
        });
        (url, thread)
    }

    fn server(url: &str, more: &str) -> Server {
        let settings: Settings = toml::from_str(&format!(
            "url = {url:?}\ninterval = \"15s\"\ntimeout = \"500ms\"\nrequests = \"r\"\n\
             errors = \"e\"\nrelease_label = \"release\"\ninstance_label = \"pod\"\n{more}"
        ))
        .unwrap();
        Server::open(&settings).unwrap()
    }

    const NOTHING: &str = r#"{"status":"success","data":{"resultType":"matrix","result":[]}}"#;

    #[tokio::test]
    async fn a_query_says_who_asks_and_for_whom() {
        let dir = tempfile::tempdir().unwrap();
        let token = dir.path().join("token");
        std::fs::write(&token, "s3cret\n").unwrap();
        let secret = format!("secret = {{ file = {:?} }}", token.display().to_string());
        let tenant = "headers = { X-Scope-OrgID = \"shop\" }";
        for (more, wanted) in [
            (
                format!("{secret}\n{tenant}"),
                "authorization: Bearer s3cret",
            ),
            (
                format!("username = \"xtask\"\n{secret}\n{tenant}"),
                "authorization: Basic eHRhc2s6czNjcmV0",
            ),
        ] {
            let (url, thread) = serve(NOTHING, Duration::ZERO);
            let series = server(&url, &more).ask("up{a=\"b\"}", 100.0).await.unwrap();
            assert!(series.is_empty());
            let asked = thread.join().unwrap();
            let path =
                "GET /tenants/api/v1/query?query=up%7Ba%3D%22b%22%7D%5B75000ms%5D&time=100.000";
            for part in [
                path,
                "partial_response=false",
                "x-scope-orgid: shop",
                wanted,
            ] {
                assert!(asked.contains(part), "{part}: {asked}");
            }
        }
    }

    #[tokio::test]
    async fn a_server_that_is_slow_is_given_up() {
        let (url, thread) = serve(NOTHING, Duration::from_secs(2));
        let error = server(&url, "").ask("up", 100.0).await.unwrap_err();
        let error = format!("{error:#}");
        assert!(
            error.contains("timed out") && error.contains(&url),
            "{error}"
        );
        thread.join().unwrap();
    }

    /// Where it is missing nothing is judged; but a rollback needs no metrics.
    #[tokio::test]
    async fn a_secret_that_is_missing_is_named() {
        let secret = "secret = { env = \"XTASK_TEST_NO_SUCH_VARIABLE\" }";
        let server = server("http://localhost", secret);
        let error = format!("{:#}", server.ask("up", 1.0).await.unwrap_err());
        assert!(error.contains("XTASK_TEST_NO_SUCH_VARIABLE"), "{error}");
    }

    #[test]
    fn samples_that_are_too_old_are_none() {
        let series = |newest: f64| Series {
            metric: BTreeMap::new(),
            values: samples(&[(newest, 1.0)]),
        };
        let interval = Duration::from_secs(15);
        check_age(&[series(1.0), series(980.0)], 1000.0, interval).unwrap();
        let old = check_age(&[series(900.0)], 1000.0, interval).unwrap_err();
        assert!(old.to_string().contains("100 s old"), "{old}");
        let none = check_age(&[], 1000.0, interval).unwrap_err();
        assert!(
            none.to_string().contains("is the service scraped"),
            "{none}"
        );
    }
}
