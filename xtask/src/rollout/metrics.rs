//! Where counts come from: one trait, so that the judge does not care.

use std::collections::HashMap;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use async_trait::async_trait;

use super::engine::Plan;
use super::exposition;
use super::prometheus::PrometheusMetrics;
use super::windows::{Counts, Histogram, Window};
use crate::config::{MetricsKind, Pipeline, Scrape as ScrapeSettings};
use crate::platform::{InstanceCounts, Platform};

/// Counters that only grow, for every instance of an environment.
#[async_trait]
pub trait Metrics: Send + Sync {
    async fn sample(&self) -> Result<Vec<InstanceCounts>>;

    /// The same for reports, which nothing is decided by.
    async fn totals(&self) -> Result<Vec<InstanceCounts>> {
        self.sample().await
    }

    /// How old a sample's counts are.
    fn lag(&self) -> Duration {
        Duration::ZERO
    }
}

/// What counts for an environment: what its settings say, or what its platform counts.
pub fn open<'a>(
    pipeline: &Pipeline,
    environment: &str,
    platform: &'a dyn Platform,
) -> Result<Box<dyn Metrics + 'a>> {
    let kind = pipeline.environment(environment)?.metrics;
    Ok(match kind.unwrap_or_else(|| platform.metrics()) {
        MetricsKind::Proxy => Box::new(ProxyMetrics { platform }),
        MetricsKind::Scrape => Box::new(ScrapeMetrics {
            platform,
            path: pipeline.service.metrics_path.clone(),
            names: pipeline.scrape.clone(),
        }),
        MetricsKind::Prometheus => {
            let settings = pipeline.prometheus()?;
            let namespace = pipeline.kubernetes(environment).map(|k| k.namespace);
            let values = [
                ("environment", environment),
                ("namespace", namespace.as_deref().unwrap_or_default()),
            ];
            Box::new(PrometheusMetrics::open(settings, &values, platform)?)
        }
    })
}

/// What the platform's proxy saw: failures of a process that died are in it too.
struct ProxyMetrics<'a> {
    platform: &'a dyn Platform,
}

#[async_trait]
impl Metrics for ProxyMetrics<'_> {
    async fn sample(&self) -> Result<Vec<InstanceCounts>> {
        self.platform.counts().await
    }
}

/// What the processes say of themselves. One that died takes its counts along.
struct ScrapeMetrics<'a> {
    platform: &'a dyn Platform,
    path: String,
    names: ScrapeSettings,
}

#[async_trait]
impl Metrics for ScrapeMetrics<'_> {
    async fn sample(&self) -> Result<Vec<InstanceCounts>> {
        scrape(self.platform, &self.path, &self.names).await
    }

    /// A proxy knows of failures of a process that died, too.
    async fn totals(&self) -> Result<Vec<InstanceCounts>> {
        self.platform.counts().await
    }
}

/// The counts of every instance that is ready, as it tells them at `path`.
pub async fn scrape(
    platform: &dyn Platform,
    path: &str,
    names: &ScrapeSettings,
) -> Result<Vec<InstanceCounts>> {
    let status = platform.status().await?;
    let mut samples = Vec::new();
    for release in &status.releases {
        for instance in release.instances.iter().filter(|instance| instance.ready) {
            let context = || format!("the metrics of {}", instance.name);
            let text = platform.ask(instance, path).await.with_context(context)?;
            samples.push(InstanceCounts {
                release: release.release.clone(),
                instance: instance.name.clone(),
                counts: parse(&text, names).with_context(context)?,
            });
        }
    }
    Ok(samples)
}

