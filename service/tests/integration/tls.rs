//! TLS as clients meet it, with certificates of the tests' own.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, Issuer, KeyPair};
use reqwest::tls::Version;
use reqwest::{Certificate, Identity};
use service::config::Tls;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::test_app::{TestApp, eventually};

/// Somebody who signs certificates.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    /// A certificate for `name` and its key, as PEM.
    pub fn sign(&self, name: &str) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        let issuer: &Issuer<'_, KeyPair> = &self.0;
        let certificate = params.signed_by(&key, issuer).unwrap();
        (certificate.pem(), key.serialize_pem())
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    fn certificate(&self) -> Certificate {
        Certificate::from_pem(self.0.pem().as_bytes()).unwrap()
    }
}

/// The files that the service reads.
struct Files(TempDir);

impl Files {
    fn of(authority: &Authority) -> Self {
        let files = Self(tempfile::tempdir().unwrap());
        files.put(&authority.sign("localhost"));
        files
    }

    fn put(&self, (certificate, key): &(String, String)) {
        std::fs::write(self.path("tls.crt"), certificate).unwrap();
        std::fs::write(self.path("tls.key"), key).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn settings(&self) -> Tls {
        Tls {
            certificate: self.path("tls.crt"),
            key: self.path("tls.key"),
            client_ca: None,
        }
    }
}

async fn start(tls: Tls) -> TestApp {
    TestApp::start_with(|config| config.tls = Some(tls)).await
}

/// A client that trusts this authority only.
fn client(authority: &Authority) -> reqwest::ClientBuilder {
    reqwest::Client::builder()
        .tls_certs_only([authority.certificate()])
        .timeout(Duration::from_secs(20))
}

fn url(app: &TestApp) -> String {
    format!("https://localhost:{}/v1/orders", app.public.port())
}

/// What rustls says about why, somewhere below.
fn reason(error: &reqwest::Error) -> String {
    format!("{error:?}")
}

#[tokio::test]
async fn both_safe_versions_and_both_protocols_are_spoken() {
    let authority = Authority::new();
    let files = Files::of(&authority);
    let app = start(files.settings()).await;
    for version in [Version::TLS_1_2, Version::TLS_1_3] {
        let only = || {
            client(&authority)
                .min_tls_version(version)
                .max_tls_version(version)
        };
        let answer = only().build().unwrap().get(url(&app)).send().await.unwrap();
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.version(), reqwest::Version::HTTP_2);
        let sent = answer.headers()["strict-transport-security"].to_str();
        assert!(sent.unwrap().starts_with("max-age="));
        let old = only().http1_only().build().unwrap();
        let answer = old.get(url(&app)).send().await.unwrap();
        assert_eq!(answer.version(), reqwest::Version::HTTP_11);
    }
    let stranger = client(&Authority::new()).build().unwrap();
    let refused = stranger.get(url(&app)).send().await.unwrap_err();
    assert!(
        reason(&refused).contains("InvalidCertificate"),
        "{refused:?}"
    );
}

/// Versions that RFC 8996 has done away with get an alert, and plain HTTP no answer of HTTP's.
#[tokio::test]
async fn nothing_older_is_spoken() {
    let authority = Authority::new();
    let files = Files::of(&authority);
    let app = start(files.settings()).await;
    // SSL 3.0, TLS 1.0 and 1.1: a ClientHello that offers nothing later (RFC 5246, section 7.4.1.2).
    for minor in 0..=2 {
        let mut hello = vec![3, minor];
        hello.extend([7; 32]); // random
        hello.push(0); // no session
        hello.extend([0, 4, 0xc0, 0x13, 0xc0, 0x2b]); // an old suite and one of TLS 1.2
        hello.extend([1, 0]); // no compression
        let mut record = vec![
            22,
            3,
            minor,
            0,
            u8::try_from(hello.len()).unwrap() + 4,
            1,
            0,
            0,
        ];
        record.push(u8::try_from(hello.len()).unwrap());
        record.extend(hello);
        let mut socket = TcpStream::connect(app.public).await.unwrap();
        socket.write_all(&record).await.unwrap();
        let mut answer = Vec::new();
        socket.read_to_end(&mut answer).await.unwrap();
        // An alert (21) that is fatal (2): protocol_version (70), or handshake_failure (40) where it
        // was not even read so far.
        let refusals: [&[u8]; 2] = [&[2, 70], &[2, 40]];
        assert_eq!(answer[0], 21, "3.{minor}");
        assert!(refusals.contains(&&answer[5..]), "3.{minor}: {answer:?}");
    }
    let mut socket = TcpStream::connect(app.public).await.unwrap();
    let plain = b"GET /v1/orders HTTP/1.1\r\nhost: localhost\r\n\r\n";
    socket.write_all(plain).await.unwrap();
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).await.unwrap();
    assert!(!answer.starts_with(b"HTTP/"), "{answer:?}");
}

