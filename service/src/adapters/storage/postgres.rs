//! The adapter for PostgreSQL.

use std::collections::HashSet;
use std::future::{Ready, ready};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use async_trait::async_trait;
use jiff::Timestamp;
use sqlx::postgres::{PgConnectOptions, PgPoolOptions};
use sqlx::{Connection, Executor, PgConnection, Transaction};
use tokio_util::task::AbortOnDropHandle;
use uuid::Uuid;

use super::abandoned::watched;
use super::finding;
use super::gathered::Gathered;
use super::migrations::POSTGRES as MIGRATIONS;
use super::placing::{self, Again};
use super::pools::{Both, Handed, Pools};
use super::rows::{Placement, TotalOf};
use super::servers::Servers;
use super::sql::storage_in_sql;
use super::{
    Backlog, Change, Connections, DeadLetter, Once, Placed, Storage, StorageError, Untold,
    abandoned, contacts, rows,
};
use crate::adapters::lock::Fence;
use crate::audit::{self, Entry};
use crate::config::{CircuitBreaker, Database, Timeout};
use crate::domain::events::{Cause, Event, Kind};
use crate::domain::orders::{Order, OrderId, Total};
use crate::failpoint;
use crate::keyring::Keyring;

/// Milliseconds since the Unix epoch, by the database's clock.
const NOW: &str = "(extract(epoch FROM clock_timestamp()) * 1000)::bigint";

/// A connection that nobody has used for longer is asked whether it is alive before it is used.
const TRUSTED_FOR: Duration = Duration::from_secs(1);

/// Where a connection is lost in the middle of a transaction the server does not know it, and the
/// transaction's locks would make everybody wait who does the same again. Nor does it know that nobody
/// waits for a statement any more.
fn limits(config: &Database) -> String {
    let statement = config.statement_timeout.0.as_millis();
    format!(
        "SET idle_in_transaction_session_timeout = '5s'; SET statement_timeout = '{statement}ms'"
    )
}

/// A connection that takes longer to answer nothing is given up.
const PING_TIMEOUT: Duration = Duration::from_secs(1);

async fn is_alive(connection: &mut PgConnection) -> sqlx::Result<()> {
    match tokio::time::timeout(PING_TIMEOUT, connection.ping()).await {
        Ok(answer) => answer,
        Err(late) => Err(sqlx::Error::Io(late.into())),
    }
}

pub(super) struct Postgres {
    pools: Arc<Pools<sqlx::Postgres>>,
    placements: Gathered<Placement>,
    wanted: Gathered<OrderId, Option<Order>>,
    keyring: Option<Keyring>,
    _follows: Option<AbortOnDropHandle<()>>,
}

impl Postgres {
    pub(super) async fn open(config: &Database, breaker: &CircuitBreaker) -> anyhow::Result<Self> {
        let servers = Servers::of(config)?;
        // A pool would try again until its time is up and then say only that; this says why.
        let primary = servers.primary(None).await.with_context(|| {
            format!(
                "connecting to {}; is it running, and reachable?",
                config.url
            )
        })?;
        let handed = Handed::shared(breaker);
        let shared = shape(config, &handed)
            .max_connections(config.max_connections.get())
            .min_connections(config.min_connections);
        let probe = shape(config, &Handed::default()).max_connections(1);
        let connect = move |to: PgConnectOptions| Both {
            shared: shared.clone().connect_lazy_with(to.clone()),
            probe: probe.clone().connect_lazy_with(to),
        };
        let both = connect(primary.options.clone());
        if config.migrate && !config.read_only {
            // Several processes may start at once; sqlx holds an advisory lock meanwhile.
            migrate(config, &primary.options)
                .await
                .context("migrating the database")?;
        }
        let pools = Arc::new(Pools::new(both, handed, config.acquire_timeout.0));
        let follows = servers.are_several().then(|| {
            let pools = Arc::clone(&pools);
            let switch = move |to| pools.replace(connect(to));
            AbortOnDropHandle::new(tokio::spawn(servers.follow(primary, switch)))
        });
        let keyring = config.encryption_keys.clone();
        let most = config.max_connections;
        Ok(Self {
            placements: placing::gathered(&pools, most),
            wanted: finding::gathered(&pools, most, keyring.as_ref()),
            pools,
            keyring,
            _follows: follows,
        })
    }
}

/// However long that takes.
async fn migrate(config: &Database, on: &PgConnectOptions) -> anyhow::Result<()> {
    let unlimited = Database {
        statement_timeout: Timeout(Duration::ZERO),
        ..config.clone()
    };
    let pool = shape(&unlimited, &Handed::default()).max_connections(1);
    let pool = pool.connect_lazy_with(on.clone());
    MIGRATIONS.migrator().await?.run(&pool).await?;
    pool.close().await;
    Ok(())
}

fn shape(config: &Database, handed: &Handed) -> PgPoolOptions {
    let (acquired, connected) = (handed.clone(), handed.clone());
    let limits: Arc<str> = limits(config).into();
    PgPoolOptions::new()
        .acquire_timeout(config.acquire_timeout.0)
        .idle_timeout(config.idle_timeout.0)
        // A busy pool's connections show by themselves whether they are alive: `retried`.
        .test_before_acquire(false)
        .before_acquire(move |connection, seen| {
            let acquired = acquired.clone();
            Box::pin(async move {
                if seen.idle_for > TRUSTED_FOR {
                    is_alive(connection).await?;
                }
                acquired.one();
                Ok(true)
            })
        })
        .after_connect(move |connection, _| {
            let (connected, limits) = (connected.clone(), Arc::clone(&limits));
            Box::pin(async move {
                connection.execute(&*limits).await?;
                connected.one();
                Ok(())
            })
        })
        .after_release(|connection, _| {
            Box::pin(async move {
                if abandoned::lately() {
                    is_alive(connection).await?;
                }
                Ok(true)
            })
        })
}

