//! Orders' events over a WebSocket (RFC 6455): each one a text message, in the JSON format of
//! CloudEvents.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{Query, State};
use axum::response::Response;
use futures_util::{Stream, StreamExt};
use serde::Deserialize;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::problem::Problem;
use crate::app::{App, Error};
use crate::auth::{Caller, Operation};
use crate::domain::events::Event;
use crate::feed::TooSlow;
use crate::sessions::Session;

/// Clients have nothing to say but pongs.
const MAX_MESSAGE: usize = 4096;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsQuery {
    customer: Option<String>,
}

/// `GET /v1/events?customer=ada`: what happens to orders from now on. A client that reads too slowly is
/// closed with 1013, one that does not answer pings is let go, all are closed with 1001 when the
/// process ends.
pub async fn events(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<EventsQuery>, axum::extract::rejection::QueryRejection>,
    upgrade: Result<WebSocketUpgrade, axum::extract::ws::rejection::WebSocketUpgradeRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(super::rest::unreadable_query)?;
    let upgrade = upgrade.map_err(|rejection| {
        Problem::new(super::fault::Fault::Unreadable)
            .status(rejection.status())
            .detail(rejection.body_text())
    })?;
    caller.check(Operation::WatchOrders)?;
    let session = app.sessions.begin().ok_or(Error::Full)?;
    let events = app.feed.events(query.customer);
    let heartbeat = app.config.server.heartbeat.0;
    let upgrade = upgrade
        .max_message_size(MAX_MESSAGE)
        .max_frame_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(async move |socket| {
        let mut socket = socket;
        let outcome = talk(&mut socket, session, events, heartbeat).await;
        if let Some((code, reason)) = outcome {
            let reason = reason.into();
            let close = Message::Close(Some(CloseFrame { code, reason }));
            // Whoever is gone needs no goodbye.
            let _ = timeout(heartbeat, socket.send(close)).await;
        }
    }))
}

/// Why the conversation is over: what to say, or nothing where the client is gone.
type Goodbye = Option<(u16, &'static str)>;

async fn talk(
    socket: &mut WebSocket,
    session: Session,
    mut events: impl Stream<Item = Result<Arc<Event>, TooSlow>> + Unpin,
    heartbeat: Duration,
) -> Goodbye {
    let mut beat = interval(heartbeat);
    beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut heard = Instant::now();
    loop {
        let message = tokio::select! {
            () = session.ending() => return Some((close_code::AWAY, "the service is stopping")),
            event = events.next() => match event? {
                Err(TooSlow) => return Some((close_code::AGAIN, "too slow")),
                Ok(event) => match serde_json::to_string(&*event) {
                    Ok(text) => Message::Text(text.into()),
                    Err(_) => return Some((close_code::ERROR, "internal")),
                },
            },
            said = socket.recv() => {
                heard = Instant::now();
                match said {
                    // Pings are answered by the library; a close is, too, by the next read.
                    Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Close(_))) => continue,
                    Some(Ok(Message::Text(_) | Message::Binary(_))) => {
                        return Some((close_code::UNSUPPORTED, "there is nothing to say"));
                    }
                    Some(Err(_)) | None => return None,
                }
            }
            _ = beat.tick() => {
                if heard.elapsed() > 2 * heartbeat {
                    return None;
                }
                Message::Ping(axum::body::Bytes::new())
            }
        };
        // Whoever does not read must not be waited for for ever.
        if !matches!(timeout(heartbeat, socket.send(message)).await, Ok(Ok(()))) {
            return None;
        }
    }
}
