//! Everything the service is made of, and its use cases: what every interface calls.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use futures_util::{Stream, StreamExt};
use serde::Serialize;
use sha2::{Digest, Sha256};
use tokio::sync::{Mutex, watch};

use crate::adapters::bus::{self, Bus};
use crate::adapters::cache;
use crate::adapters::lock::{self, Lock};
use crate::adapters::storage::{
    self, Connections, DeadLetter, Once, Placed, Storage, StorageError,
};
use crate::audit::{self, Verdict};
use crate::auth::{Auth, Caller, Operation};
use crate::config::{self, Config, Database};
use crate::consumers;
use crate::domain::events::{Cause, Event, Kind};
use crate::domain::orders::{
    self, FieldError, Order, OrderId, OrderRequest, Page, PageRequest, Rejected, Total,
};
use crate::drain::Drain;
use crate::feed::{Feed, TooSlow};
use crate::limits::Limits;
use crate::metrics::METRICS;
use crate::pause::Pause;
use crate::sessions::Sessions;
use crate::traces;

/// How long storage is waited for where nobody waits for the answer: renewed copies, and metrics.
const STORAGE_TIMEOUT: Duration = Duration::from_secs(1);

/// How long it is believed what a readiness probe has found.
const PROBE_AGAIN: Duration = Duration::from_millis(250);

/// Contacts that are encrypted anew in one transaction.
const ROTATED_AT_A_TIME: u32 = 500;
/// Of each such transaction beside the first, where the service is at the database meanwhile.
const ROTATION_TRIES: u32 = 9;
const ROTATION_PAUSE: Duration = Duration::from_millis(100);
const UNKNOWN: &str = "unknown";

/// What is noted with an event.
fn cause(caller: &Caller) -> Cause {
    Cause {
        trace: traces::current(),
        subject: caller.subject.clone(),
    }
}

pub struct App {
    pub config: Config,
    pub auth: Auth,
    pub limits: Limits,
    /// What happens to orders, live.
    pub feed: Feed,
    /// Who stays connected.
    pub sessions: Sessions,
    cache: cache::Orders,
    storage: Arc<dyn Storage>,
    lock: Arc<dyn Lock>,
    bus: Arc<dyn Bus>,
    /// This process' own.
    pub name: String,
    /// Changes when there is something to tell.
    pub untold: watch::Sender<()>,
    pub drain: Drain,
    /// What the last readiness probe has found, and when.
    probed: Mutex<Option<(Instant, Vec<PartStatus>)>>,
}

