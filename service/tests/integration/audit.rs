//! The audit log: everything that was done is in it, and whoever changes it is found out.

use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::Value;
use service::app::App;
use service::audit::Verdict;
use service::config::{AuthMode, Config};

use crate::commands::run;
use crate::database::Database;
use crate::test_app::{TestApp, order, shipped_config};

async fn verdict(config: &Config, anchor: Option<&str>) -> Verdict {
    App::verify_audit(config.clone(), anchor).await.unwrap()
}

/// The log with so many entries; they follow the orders a moment later.
async fn entries(config: &Config, wanted: i64) -> String {
    let began = Instant::now();
    loop {
        match verdict(config, None).await {
            Verdict::Whole { entries, last } if entries == wanted => return last,
            other => assert!(began.elapsed() < Duration::from_secs(20), "{other:?}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn what_was_done_is_logged_and_changes_are_found() {
    for database in Database::each().await {
        let mut config = shipped_config();
        database.use_in(&mut config);
        let key = tempfile::tempdir().unwrap();
        let key = key.path().join("key");
        let mut auth = config.auth.clone();
        auth.mode = AuthMode::Development;
        auth.development_key.clone_from(&key);
        let token = service::auth::development::token(&auth, "ada", &["clerk".to_owned()], 600);
        let bearer = [("authorization", format!("Bearer {}", token.unwrap()))];
        let app = TestApp::start_on(database.clone(), |config| config.auth = auth).await;

        let (_, placed) = app
            .send_with(Method::POST, "/v1/orders", Some(order()), &bearer)
            .await;
        let cancel = format!("/v1/orders/{}/cancel", placed["id"].as_str().unwrap());
        app.send_with(Method::POST, &cancel, None, &bearer).await;
        // Cancelled once: the second time nothing was done.
        app.send_with(Method::POST, &cancel, None, &bearer).await;
        let early = entries(&config, 2).await;
        let again = app.send_with(Method::POST, "/v1/orders", Some(order()), &bearer);
        assert_eq!(again.await.0, 201);
        let last = entries(&config, 3).await;
        let whole = Verdict::Whole { entries: 3, last };
        assert_eq!(verdict(&config, Some(&early)).await, whole);
        let logged = app.app.storage().audited(1, 1).await.unwrap();
        let event: Value = serde_json::from_str(&logged[0].event).unwrap();
        assert_eq!(event["type"], "order.cancelled.v1");
        assert_eq!(
            (&event["authid"], &event["subject"]),
            (&"ada".into(), &placed["id"])
        );

        // The same by hand.
        let verify = async |words: &str| {
            let command = format!("audit verify{words}");
            run(&command, &[("SERVICE__DATABASE__URL", database.url())]).await
        };
        let (code, said) = verify(&format!(" --anchor {early}")).await;
        assert_eq!((code, said.contains("3 entries")), (0, true), "{said}");

        // The database itself takes no change.
        let change = "UPDATE audit_log SET event = replace(event, 'ada', 'eve') WHERE seq = 2";
        let refused = database.try_execute(change).await.unwrap_err();
        assert!(refused.contains("not changed"), "{refused}");
        let refused = database
            .try_execute("DELETE FROM audit_log WHERE seq = 3")
            .await;
        assert!(refused.unwrap_err().contains("not"));

        // Unless somebody who owns it takes the guards away: then the chain tells.
        let guards: &[&str] = match database.kind {
            "SQLite" => &[
                "DROP TRIGGER audit_log_is_not_changed",
                "DROP TRIGGER audit_log_is_not_shortened",
            ],
            _ => &["DROP TRIGGER audit_log_stays ON audit_log"],
        };
        for guard in guards {
            database.execute(guard).await;
        }
        let broken_at = async |anchor| match verdict(&config, anchor).await {
            Verdict::Broken { seq, .. } => seq,
            whole @ Verdict::Whole { .. } => panic!("{whole:?}"),
        };
        database
            .execute("DELETE FROM audit_log WHERE seq = 3")
            .await;
        assert_eq!(
            verdict(&config, None).await,
            Verdict::Whole {
                entries: 2,
                last: early.clone()
            }
        );
        let Verdict::Whole { last, .. } = whole else {
            panic!()
        };
        assert_eq!(broken_at(Some(last.as_str())).await, 2);
        let (code, said) = verify(&format!(" --anchor {last}")).await;
        assert_eq!((code, said.contains("is broken")), (1, true), "{said}");
        // A gap, on a chain that is whole otherwise; then other words, where there is no gap.
        let gap = "UPDATE audit_log SET seq = 7 WHERE seq = 2";
        database.execute(gap).await;
        let Verdict::Broken { seq, why } = verdict(&config, None).await else {
            panic!()
        };
        assert!(seq == 7 && why.contains("the number 1"), "{seq}: {why}");
        database
            .execute("UPDATE audit_log SET seq = 2 WHERE seq = 7")
            .await;
        assert!(matches!(
            verdict(&config, None).await,
            Verdict::Whole { entries: 2, .. }
        ));
        database.execute(change).await;
        assert_eq!(broken_at(None).await, 2);
    }
}