/// Whoever connects and says nothing holds up nobody, and neither does who asks nothing.
#[tokio::test]
async fn silent_clients_hold_up_nobody() {
    let authority = Authority::new();
    let files = Files::of(&authority);
    let app = start(files.settings()).await;
    let mut silent = Vec::new();
    for _ in 0..50 {
        silent.push(TcpStream::connect(app.public).await.unwrap());
    }
    let client = client(&authority).build().unwrap();
    let answer = client.get(url(&app)).send().await.unwrap();
    assert_eq!(answer.status(), 200);
}

#[tokio::test]
async fn changed_files_are_read_anew_and_broken_ones_are_not_taken() {
    let (old, new) = (Authority::new(), Authority::new());
    let files = Files::of(&old);
    let app = start(files.settings()).await;
    // Each asks on a connection of its own.
    let answers = async |authority: &Authority| {
        let client = client(authority).build().unwrap();
        client.get(url(&app)).send().await.is_ok()
    };
    assert!(answers(&old).await);
    std::fs::write(files.path("tls.key"), "half a ke").unwrap();
    let failures = || app.admin_text("/metrics");
    while !failures()
        .await
        .contains("tls_renewals_total{result=\"failed\"}")
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(answers(&old).await);
    files.put(&new.sign("localhost"));
    eventually("the new certificate", async || answers(&new).await).await;
    assert!(!answers(&old).await);
}

#[tokio::test]
async fn clients_must_show_who_they_are_where_that_is_asked() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let files = Files::of(&authority);
    std::fs::write(files.path("clients.crt"), clients.0.pem()).unwrap();
    let app = start(Tls {
        client_ca: Some(files.path("clients.crt")),
        ..files.settings()
    })
    .await;
    let shown_by = |signer: &Authority| {
        let (certificate, key) = signer.sign("shop");
        let identity = Identity::from_pem(format!("{certificate}{key}").as_bytes()).unwrap();
        client(&authority).identity(identity).build().unwrap()
    };
    let answer = shown_by(&clients).get(url(&app)).send().await.unwrap();
    assert_eq!(answer.status(), 200);
    let stranger = shown_by(&authority);
    stranger.get(url(&app)).send().await.unwrap_err();
    let nobody = client(&authority).build().unwrap();
    nobody.get(url(&app)).send().await.unwrap_err();
}

#[test]
fn files_that_cannot_be_used_are_named() {
    let authority = Authority::new();
    let files = Files::of(&authority);
    let error = |tls: &Tls| match service::tls::Certificates::open(tls) {
        Ok(_) => panic!("that was taken"),
        Err(error) => format!("{error:#}"),
    };
    let with = |key: &Path| Tls {
        key: key.to_owned(),
        ..files.settings()
    };
    let missing = error(&with(&files.path("nowhere.key")));
    assert!(
        missing.contains("tls.key = ") && missing.contains("nowhere.key"),
        "{missing}"
    );
    let (_, other) = authority.sign("localhost");
    std::fs::write(files.path("other.key"), other).unwrap();
    let other = error(&with(&files.path("other.key")));
    assert!(
        other.contains("does not belong to tls.certificate"),
        "{other}"
    );
    let no_certificate = error(&Tls {
        certificate: files.path("tls.key"),
        ..files.settings()
    });
    assert!(
        no_certificate.contains("no PEM certificate"),
        "{no_certificate}"
    );
}