/// Why a use case gave no result. Interfaces map each variant by one table (`api::fault`).
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("nobody in particular may do this")]
    Unauthenticated,
    #[error("this caller may not do this")]
    Forbidden,
    #[error("the request is not valid")]
    Invalid(#[from] Rejected),
    #[error("there is no order {0}")]
    NotFound(OrderId),
    #[error("the idempotency key belongs to another request")]
    KeyTaken,
    #[error(transparent)]
    TooSlow(#[from] TooSlow),
    #[error("there are as many connections that stay as there may be")]
    Full,
    #[error(transparent)]
    Storage(#[from] StorageError),
}

/// An order that was placed, now or by the same request before.
#[derive(Debug)]
pub struct Created {
    pub order: Order,
    pub repeated: bool,
}

/// Whether a part of the service can do its work.
#[derive(Debug, Clone, Serialize)]
pub struct PartStatus {
    pub part: &'static str,
    pub ready: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// Whether all of them can.
pub fn is_ready(parts: &[PartStatus]) -> bool {
    parts.iter().all(|part| part.ready)
}

/// What is running: the answer of `/info`.
#[derive(Debug, Serialize)]
pub struct Info {
    pub name: &'static str,
    pub version: String,
    pub revision: String,
    pub environment: String,
    pub config_hash: String,
    pub schema_version: Option<i64>,
}

impl App {
    /// Connects to what the configuration names.
    pub async fn open(config: Config) -> anyhow::Result<Arc<Self>> {
        let auth = Auth::open(&config.auth, config::environment().as_deref())?;
        let storage = storage::open(&config.database, &config.circuit_breaker).await?;
        Ok(Arc::new(Self {
            auth,
            bus: bus::open(&config),
            cache: cache::Orders::open(&config)?,
            name: uuid::Uuid::now_v7().to_string(),
            lock: lock::open(&config, &storage)?,
            untold: watch::Sender::new(()),
            limits: Limits::new(&config),
            feed: Feed::new(config.events.feed.get()),
            sessions: Sessions::new(
                config.server.max_sessions.get(),
                config.server.max_sessions_per_client.get(),
            ),
            config,
            storage,
            drain: Drain::default(),
            probed: Mutex::default(),
        }))
    }

    /// Brings the schema up to date, unless it is somebody else's; its version before, where there
    /// was any, and after.
    pub async fn migrate(config: Config) -> anyhow::Result<(Option<i64>, i64)> {
        let open = async |migrate| {
            let database = Database {
                migrate,
                ..config.database.clone()
            };
            storage::open(&database, &config.circuit_breaker).await
        };
        let storage = open(false).await?;
        let before = storage.schema_version().await.ok();
        storage.close().await;
        let storage = open(true).await?;
        // Where it must not be changed, it may be another one than this program works on.
        let checked = storage.check().await;
        let after = storage.schema_version().await;
        storage.close().await;
        checked?;
        let after = after?;
        Ok((before, after))
    }

    /// Tries again what consumers have put aside; how many events were acted on, and those left.
    pub async fn replay(config: Config) -> anyhow::Result<(usize, Vec<DeadLetter>)> {
        let storage = storage::open(&config.database, &config.circuit_breaker).await?;
        let replayed = consumers::replay(&*storage).await;
        storage.close().await;
        Ok(replayed?)
    }

    /// Encrypts by the first key what the others have encrypted; how many contacts that were. While
    /// processes with other first keys run, there may be more of them.
    pub async fn rotate_keys(config: Config) -> anyhow::Result<usize> {
        let keys = config.database.encryption_keys.as_ref();
        keys.context("database.encryption_keys is not set")?;
        let storage = storage::open(&config.database, &config.circuit_breaker).await?;
        let mut after = OrderId::from(uuid::Uuid::nil());
        let mut all = 0;
        let (mut tries, mut pause) = (0, Pause::new(ROTATION_PAUSE));
        loop {
            match storage.encrypt_anew(after, ROTATED_AT_A_TIME).await {
                Ok(None) => break,
                Ok(Some((last, changed))) => {
                    (after, tries) = (last, 0);
                    pause.reset();
                    all += changed;
                }
                Err(StorageError::Busy(_)) if tries < ROTATION_TRIES => {
                    tries += 1;
                    pause.wait().await;
                }
                Err(error) => return Err(error.into()),
            }
        }
        storage.close().await;
        Ok(all)
    }

    /// Whether the audit log is what was written, and holds the entry of the hash `anchor`. It only
    /// looks.
    pub async fn verify_audit(config: Config, anchor: Option<&str>) -> anyhow::Result<Verdict> {
        let database = Database {
            migrate: false,
            read_only: true,
            ..config.database
        };
        let storage = storage::open(&database, &config.circuit_breaker).await?;
        let verdict = audit::verify(&*storage, anchor).await;
        storage.close().await;
        Ok(verdict?)
    }

    pub fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    pub fn lock(&self) -> &dyn Lock {
        &*self.lock
    }

    pub fn bus(&self) -> &dyn Bus {
        &*self.bus
    }

    /// Places an order. With a key, the same request again gets the same answer and places none.
    pub async fn create_order(
        &self,
        caller: &Caller,
        mut request: OrderRequest,
        key: Option<String>,
    ) -> Result<Created, Error> {
        caller.check(Operation::PlaceOrder)?;
        // Whoever reads a fingerprint could guess contacts by it.
        let contact = request.contact.take();
        let fingerprint = Sha256::digest(serde_json::to_vec(&request).unwrap_or_default());
        if contact.is_some() && self.config.database.encryption_keys.is_none() {
            return Err(Error::Invalid(Rejected(vec![FieldError {
                field: "/contact".to_owned(),
                reason: "must be left out: this service has no keys to encrypt it by".to_owned(),
            }])));
        }
        request.contact.clone_from(&contact);
        let once = key.map(|key| Once {
            // Where nobody says who they are, all are one.
            client: caller.subject.clone().unwrap_or_default(),
            key,
            fingerprint: fingerprint.into(),
        });
        let order = Order::place(request, self.config.orders.max_items.get())?;
        let event = Event::new(Kind::Placed, &order).caused_by(cause(caller));
        match self.storage.place(&order, &event, once.as_ref()).await? {
            Placed::New => {
                METRICS.orders_created.inc();
                self.untold.send_replace(());
                let repeated = false;
                Ok(Created { order, repeated })
            }
            Placed::Before(order) if order.contact != contact => Err(Error::KeyTaken),
            Placed::Before(order) => {
                let (order, repeated) = (order.as_placed(), true);
                Ok(Created { order, repeated })
            }
            Placed::KeyTaken => Err(Error::KeyTaken),
        }
    }

    /// What a customer has ordered and not cancelled; it follows the orders a moment later.
    pub async fn totals(&self, caller: &Caller, customer: &str) -> Result<Vec<Total>, Error> {
        caller.check(Operation::GetTotals)?;
        // A name that no order has is no question for a database: PostgreSQL knows no text with a NUL.
        if !orders::may_be_customer(customer) {
            return Ok(Vec::new());
        }
        Ok(self.storage.totals(customer).await?)
    }

    /// The totals of many customers, each with its customer. Whoever asks has checked its caller.
    pub async fn totals_of(&self, customers: &[String]) -> Result<Vec<(String, Total)>, Error> {
        Ok(self.storage.totals_of(customers).await?)
    }

    /// What happens to orders from now on: of one customer, or all. It ends with the process, or with
    /// an error where the client reads too slowly.
    pub fn watch(
        &self,
        caller: &Caller,
        customer: Option<String>,
    ) -> Result<impl Stream<Item = Result<Arc<Event>, Error>> + Send + use<>, Error> {
        caller.check(Operation::WatchOrders)?;
        let session = self.sessions.begin(&caller.client).ok_or(Error::Full)?;
        let token_ends = caller.token_ends();
        let mut is_lost = false;
        let events = self.feed.events(customer).map(|event| Ok(event?));
        // After an event is lost, the next ones would only hide it.
        let events = events.take_while(move |event| {
            let goes_on = !std::mem::replace(&mut is_lost, event.is_err());
            std::future::ready(goes_on)
        });
        Ok(session.until_the_end(events.take_until(token_ends)))
    }

    /// As it is, or was at most `cache.ttl` ago.
    pub async fn order(&self, caller: &Caller, id: OrderId) -> Result<Order, Error> {
        caller.check(Operation::GetOrder)?;
        if let Some(order) = self.cache.get(id).await {
            return Ok(order);
        }
        let order = self.storage.find(id).await?.ok_or(Error::NotFound(id))?;
        self.cache.fill(&order).await;
        Ok(order)
    }

    /// The newest orders first; the next page starts after the last one of this page.
    pub async fn orders(&self, caller: &Caller, request: PageRequest) -> Result<Page, Error> {
        caller.check(Operation::ListOrders)?;
        let limits = &self.config.orders;
        let limit = request.limit(limits.page_size.get(), limits.max_page_size.get())?;
        // One more than asked for tells whether there is a next page.
        let mut items = self.storage.list(request.after, limit + 1).await?;
        let more = items.len() > limit as usize;
        items.truncate(limit as usize);
        let next = if more {
            items.last().map(|order| order.id)
        } else {
            None
        };
        Ok(Page { items, next })
    }

    /// Cancelling a cancelled order changes nothing and answers with it.
    pub async fn cancel_order(&self, caller: &Caller, id: OrderId) -> Result<Order, Error> {
        caller.check(Operation::CancelOrder)?;
        let now = jiff::Timestamp::now();
        let order = self.storage.cancel(id, now, cause(caller)).await?;
        self.untold.send_replace(());
        let order = order.ok_or(Error::NotFound(id))?;
        self.cache.put(&order).await;
        Ok(order)
    }

    /// An order has changed, here or in another process: copies of it are old.
    pub async fn changed(&self, id: OrderId) {
        // What was told of it has no contact.
        let order = tokio::time::timeout(STORAGE_TIMEOUT, self.storage.find(id)).await;
        if let Ok(Ok(Some(order))) = order {
            self.cache.put(&order).await;
        }
    }

    /// The state of each part that the service cannot work without. One that is busy is there: where
    /// all processes wait for it, to take them out of service would make delays into errors.
    pub async fn readiness(&self) -> Vec<PartStatus> {
        let draining = self.drain.has_begun();
        let process = PartStatus {
            part: "process",
            ready: !draining,
            reason: draining.then(|| "shutting down".to_owned()),
        };
        let others = self.others_readiness().await;
        [process].into_iter().chain(others).collect()
    }

    /// However many ask, one looks, and not all the time: anybody may ask.
    async fn others_readiness(&self) -> Vec<PartStatus> {
        let mut probed = self.probed.lock().await;
        if let Some((at, parts)) = &*probed
            && at.elapsed() < PROBE_AGAIN
        {
            return parts.clone();
        }
        let limit = self.config.health.timeout.0;
        let late = || Some(format!("no answer within {limit:?}"));
        let (storage, callers) = tokio::join!(
            tokio::time::timeout(limit, self.storage.check()),
            tokio::time::timeout(limit, self.auth.trouble()),
        );
        let storage = match storage {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => late(),
        };
        let callers = callers.unwrap_or_else(|_| late());
        let parts = vec![
            PartStatus {
                part: "database",
                ready: storage.is_none(),
                reason: storage,
            },
            PartStatus {
                part: "callers",
                ready: callers.is_none(),
                reason: callers,
            },
        ];
        *probed = Some((Instant::now(), parts.clone()));
        parts
    }

    /// Notes how much of what the process has is in use just now.
    pub fn observe(&self) {
        let Connections {
            used,
            idle,
            most,
            waiting,
        } = self.storage.connections();
        let connections = |state| {
            METRICS
                .database_connections
                .get_or_create(&[("state", state)])
        };
        connections("used").set(used.into());
        connections("idle").set(idle.into());
        METRICS.database_connections_max.set(most.into());
        METRICS.database_waiting.set(waiting.into());
        if let Some(entries) = self.cache.entries() {
            METRICS.cache_entries.set(entries as i64);
        }
    }

    /// Tells metrics what is still to be done. Where the database does not say, they stay as they are:
    /// other metrics tell of that.
    pub async fn count_backlog(&self) {
        let backlog = tokio::time::timeout(STORAGE_TIMEOUT, self.storage.backlog()).await;
        if let Ok(Ok(backlog)) = backlog {
            METRICS.outbox_waiting.set(backlog.untold);
            METRICS.outbox_age.set(backlog.age().as_secs_f64());
            METRICS.audit_waiting.set(backlog.unaudited);
            METRICS.dead_letters.set(backlog.buried);
        }
    }

    pub async fn info(&self) -> Info {
        let variable = |name: &str| std::env::var(name).unwrap_or_else(|_| UNKNOWN.to_owned());
        Info {
            name: env!("CARGO_PKG_NAME"),
            version: version(),
            revision: variable("IMAGE_REVISION"),
            environment: config::environment().unwrap_or_else(|| UNKNOWN.to_owned()),
            config_hash: self.config.hash(),
            schema_version: self.storage.schema_version().await.ok(),
        }
    }

    pub async fn close(&self) {
        self.storage.close().await;
    }
}

/// The image's version, else the package's.
pub fn version() -> String {
    std::env::var("IMAGE_VERSION").unwrap_or_else(|_| env!("CARGO_PKG_VERSION").to_owned())
}
