//! Several PostgreSQL servers with one database, of which one is the primary, as libpq knows them.
//! <https://www.postgresql.org/docs/current/libpq-connect.html#LIBPQ-MULTIPLE-HOSTS>
//!
//! Which one it is only the servers know, and one that was cut off may not know that it has been replaced.
//! What tells is the timeline, whose number grows with each promotion: to a lower one than has been seen
//! nothing goes back.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use futures_util::future::join_all;
use sqlx::postgres::PgConnectOptions;
use sqlx::{Connection, PgConnection};

use crate::config::Database;
use crate::metrics::METRICS;

/// How often the primary is asked whether it still is.
const LOOK: Duration = Duration::from_millis(500);
/// So many looks later the others are asked, too.
const ALL: u32 = 10;
/// For the primary's answer. By then the others are asked.
const ANSWER: Duration = Duration::from_secs(1);

/// The timeline that a server writes, eight hexadecimal digits; null for a standby.
const TIMELINE: &str = "SELECT CASE WHEN NOT pg_is_in_recovery()
     THEN substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8) END";

/// The servers of `database.url`.
pub(super) struct Servers {
    all: Vec<PgConnectOptions>,
    /// Whether a standby will do where there is no primary.
    reads_only: bool,
    limit: Duration,
}

/// The server that is used.
pub(super) struct Primary {
    pub(super) options: PgConnectOptions,
    /// `None` for a standby, and where there is but one server.
    timeline: Option<String>,
}

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
        let all = each(&config.url.0).and_then(|urls| {
            let all = urls.into_iter().map(read).collect::<Result<Vec<_>, _>>()?;
            for (number, server) in all.iter().enumerate() {
                let mut before = all[..number].iter().map(place);
                let twice = before.any(|other| other == place(server));
                ensure!(!twice, "the server {} is there twice", place(server));
            }
            Ok(all)
        });
        Ok(Self {
            all: all.with_context(|| format!("reading database.url = {}", config.url))?,
            reads_only: config.read_only,
            limit: config.acquire_timeout.0,
        })
    }

    pub(super) fn are_several(&self) -> bool {
        self.all.len() > 1
    }

    /// The primary; of several that believe to be it, the one that was promoted last, and none that had
    /// been replaced by the timeline `newest`. A single server is taken as it is.
    pub(super) async fn primary(&self, newest: Option<&str>) -> anyhow::Result<Primary> {
        let asked = join_all(self.all.iter().map(|server| self.ask(server))).await;
        let takes_standby = self.reads_only || !self.are_several();
        let (mut best, mut reasons) = (None::<Primary>, Vec::new());
        for (server, answer) in self.all.iter().zip(asked) {
            let place = place(server);
            match answer {
                Err(error) => reasons.push(format!("{place}: {error:#}")),
                Ok(None) if !takes_standby => reasons.push(format!("{place} is a standby")),
                Ok(timeline) if timeline.is_some() && timeline.as_deref() < newest => {
                    reasons.push(format!("{place} has been replaced"));
                }
                Ok(timeline) => {
                    if best.as_ref().is_none_or(|best| best.timeline < timeline) {
                        let options = server.clone();
                        best = Some(Primary { options, timeline });
                    }
                }
            }
        }
        best.with_context(|| reasons.join("; "))
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

    /// Calls `switch` each time that another server is the primary, for as long as this is polled.
    pub(super) async fn follow(self, mut current: Primary, switch: impl Fn(PgConnectOptions)) {
        let (mut connection, mut is_lost) = (None, false);
        for look in 1.. {
            tokio::time::sleep(LOOK).await;
            let serves = still_serves(&mut connection, &current).await;
            if serves && look % ALL != 0 {
                is_lost = false;
                continue;
            }
            match self.primary(current.timeline.as_deref()).await {
                Ok(next) => {
                    is_lost = false;
                    let is_newer = next.timeline > current.timeline;
                    let is_other = place(&next.options) != place(&current.options);
                    // Whoever serves is left only for one that has been promoted since.
                    if is_newer || (is_other && !serves) {
                        let (from, to) = (place(&current.options), place(&next.options));
                        tracing::warn!(from, to, "another database server is the primary");
                        METRICS.database_failovers.inc();
                        switch(next.options.clone());
                        (current, connection) = (next, None);
                    }
                }
                Err(error) if !serves => {
                    let error = format!("{error:#}");
                    if !is_lost {
                        tracing::warn!(error, "no database server is the primary");
                    }
                    is_lost = true;
                }
                Err(_) => {}
            }
        }
    }
}

/// Asks on a connection that is kept whether the server is what it was.
async fn still_serves(kept: &mut Option<PgConnection>, server: &Primary) -> bool {
    let asked = async {
        let mut connection = match kept.take() {
            Some(connection) => connection,
            None => PgConnection::connect_with(&server.options).await?,
        };
        let answer = timeline(&mut connection).await?;
        Ok::<_, sqlx::Error>((connection, answer))
    };
    match tokio::time::timeout(ANSWER, asked).await {
        Ok(Ok((connection, answer))) => {
            *kept = Some(connection);
            answer == server.timeline
        }
        _ => false,
    }
}

async fn timeline(connection: &mut PgConnection) -> sqlx::Result<Option<String>> {
    sqlx::query_scalar(TIMELINE).fetch_one(connection).await
}

fn place(server: &PgConnectOptions) -> String {
    match server.get_socket() {
        Some(socket) => format!("{}:{}", socket.display(), server.get_port()),
        None => format!("{}:{}", server.get_host(), server.get_port()),
    }
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
