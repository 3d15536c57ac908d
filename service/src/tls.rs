//! TLS on the public port (RFC 8446, RFC 5246): certificates that are replaced without a restart, and
//! clients that show their own.

use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use anyhow::{Context, ensure};
use axum::serve;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::Tls;
use crate::metrics::METRICS;

/// Clients that take longer to agree on a connection are let go.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections that are being agreed on at a time; more wait in the system's queue.
const MOST_HANDSHAKES: usize = 4096;
/// In the order of preference (RFC 7301).
const PROTOCOLS: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// What the files have said when they were last read.
pub struct Certificates {
    files: Tls,
    current: RwLock<(Contents, Arc<ServerConfig>)>,
}

/// The files as they are.
#[derive(PartialEq, Eq)]
struct Contents {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

impl Certificates {
    /// Reads the files; an error names the one that cannot be used, and its setting.
    pub fn open(files: &Tls) -> anyhow::Result<Self> {
        let contents = Contents::read(files)?;
        let config = contents.config(files)?;
        Ok(Self {
            files: files.clone(),
            current: RwLock::new((contents, config)),
        })
    }

    /// Looks whether the files have changed. New connections then get the new certificate; with files
    /// that cannot be used, as while they are being written, everything stays as it is.
    pub fn renew(&self) {
        if let Err(error) = self.try_to_renew() {
            count_renewal("failed");
            tracing::warn!(error = format!("{error:#}"), "the old certificate stays");
        }
    }

    fn try_to_renew(&self) -> anyhow::Result<()> {
        let contents = Contents::read(&self.files)?;
        {
            let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
            if current.0 == contents {
                return Ok(());
            }
        }
        let config = contents.config(&self.files)?;
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = (contents, config);
        count_renewal("renewed");
        tracing::info!("another certificate from now on");
        Ok(())
    }

    fn acceptor(&self) -> TlsAcceptor {
        let current = self.current.read().unwrap_or_else(PoisonError::into_inner);
        TlsAcceptor::from(Arc::clone(&current.1))
    }
}

fn count_renewal(result: &'static str) {
    METRICS
        .tls_renewals
        .get_or_create(&[("result", result)])
        .inc();
}

impl Contents {
    fn read(files: &Tls) -> anyhow::Result<Self> {
        let read = |key: &str, path: &Path| {
            std::fs::read(path).with_context(|| format!("tls.{key} = {}", path.display()))
        };
        let client_ca = files.client_ca.as_deref();
        Ok(Self {
            certificate: read("certificate", &files.certificate)?,
            key: read("key", &files.key)?,
            client_ca: client_ca.map(|path| read("client_ca", path)).transpose()?,
        })
    }

    fn config(&self, files: &Tls) -> anyhow::Result<Arc<ServerConfig>> {
        let chain = certificates(&self.certificate)
            .with_context(|| format!("tls.certificate = {}", files.certificate.display()))?;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .with_context(|| format!("tls.key = {} is no PEM key", files.key.display()))?;
        let provider = provider();
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()?;
        let builder = match (&files.client_ca, &self.client_ca) {
            (Some(path), Some(pem)) => {
                let roots =
                    roots(pem).with_context(|| format!("tls.client_ca = {}", path.display()))?;
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(roots.into(), provider).build()?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).with_context(|| {
            format!(
                "tls.key = {} does not belong to tls.certificate = {}",
                files.key.display(),
                files.certificate.display()
            )
        })?;
        config.alpn_protocols = PROTOCOLS.map(<[u8]>::to_vec).into();
        Ok(Arc::new(config))
    }
}

/// Of the ciphers, for every connection here.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::new(aws_lc_rs::default_provider())
}

fn certificates(pem: &[u8]) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let certificates = CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>()?;
    ensure!(
        !certificates.is_empty(),
        "there is no PEM certificate in it"
    );
    Ok(certificates)
}

/// Those in a file of PEM, of which there must be one.
pub fn roots(pem: &[u8]) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(pem)? {
        roots.add(certificate)?;
    }
    Ok(roots)
}

/// Connections that are agreed on. One slow client makes no other wait.
pub struct Listener {
    agreed: mpsc::Receiver<(TlsStream<TcpStream>, SocketAddr)>,
    address: SocketAddr,
}

impl Listener {
    pub fn new(listener: TcpListener, certificates: Arc<Certificates>) -> io::Result<Self> {
        let address = listener.local_addr()?;
        let (sender, agreed) = mpsc::channel(1);
        tokio::spawn(accept(listener, certificates, sender));
        Ok(Self { agreed, address })
    }
}

impl serve::Listener for Listener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        match self.agreed.recv().await {
            Some(connection) => connection,
            // It listens for as long as this is here, and the runtime.
            None => std::future::pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        Ok(self.address)
    }
}

/// Listens until nobody takes connections any more.
async fn accept(
    mut listener: TcpListener,
    certificates: Arc<Certificates>,
    agreed: mpsc::Sender<(TlsStream<TcpStream>, SocketAddr)>,
) {
    let places = Arc::new(Semaphore::new(MOST_HANDSHAKES));
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (serve::Listener::accept(&mut listener).await, place)
        };
        let ((socket, peer), place) = tokio::select! {
            () = agreed.closed() => return,
            next = next => next,
        };
        let acceptor = certificates.acceptor();
        let agreed = agreed.clone();
        tokio::spawn(async move {
            let handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(socket)).await;
            drop(place);
            let result = match &handshake {
                Ok(Ok(_)) => "agreed",
                Ok(Err(_)) => "failed",
                Err(_) => "timeout",
            };
            METRICS
                .tls_handshakes
                .get_or_create(&[("result", result)])
                .inc();
            match handshake {
                // Nobody takes it if the process is about to end.
                Ok(Ok(stream)) => drop(agreed.send((stream, peer)).await),
                Ok(Err(error)) => tracing::debug!(%peer, %error, "a TLS handshake failed"),
                Err(_) => tracing::debug!(%peer, "a TLS handshake took too long"),
            }
        });
    }
}
