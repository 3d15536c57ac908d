//! Configuration: `default.toml`, then the environment's file, then `SERVICE__SECTION__KEY`
//! variables; later ones win. It is parsed into types that cannot hold an impossible value.

mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::SocketAddr;
use std::num::{NonZeroU16, NonZeroU32, NonZeroUsize};
use std::path::PathBuf;
use std::str::FromStr;

use figment::Figment;
use figment::error::Kind;
use figment::providers::{Env, Format, Toml};
use ipnet::IpNet;
use lapin::uri::AMQPUri;
use redis::IntoConnectionInfo;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::auth::Operation;
use crate::hex::hex;
use crate::keyring::Keyring;
use values::without_password;
pub use values::{DatabaseUrl, LogFilter, Origin, Scheme, Secret, ServerUrl, Share, Timeout};

/// Where the files are, unless `SERVICE_CONFIG_DIR` says otherwise.
const CONFIG_DIR: &str = "config/service";
/// Of tokens that `service token` signs; `default.toml` has it.
const DEVELOPMENT_ISSUER: &str = "http://localhost/development";
/// What nobody may see.
const SECRETS: [&str; 3] = [
    "auth.client_secret",
    "database.encryption_keys",
    "kafka.password",
];

/// Keys whose value may be in a file that a variable names, as secrets are mounted:
/// `SERVICE__DATABASE__URL_FILE=/run/secrets/database`.
const FROM_FILES: [&str; 6] = [
    "auth.client_secret",
    "database.encryption_keys",
    "database.url",
    "kafka.password",
    "rabbitmq.url",
    "redis.url",
];

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    pub server: Server,
    pub tls: Option<Tls>,
    pub rate_limit: RateLimit,
    pub auth: Auth,
    pub logging: Logging,
    pub health: Health,
    pub tracing: Tracing,
    pub database: Database,
    pub cache: Cache,
    pub circuit_breaker: CircuitBreaker,
    pub redis: Redis,
    pub lock: Lock,
    pub graphql: GraphQl,
    pub events: Events,
    pub rabbitmq: RabbitMq,
    pub kafka: Kafka,
    pub orders: Orders,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Server {
    pub listen: SocketAddr,
    pub admin_listen: SocketAddr,
    /// Threads that answer; as many as there are processors unless given.
    pub workers: Option<NonZeroUsize>,
    pub request_timeout: Timeout,
    /// Bytes.
    pub body_limit: NonZeroUsize,
    /// From the signal to end until the process has ended.
    pub drain_timeout: Timeout,
    /// For how long no request must have come until it is believed that none will.
    pub linger: Option<Timeout>,
    /// On the public port; more wait until one of them ends.
    pub max_connections: NonZeroUsize,
    /// From the first byte of a request's head to its last.
    pub head_timeout: Timeout,
    pub max_in_flight: NonZeroUsize,
    /// WebSockets and streams at a time.
    pub max_sessions: NonZeroUsize,
    /// Those of one client.
    pub max_sessions_per_client: NonZeroUsize,
    /// How often a WebSocket is asked whether somebody is still there.
    pub heartbeat: Timeout,
    /// Networks of proxies whose `X-Forwarded-For` is believed.
    pub trusted_proxies: Vec<IpNet>,
    /// Whose pages may call, from browsers: `https://shop.example`.
    pub allowed_origins: Vec<Origin>,
}

/// TLS on the public port. Files are PEM, and are read anew when they change.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The server's own first, then those in between.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Then clients must show a certificate that one of these has signed.
    pub client_ca: Option<PathBuf>,
}

/// What one client may ask for, of each process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RateLimit {
    pub per_second: NonZeroU32,
    /// Requests at once.
    pub burst: NonZeroU32,
}

/// Who may do what.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    pub mode: AuthMode,
    pub issuer: String,
    pub audience: String,
    /// Where the issuer's keys are, for [`AuthMode::Jwks`]; else the issuer says so.
    pub jwks_url: Option<String>,
    /// How often the keys are fetched anew.
    pub refresh: Timeout,
    /// How far clocks may be apart.
    pub leeway: Timeout,
    /// The claim that has the roles: a list, or words.
    pub roles_claim: String,
    /// As whom `service login` asks the issuer for tokens.
    pub client_id: Option<String>,
    pub client_secret: Option<Secret>,
    /// What for, in words.
    pub scope: String,
    /// For [`AuthMode::Development`]; made where there is none.
    pub development_key: PathBuf,
    /// What each role may do.
    pub roles: BTreeMap<String, BTreeSet<Operation>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AuthMode {
    /// Anybody may do anything.
    Off,
    /// Tokens of `service token`.
    Development,
    /// Tokens of an OpenID provider, the issuer.
    Jwks,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logging {
    pub level: LogFilter,
    pub format: LogFormat,
    /// Where the log goes besides standard error: files that begin with this, one for each day.
    pub file: Option<PathBuf>,
    /// How many of those files are kept.
    pub keep_files: NonZeroUsize,
}

/// What readiness is found by.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Health {
    /// How long each part is waited for.
    pub timeout: Timeout,
}

