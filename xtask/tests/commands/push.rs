//! Images to a real registry.

use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use test_servers::{Server, lease};

use crate::fixture::{Fixture, ended};
use crate::guard::{CREDENTIALS, Scheme, guard};

async fn get(client: &reqwest::Client, url: String) -> (u16, Vec<u8>) {
    let manifest = "application/vnd.oci.image.manifest.v1+json";
    let answer = client
        .get(url)
        .header("accept", manifest)
        .send()
        .await
        .unwrap();
    let status = answer.status().as_u16();
    (status, answer.bytes().await.unwrap().to_vec())
}

fn digest(content: &[u8]) -> String {
    let digits: String = Sha256::digest(content)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{digits}")
}

#[tokio::test]
async fn an_image_arrives_as_it_is() {
    let registry = lease(Server::Registry).await.unwrap();
    let address = registry.address.clone();
    let host = address.strip_prefix("http://").unwrap().to_owned();
    let name = format!("test-{}/service", std::process::id());
    let reference = format!("{host}/{name}:1.0.0");
    let fixture = Fixture::new();
    // The engine may have it on a network of its own.
    let push = [
        "image",
        "--version",
        "1.0.0",
        "--plain-http",
        "--push",
        &reference,
    ];
    let pushed = fixture.run(&push).expect(0, "passed");
    let image = pushed.finished()["image"].as_str().unwrap().to_owned();
    assert!(
        pushed
            .said
            .contains(&format!("pushed {host}/{name}@{image}")),
        "{}",
        pushed.said
    );

    // What is there under the digest and under the tag is what was made, with all that it names.
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    for by in [image.as_str(), "1.0.0"] {
        let (status, manifest) = get(&client, format!("{address}/v2/{name}/manifests/{by}")).await;
        assert_eq!((status, digest(&manifest)), (200, image.clone()), "by {by}");
        let manifest: Value = serde_json::from_slice(&manifest).unwrap();
        for blob in [&manifest["config"], &manifest["layers"][0]] {
            let blob = blob["digest"].as_str().unwrap();
            let (status, content) = get(&client, format!("{address}/v2/{name}/blobs/{blob}")).await;
            assert_eq!((status, digest(&content)), (200, blob.to_owned()));
        }
    }
    let again = fixture.run(&push).expect(0, "passed");
    assert!(again.said.contains("is there"), "{}", again.said);
}

/// A registry that asks for a name and a password, and one that sends whoever asks to another
/// server for a token, get what `docker login` has left.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_pushes_says_who_it_is() {
    let registry = lease(Server::Registry).await.unwrap();
    let fixture = Fixture::new();
    let docker = tempfile::tempdir().unwrap();
    for scheme in [Scheme::Basic, Scheme::Bearer] {
        let host = guard(&registry.address, scheme).await;
        let reference = format!("{host}/guarded-{}/service:1.0.0", std::process::id());
        let push = |credentials: &str| {
            let config = json!({ "auths": { &host: { "auth": credentials } } });
            std::fs::write(docker.path().join("config.json"), config.to_string()).unwrap();
            let mut command =
                fixture.command(&["image", "--version", "1.0.0", "--push", &reference]);
            ended(
                command
                    .env("DOCKER_CONFIG", docker.path())
                    .output()
                    .unwrap(),
            )
        };
        // `ci:wrong`
        let refused = push("Y2k6d3Jvbmc=").expect(2, "failed");
        assert!(
            refused.said.contains("docker login"),
            "{scheme:?}: {}",
            refused.said
        );
        assert!(
            !refused.said.contains("wrong"),
            "{scheme:?}: {}",
            refused.said
        );
        let pushed = push(CREDENTIALS).expect(0, "passed");
        assert!(
            pushed.said.contains("pushed "),
            "{scheme:?}: {}",
            pushed.said
        );
    }
    // Nobody elsewhere is told the password for everybody on the way to read.
    let host = guard(&registry.address, Scheme::Elsewhere).await;
    let config = json!({ "auths": { &host: { "auth": CREDENTIALS } } });
    std::fs::write(docker.path().join("config.json"), config.to_string()).unwrap();
    let reference = format!("{host}/guarded/service:1.0.0");
    let mut command = fixture.command(&["image", "--version", "1.0.0", "--push", &reference]);
    let command = command.env("DOCKER_CONFIG", docker.path());
    let refused = ended(command.output().unwrap()).expect(2, "failed");
    let why = "sends whoever pushes to tokens.invalid for a token";
    assert!(refused.said.contains(why), "{}", refused.said);
}

#[test]
fn what_cannot_be_pushed_to_is_refused_before_the_build() {
    let fixture = Fixture::new();
    let refused = |reference: &str| {
        let ended = fixture.run(&["image", "--push", reference]);
        assert!(!ended.said.contains("cargo build"), "{}", ended.said);
        ended.expect(2, "failed").said
    };
    assert!(refused("NOT A NAME").contains("HOST/REPOSITORY[:TAG]"));
    let digest = format!("localhost:1/service@sha256:{}", "0".repeat(64));
    assert!(refused(&digest).contains("name a tag, or none"));
}
