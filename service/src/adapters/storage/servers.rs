//! Several PostgreSQL servers with one database, of which one takes writes, as libpq's
//! `target_session_attrs=read-write` has them.
//! <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-MULTIPLE-HOSTS>

use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use futures_util::future::join_all;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection, PgPool};

use crate::config::Database;

/// How often the one that takes writes is asked whether it still does.
const LOOK: Duration = Duration::from_millis(500);
/// So many looks later the others are asked, too: one that was cut off may not know that it has been
/// replaced.
const ALL: u32 = 10;

/// The timeline that a server writes, eight hexadecimal digits that grow with each promotion; null where
/// it takes no writes.
const TIMELINE: &str = "SELECT CASE WHEN current_setting('transaction_read_only') = 'off'
     THEN substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END";

/// The servers of `database.url`.
pub(super) struct Servers {
    all: Vec<PgConnectOptions>,
    /// Whether one that takes no writes will do.
    reads_only: bool,
    limit: Duration,
}

/// When another server took over.
#[derive(Clone, Default)]
pub(super) struct Switched(Arc<Mutex<Option<Instant>>>);

impl Servers {
    /// The servers of `postgres://USER@HOST:PORT,HOST:PORT/DATABASE`.
    pub(super) fn of(config: &Database) -> anyhow::Result<Self> {
        let read = |url: String| {
            let options = PgConnectOptions::from_str(&url)?;
            let options = options.application_name(env!("CARGO_PKG_NAME"));
            anyhow::Ok(match config.read_only {
                true => options.options([("default_transaction_read_only", "on")]),
                false => options,
            })
        };
        let all: anyhow::Result<Vec<_>> =
            each(&config.url.0).and_then(|urls| urls.into_iter().map(read).collect());
        Ok(Self {
            all: all.with_context(|| format!("reading database.url = {}", config.url))?,
            reads_only: config.read_only,
            limit: config.acquire_timeout.0,
        })
    }

    pub(super) fn are_several(&self) -> bool {
        self.all.len() > 1
    }

    /// The one that takes writes. Of several that believe to, the one that was promoted last; a single
    /// server is taken as it is.
    pub(super) async fn primary(&self) -> anyhow::Result<PgConnectOptions> {
        let asked = join_all(self.all.iter().map(|server| self.ask(server))).await;
        let takes_any = self.reads_only || !self.are_several();
        let (mut best, mut reasons) = (None, Vec::new());
        for (server, answer) in self.all.iter().zip(asked) {
            let place = place(server);
            match answer {
                Ok(timeline) if timeline.is_some() || takes_any => {
                    if best.as_ref().is_none_or(|(newest, _)| timeline > *newest) {
                        best = Some((timeline, server));
                    }
                }
                Ok(_) => reasons.push(format!("{place} takes no writes")),
                Err(error) => reasons.push(format!("{place}: {error:#}")),
            }
        }
        match best {
            Some((_, server)) => Ok(server.clone()),
            None => bail!("{}", reasons.join("; ")),
        }
    }

    async fn ask(&self, server: &PgConnectOptions) -> anyhow::Result<Option<String>> {
        let asked = async {
            let mut connection = PgConnection::connect_with(server).await?;
            let answer = match self.are_several() {
                true => timeline(&mut connection).await?,
                false => None,
            };
            // It has served its purpose, however its end goes.
            let _ = connection.close().await;
            Ok(answer)
        };
        let answer = tokio::time::timeout(self.limit, asked).await;
        answer.unwrap_or_else(|_| bail!("no answer within {:?}", self.limit))
    }

    /// Leads the pools to whichever server takes writes, for as long as this is polled.
    pub(super) async fn follow(self, pools: [PgPool; 2], switched: Switched) {
        let mut connection = None;
        for look in 1.. {
            tokio::time::sleep(LOOK).await;
            let current = pools[0].connect_options();
            if look % ALL != 0 && self.still_serves(&mut connection, &current).await {
                continue;
            }
            match self.primary().await {
                Ok(next) if place(&next) == place(&current) => {}
                Ok(next) => {
                    let (from, to) = (place(&current), place(&next));
                    tracing::warn!(from, to, "another database server takes the writes");
                    metrics::counter!("database_failovers_total").increment(1);
                    for pool in &pools {
                        pool.set_connect_options(next.clone());
                    }
                    switched.now();
                    connection = None;
                }
                Err(error) => {
                    tracing::warn!(
                        error = format!("{error:#}"),
                        "no database server takes writes"
                    );
                }
            }
        }
    }

    /// Asks on a connection that is kept.
    async fn still_serves(
        &self,
        kept: &mut Option<PgConnection>,
        server: &PgConnectOptions,
    ) -> bool {
        let asked = async {
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => PgConnection::connect_with(server).await?,
            };
            let answer = timeline(&mut connection).await?;
            Ok::<_, sqlx::Error>((connection, answer))
        };
        match tokio::time::timeout(self.limit, asked).await {
            Ok(Ok((connection, answer))) => {
                *kept = Some(connection);
                self.reads_only || answer.is_some()
            }
            _ => false,
        }
    }
}

impl Switched {
    fn now(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// Whether a connection of this age may lead to the server of before; `margin` is how long it may
    /// have taken to connect.
    pub(super) fn outdates(&self, age: Duration, margin: Duration) -> bool {
        let last = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.is_some_and(|last| age + margin > last.elapsed())
    }
}

async fn timeline(connection: &mut PgConnection) -> sqlx::Result<Option<String>> {
    sqlx::query_scalar(TIMELINE).fetch_one(connection).await
}

fn place(server: &PgConnectOptions) -> String {
    format!("{}:{}", server.get_host(), server.get_port())
}

/// The addresses of each server alone.
fn each(url: &str) -> anyhow::Result<Vec<String>> {
    let Some((scheme, rest)) = url.split_once("://") else {
        return Ok(vec![url.to_owned()]);
    };
    let (place, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let (user, hosts) = match place.rsplit_once('@') {
        Some((user, hosts)) => (format!("{user}@"), hosts),
        None => (String::new(), place),
    };
    let hosts: Vec<&str> = hosts.split(',').collect();
    ensure!(
        hosts.len() == 1 || hosts.iter().all(|host| !host.is_empty()),
        "a host is missing beside a comma"
    );
    let one = |host: &&str| format!("{scheme}://{user}{host}{path}");
    Ok(hosts.iter().map(one).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_those_of_libpq() {
        let read = |url| each(url).map_err(|error| error.to_string());
        let urls = |urls: &[&str]| Ok(urls.iter().map(|url| (*url).to_owned()).collect());
        assert_eq!(
            read("postgres://ada@one,two:5433/db?sslmode=require"),
            urls(&[
                "postgres://ada@one/db?sslmode=require",
                "postgres://ada@two:5433/db?sslmode=require",
            ])
        );
        for single in ["postgres://one", "postgres:///db?host=/run", "postgres:x"] {
            assert_eq!(read(single), urls(&[single]));
        }
        assert!(read("postgres://one,/db").unwrap_err().contains("missing"));
    }
}