/// Where traces go, and as whose.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tracing {
    pub service_name: String,
    /// An OTLP collector, by gRPC.
    pub endpoint: Option<String>,
    pub sample: Share,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Database {
    pub url: DatabaseUrl,
    pub max_connections: NonZeroU32,
    /// As many are open, whether anybody needs them or not.
    pub min_connections: u32,
    /// One that nobody has needed for so long is closed.
    pub idle_timeout: Timeout,
    /// For what only the service may read. Without them it keeps nothing of the kind.
    pub encryption_keys: Option<Keyring>,
    pub acquire_timeout: Timeout,
    /// PostgreSQL ends a statement that takes longer; migrations may.
    pub statement_timeout: Timeout,
    pub busy_timeout: Timeout,
    pub read_only: bool,
    pub migrate: bool,
}

/// Copies of orders that are read often.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cache {
    pub kind: CacheKind,
    /// How long a copy may be kept.
    pub ttl: Timeout,
    /// Orders, for [`CacheKind::InProcess`].
    pub capacity: NonZeroU32,
    /// How long a copy is waited for.
    pub timeout: Timeout,
}

/// When the cache, or the database, is left alone where it fails.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CircuitBreaker {
    /// So many in a row.
    pub failures: NonZeroU32,
    /// How long nobody asks it.
    pub rest: Timeout,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CacheKind {
    Off,
    InProcess,
    Redis,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Redis {
    pub url: ServerUrl,
    /// PEM: who signs the server's certificate.
    pub ca: Option<PathBuf>,
    pub connection_timeout: Timeout,
    /// How all keys begin.
    pub prefix: String,
}

/// Who does what only one process does at a time.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    pub kind: LockKind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LockKind {
    InProcess,
    Database,
    Redis,
}

/// What a query may ask for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GraphQl {
    pub max_depth: NonZeroUsize,
    /// Fields in the answer.
    pub max_complexity: NonZeroUsize,
    /// Fields in the query, fragments and aliases included.
    pub max_fields: NonZeroUsize,
    pub introspection: bool,
}

