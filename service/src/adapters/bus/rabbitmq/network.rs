//! The way to the broker: TCP, and for `amqps://` the TLS of everything else here. lapin's own brings a
//! reader of PKCS #12 with the ciphers of its time, forty crates for files that no setting names.

use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use async_rs::traits::Reactor;
use async_rs::util::RuntimeParts;
use async_rs::{Runtime, Tokio};
use futures_util::Stream;
use futures_util::io::{AsyncRead, AsyncWrite};
use lapin::uri::{AMQPScheme, AMQPUri};
use lapin::{AsyncTcpStream, Connection, ConnectionProperties};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};

use crate::tls;

/// Connects to the broker, with TLS where the scheme says so. Its certificate must then be signed by who
/// everybody knows, or by one of those in `ca`, a file of PEM.
pub async fn connect(uri: AMQPUri, ca: Option<&Path>) -> anyhow::Result<Connection> {
    let secure = match uri.scheme {
        AMQPScheme::AMQP => None,
        AMQPScheme::AMQPS => Some(Secure::new(&uri, ca).await?),
    };
    let tokio = Tokio::current();
    let runtime = Runtime::new(RuntimeParts::new(tokio.clone(), Network(tokio)));
    let open = async move |uri: AMQPUri, _: Runtime<_>| {
        let tcp = TcpStream::connect((uri.authority.host.as_str(), uri.authority.port)).await?;
        tcp.set_nodelay(true)?;
        let stream: Box<dyn Duplex> = match &secure {
            None => Box::new(tcp),
            Some(secure) => secure.agree(tcp).await?,
        };
        Ok(AsyncTcpStream::Plain(stream.compat()))
    };
    Ok(Connection::connector(uri, runtime, open, ConnectionProperties::default()).await?)
}

/// Whose certificates hold, and whom the broker's must name.
struct Secure {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl Secure {
    async fn new(uri: &AMQPUri, ca: Option<&Path>) -> anyhow::Result<Self> {
        let mut roots: RootCertStore = webpki_roots::TLS_SERVER_ROOTS.iter().cloned().collect();
        if let Some(file) = ca {
            let setting = || format!("rabbitmq.ca = {}", file.display());
            let pem = tokio::fs::read(file).await.with_context(setting)?;
            let own = tls::roots(&pem).with_context(setting)?;
            roots.roots.extend(own.roots);
        }
        let config = ClientConfig::builder_with_provider(tls::provider())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(Self {
            connector: TlsConnector::from(Arc::new(config)),
            name: ServerName::try_from(uri.authority.host.clone())?,
        })
    }

    async fn agree(&self, tcp: TcpStream) -> io::Result<Box<dyn Duplex>> {
        let stream = self.connector.connect(self.name.clone(), tcp).await?;
        Ok(Box::new(stream))
    }
}

/// TCP, with TLS or without.
trait Duplex: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin {}

impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin> Duplex for S {}

/// Tokio, with a stream that may be either.
#[derive(Clone, Debug)]
struct Network(Tokio);

impl Reactor for Network {
    type TcpStream = Compat<Box<dyn Duplex>>;
    type Sleep = <Tokio as Reactor>::Sleep;

    fn register<H: Read + Write + AsFd + AsRawFd + Send + 'static>(
        &self,
        socket: H,
    ) -> io::Result<impl AsyncRead + AsyncWrite + Send + Unpin + 'static> {
        self.0.register(socket)
    }

    fn sleep(&self, duration: Duration) -> Self::Sleep {
        self.0.sleep(duration)
    }

    fn interval(&self, duration: Duration) -> impl Stream<Item = Instant> + Send + 'static {
        self.0.interval(duration)
    }

    /// Not called: `connect` opens its own.
    fn tcp_connect_addr(
        &self,
        address: SocketAddr,
    ) -> impl Future<Output = io::Result<Self::TcpStream>> + Send + 'static {
        let stream = self.0.tcp_connect_addr(address);
        async move {
            let stream: Box<dyn Duplex> = Box::new(stream.await?.into_inner());
            Ok(stream.compat())
        }
    }
}