/// The counts in Prometheus' text format. A service that has had no request yet has no series:
/// that is a count of 0, but any other series must be there, or the address is a wrong one.
fn parse(text: &str, names: &ScrapeSettings) -> Result<Counts> {
    let samples = exposition::parse(text).context("reading Prometheus' text format")?;
    if samples.is_empty() {
        bail!("there is no metric at all");
    }
    let mut counts = Counts::default();
    let mut buckets: HashMap<u64, f64> = HashMap::new();
    let bucket = format!("{}_bucket", names.latency);
    for sample in &samples {
        if sample.name == names.requests {
            let value = sample.value;
            if !(value.is_finite() && value >= 0.0) {
                bail!("{} has the value {value}", sample.name);
            }
            let failed = sample
                .label(&names.error_label)
                .is_some_and(|label| label.starts_with(&names.error_prefix));
            counts.requests += value as u64;
            counts.errors += if failed { value as u64 } else { 0 };
        } else if sample.name == bucket
            && let Some(bound) = sample.label("le").and_then(|le| le.parse::<f64>().ok())
        {
            *buckets.entry(bound.to_bits()).or_default() += sample.value;
        }
    }
    counts.latency = histogram(&buckets);
    Ok(counts)
}

/// Cumulative buckets, keyed by the bits of their bound, as counts of each bucket.
pub fn histogram(buckets: &HashMap<u64, f64>) -> Option<Histogram> {
    let mut cumulative: Vec<(f64, u64)> = buckets
        .iter()
        .map(|(bound, count)| (f64::from_bits(*bound), *count as u64))
        .collect();
    cumulative.sort_by(|a, b| a.0.total_cmp(&b.0));
    if cumulative.last().is_none_or(|(bound, _)| bound.is_finite()) {
        return None;
    }
    let mut below = 0;
    let mut histogram = Histogram::default();
    for (bound, count) in cumulative {
        if bound.is_finite() {
            histogram.le.push(bound);
        }
        histogram.count.push(count.saturating_sub(below));
        below = count;
    }
    Some(histogram)
}

/// The window between two samples: stable's instances against the candidate's. An instance that
/// was not there before, or was not asked, counts from the next sample on: how much of what it
/// has counted belongs to this window cannot be known.
pub fn window(
    plan: &Plan,
    number: u64,
    seconds: f64,
    earlier: &[InstanceCounts],
    later: &[InstanceCounts],
) -> Window {
    let mut window = Window {
        number,
        seconds,
        ..Window::default()
    };
    for now in later {
        let then = earlier
            .iter()
            .find(|then| then.release == now.release && then.instance == now.instance);
        let Some(then) = then else { continue };
        let counts = now.counts.since(&then.counts);
        if now.release == plan.candidate {
            window.candidate.push(counts);
        } else if Some(&now.release) == plan.stable.as_ref() {
            window.baseline.push(counts);
        }
    }
    window
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prometheus_text_becomes_counts() {
        let names = ScrapeSettings {
            requests: "http_requests_total".into(),
            error_label: "status".into(),
            error_prefix: "5".into(),
            latency: "http_request_duration_seconds".into(),
        };
        let text = "\
# TYPE http_requests_total counter
http_requests_total{route=\"/a/{id}\",status=\"200\"} 90
http_requests_total{route=\"/a\",status=\"503\"} 10
# TYPE http_request_duration_seconds histogram
http_request_duration_seconds_bucket{route=\"/a\",le=\"0.1\"} 70
http_request_duration_seconds_bucket{route=\"/a\",le=\"+Inf\"} 90
http_request_duration_seconds_sum{route=\"/a\"} 3.5
http_request_duration_seconds_count{route=\"/a\"} 90
http_request_duration_seconds_bucket{route=\"/b\",le=\"0.1\"} 5
http_request_duration_seconds_bucket{route=\"/b\",le=\"+Inf\"} 10
http_request_duration_seconds_sum{route=\"/b\"} 3.5
http_request_duration_seconds_count{route=\"/b\"} 10
";
        let counts = parse(text, &names).unwrap();
        assert_eq!((counts.requests, counts.errors), (100, 10));
        assert_eq!(
            counts.latency,
            Some(Histogram {
                le: vec![0.1],
                count: vec![75, 25]
            })
        );
        assert!(parse("", &names).is_err());
        assert!(parse("http_requests_total NaN\n", &names).is_err());
    }
}