/// What is told of orders, and what is done about it.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Events {
    pub bus: BusKind,
    pub batch: NonZeroU32,
    pub poll: Timeout,
    pub lease: Timeout,
    pub attempts: NonZeroU32,
    pub keep_days: NonZeroU32,
    /// Events that a client may be behind before it is cut off.
    pub feed: NonZeroUsize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BusKind {
    InProcess,
    #[serde(rename = "rabbitmq")]
    RabbitMq,
    Kafka,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RabbitMq {
    pub url: ServerUrl,
    /// PEM: who signs the broker's certificate, where not everybody knows them.
    pub ca: Option<PathBuf>,
    pub exchange: String,
    pub prefetch: NonZeroU16,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kafka {
    /// `HOST:PORT`, several with commas between them.
    pub bootstrap_servers: String,
    pub tls: bool,
    /// PEM: who signs the brokers' certificates, where not everybody knows them.
    pub ca: Option<PathBuf>,
    pub user: Option<String>,
    pub password: Option<Secret>,
    /// How the user shows who it is.
    pub mechanism: Mechanism,
    pub topic: String,
    /// Of the topic, when it is made: as many processes may consume at a time.
    pub partitions: NonZeroU16,
    pub replicas: NonZeroU16,
}

/// Of SASL (RFC 4422).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mechanism {
    Plain,
    #[serde(rename = "scram-sha-256")]
    ScramSha256,
    #[serde(rename = "scram-sha-512")]
    ScramSha512,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Orders {
    pub page_size: NonZeroU32,
    pub max_page_size: NonZeroU32,
    pub max_items: NonZeroUsize,
}

/// Why the configuration cannot be used: one line for each problem, naming file, key and value.
#[derive(Debug)]
pub struct ConfigError(Vec<String>);

/// Which environment the process runs in, where that is said.
pub fn environment() -> Option<String> {
    std::env::var("SERVICE_ENVIRONMENT").ok()
}

impl Config {
    /// Reads the files in `SERVICE_CONFIG_DIR` for the environment `SERVICE_ENVIRONMENT`
    /// (only `default.toml` where that is unset), then the `SERVICE__` variables.
    pub fn load() -> Result<Self, ConfigError> {
        let dir = std::env::var_os("SERVICE_CONFIG_DIR")
            .map_or_else(|| PathBuf::from(CONFIG_DIR), PathBuf::from);
        let mut files = vec![dir.join("default.toml")];
        if let Some(environment) = environment() {
            files.push(dir.join(format!("{environment}.toml")));
        }
        Self::from_files(&files)
    }

    /// Reads `files` in order, each of which must exist, then the `SERVICE__` variables.
    pub fn from_files(files: &[PathBuf]) -> Result<Self, ConfigError> {
        let missing: Vec<String> = files
            .iter()
            .filter(|file| !file.is_file())
            .map(|file| format!("{}: no such configuration file", file.display()))
            .collect();
        if !missing.is_empty() {
            return Err(ConfigError(missing));
        }
        let mut figment = Figment::new();
        for file in files {
            figment = figment.merge(Toml::file_exact(file));
        }
        let variables = Env::prefixed("SERVICE__");
        let variables = variables.filter(|name| !is_file_variable(name.as_str()));
        figment = figment.merge(variables.split("__"));
        for key in SECRETS {
            // As it is: one of digits is no number.
            if let Ok(secret) = std::env::var(variable(key)) {
                figment = figment.merge((key, secret));
            }
        }
        let mut unread = Vec::new();
        for key in FROM_FILES {
            match from_file(key) {
                Ok(Some(text)) => figment = figment.merge((key, text)),
                Ok(None) => {}
                Err(why) => unread.push(why),
            }
        }
        match unread.is_empty() {
            true => Self::from_figment(&figment),
            false => Err(ConfigError(unread)),
        }
    }

    fn from_figment(figment: &Figment) -> Result<Self, ConfigError> {
        let config: Self = figment.extract().map_err(|error| {
            ConfigError(error.into_iter().map(|e| explain(figment, &e)).collect())
        })?;
        let problem = config.contradiction().or_else(|| exposed(figment));
        match problem {
            Some((key, why)) => {
                let place = source(figment, key);
                Err(ConfigError(vec![format!("{place}: {key} {why}")]))
            }
            None => Ok(config),
        }
    }

    /// A key that does not go with the others, and why not.
    fn contradiction(&self) -> Option<(&'static str, String)> {
        let orders = &self.orders;
        if orders.page_size > orders.max_page_size {
            let (size, most) = (orders.page_size, orders.max_page_size);
            let why = format!("= {size} is more than orders.max_page_size = {most}");
            return Some(("orders.page_size", why));
        }
        let database = &self.database;
        if database.min_connections > database.max_connections.get() {
            let (fewest, most) = (database.min_connections, database.max_connections);
            let why = format!("= {fewest} is more than database.max_connections = {most}");
            return Some(("database.min_connections", why));
        }
        let half = self.server.drain_timeout.0 / 2;
        if self.server.linger.is_some_and(|linger| linger.0 > half) {
            let why = format!("is more than half of server.drain_timeout = {:?}", half * 2);
            return Some(("server.linger", why));
        }
        if self.auth.mode == AuthMode::Jwks && self.auth.issuer == DEVELOPMENT_ISSUER {
            let why = "= \"jwks\" needs auth.issuer, the OpenID provider whose tokens are believed: \
                       name it in this file, or in SERVICE__AUTH__ISSUER";
            return Some(("auth.mode", why.to_owned()));
        }
        if self.redis.ca.is_some() && !self.redis.url.0.starts_with("rediss:") {
            let why = "is for addresses that begin with rediss://, and redis.url does not";
            return Some(("redis.ca", why.to_owned()));
        }
        if let Err(why) = self.redis.url.0.as_str().into_connection_info() {
            return Some(("redis.url", format!("cannot be used: {why}")));
        }
        if let Err(why) = AMQPUri::from_str(&self.rabbitmq.url.0) {
            return Some(("rabbitmq.url", format!("cannot be used: {why}")));
        }
        let kafka = &self.kafka;
        if kafka.user.is_some() != kafka.password.is_some() {
            let why = "and SERVICE__KAFKA__PASSWORD go together: one of them is missing";
            return Some(("kafka.user", why.to_owned()));
        }
        if kafka.user.is_some() && kafka.mechanism == Mechanism::Plain && !kafka.tls {
            let why = "= \"plain\" would send the password for everybody to read: set kafka.tls";
            return Some(("kafka.mechanism", why.to_owned()));
        }
        None
    }

    /// SHA-256 of the effective configuration, in hexadecimal: what `/info` reports.
    pub fn hash(&self) -> String {
        let json = serde_json::to_vec(self).unwrap_or_default();
        hex(&Sha256::digest(json))
    }
}

/// One problem as `FILE: KEY = VALUE: what is wrong`, without the value where that may be a secret.
fn explain(figment: &Figment, error: &figment::Error) -> String {
    let mut key = error.path.join(".");
    if let Kind::UnknownField(field, _) = &error.kind
        && error.path.last() != Some(field)
    {
        key = if key.is_empty() {
            field.clone()
        } else {
            format!("{key}.{field}")
        };
    }
    let place = match &error.metadata {
        Some(metadata) => describe(metadata, &key),
        None => source(figment, &key),
    };
    if SECRETS.contains(&key.as_str()) {
        // What this program says itself shows nothing of it.
        return match &error.kind {
            Kind::Message(why) => format!("{place}: {key}: {why}"),
            _ => format!("{place}: {key}: expected text"),
        };
    }
    // What is not known may be the password of a key that was misspelt.
    let is_known = !matches!(error.kind, Kind::UnknownField(..));
    let value = is_known.then(|| figment.find_value(&key).ok()).flatten();
    let value = value.and_then(|value| {
        serde_json::to_string(&value)
            .ok()
            .map(|value| format!(" = {}", without_password(&value)))
    });
    format!(
        "{place}: {key}{}: {}",
        value.unwrap_or_default(),
        error.kind
    )
}

fn source(figment: &Figment, key: &str) -> String {
    figment
        .find_metadata(key)
        .map_or_else(|| "configuration".to_owned(), |m| describe(m, key))
}

fn describe(metadata: &figment::Metadata, key: &str) -> String {
    match &metadata.source {
        Some(figment::Source::File(path)) => path.display().to_string(),
        _ => format!("variable {}", variable(key)),
    }
}

/// A secret in a file of the configuration, which is kept with the sources and shown to whoever may see a
/// ConfigMap.
fn exposed(figment: &Figment) -> Option<(&'static str, String)> {
    let is_exposed = |key: &&str| {
        let metadata = figment.find_metadata(key);
        let is_file = metadata
            .is_some_and(|metadata| matches!(metadata.source, Some(figment::Source::File(_))));
        let text = figment.find_value(key).ok();
        let text = text.as_ref().and_then(figment::value::Value::as_str);
        is_file && text.is_some_and(|text| SECRETS.contains(key) || without_password(text) != text)
    };
    let key = FROM_FILES.into_iter().find(is_exposed)?;
    let why = format!(
        "has a secret, which no file of the configuration is for: put it into {}, or into a file that {} \
         names",
        variable(key),
        file_variable(key)
    );
    Some((key, why))
}

/// The content of the file that a key's variable names, without the line's end.
fn from_file(key: &str) -> Result<Option<String>, String> {
    let name = file_variable(key);
    let Some(path) = std::env::var_os(&name).map(PathBuf::from) else {
        return Ok(None);
    };
    if std::env::var_os(variable(key)).is_some() {
        return Err(format!(
            "variable {name}: {} is set, too; which of them counts?",
            variable(key)
        ));
    }
    match std::fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned())),
        Err(error) => Err(format!(
            "variable {name}: reading {}: {error}",
            path.display()
        )),
    }
}

fn file_variable(key: &str) -> String {
    format!("{}_FILE", variable(key))
}

/// Whether a variable, whose prefix is gone, names a file with a key's value.
fn is_file_variable(name: &str) -> bool {
    let mut names = FROM_FILES.iter().map(|key| file_variable(key));
    names.any(|file| {
        file.strip_prefix("SERVICE__")
            .is_some_and(|file| file.eq_ignore_ascii_case(name))
    })
}

fn variable(key: &str) -> String {
    format!("SERVICE__{}", key.to_uppercase().replace('.', "__"))
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for ConfigError {}