/// The server knows by itself whose turn it is.
struct NoTurn;

impl Postgres {
    fn turn(&self) -> Ready<Result<NoTurn, StorageError>> {
        ready(Ok(NoTurn))
    }

    fn stuck_for(&self) -> Option<Duration> {
        self.pools.stuck_for()
    }

    async fn begin(&self) -> Result<Transaction<'_, sqlx::Postgres>, StorageError> {
        let _waiting = self.pools.waits.one();
        let pool = self.pools.shared();
        self.pools.retried(|| pool.begin()).await
    }

    async fn insert(at: &mut PgConnection, placement: &Placement) -> sqlx::Result<()> {
        placing::insert(at, std::slice::from_ref(placement), Again::No).await
    }

    /// With whatever else is to be placed just then, and without a transaction around it. Who is cut off
    /// has usually placed the order, as what the server has begun it ends.
    async fn insert_one(&self, placement: Placement) -> Result<(), StorageError> {
        self.placements.ask(placement).await
    }

    /// With whatever else is looked for just then.
    async fn find_one(&self, id: OrderId) -> Result<Option<Order>, StorageError> {
        self.wanted.ask(id).await
    }

    async fn totals_among(&self, customers: &[String]) -> Result<Vec<TotalOf>, StorageError> {
        let totals = rows::totals_of("SELECT unnest($1)");
        let pool = self.pools.shared();
        let totals = || sqlx::query_as(&totals).bind(customers).fetch_all(&pool);
        self.pools.retried(totals).await
    }

    async fn remove(tx: &mut PgConnection, events: &[i64]) -> Result<(), StorageError> {
        let told = sqlx::query("DELETE FROM outbox WHERE seq = ANY($1)").bind(events);
        told.execute(&mut *tx).await?;
        Ok(())
    }

    async fn note_done(
        tx: &mut PgConnection,
        consumer: &str,
        events: &[Uuid],
    ) -> Result<HashSet<Uuid>, StorageError> {
        let new = sqlx::query_scalar(
            "INSERT INTO inbox (consumer, event_id, done_at) SELECT $1, unnest($2), $3
             ON CONFLICT DO NOTHING RETURNING event_id",
        );
        let new = new.bind(consumer).bind(events);
        let new = new.bind(Timestamp::now().as_millisecond());
        Ok(new.fetch_all(&mut *tx).await?.into_iter().collect())
    }

    async fn count(tx: &mut PgConnection, orders: &[Uuid]) -> Result<HashSet<Uuid>, StorageError> {
        let new = sqlx::query_scalar(
            "WITH cancelled AS (
                 DELETE FROM cancelled_uncounted WHERE order_id = ANY($1) RETURNING order_id
             )
             INSERT INTO counted_orders (order_id)
             SELECT id FROM unnest($1) AS placed (id) WHERE id NOT IN (SELECT order_id FROM cancelled)
             ON CONFLICT DO NOTHING RETURNING order_id",
        );
        let new = new.bind(orders).fetch_all(&mut *tx).await?;
        Ok(new.into_iter().collect())
    }

    async fn count_no_more(
        tx: &mut PgConnection,
        orders: &[Uuid],
    ) -> Result<HashSet<Uuid>, StorageError> {
        let gone = sqlx::query_scalar(
            "WITH counted AS (
                 DELETE FROM counted_orders WHERE order_id = ANY($1) RETURNING order_id
             ), uncounted AS (
                 INSERT INTO cancelled_uncounted (order_id)
                 SELECT id FROM unnest($1) AS cancelled (id)
                 WHERE id NOT IN (SELECT order_id FROM counted)
                 ON CONFLICT DO NOTHING
             )
             SELECT order_id FROM counted",
        );
        let gone = gone.bind(orders).fetch_all(&mut *tx).await?;
        Ok(gone.into_iter().collect())
    }

    /// How many were not there yet.
    async fn append(tx: &mut PgConnection, entries: &[Entry]) -> Result<u64, StorageError> {
        let append = sqlx::query(
            "INSERT INTO audit_log (seq, event, hash) SELECT * FROM unnest($1, $2, $3)
             ON CONFLICT DO NOTHING",
        );
        let seqs: Vec<i64> = entries.iter().map(|entry| entry.seq).collect();
        let events: Vec<&str> = entries.iter().map(|entry| entry.event.as_str()).collect();
        let hashes: Vec<&[u8]> = entries.iter().map(|entry| entry.hash.as_slice()).collect();
        let append = append.bind(seqs).bind(events).bind(hashes);
        Ok(append.execute(&mut *tx).await?.rows_affected())
    }

    async fn no_longer_wait(tx: &mut PgConnection, places: &[i64]) -> Result<(), StorageError> {
        let chained = sqlx::query("DELETE FROM audit_waiting WHERE seq = ANY($1)").bind(places);
        chained.execute(&mut *tx).await?;
        Ok(())
    }
}

storage_in_sql!(Postgres, sqlx::Postgres);
