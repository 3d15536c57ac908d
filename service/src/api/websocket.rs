//! Orders' events over a WebSocket (RFC 6455): each one a text message, in the JSON format of
//! CloudEvents. And the conversation that every socket here is.

use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::ws::rejection::WebSocketUpgradeRejection;
use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade, close_code};
use axum::extract::{FromRequestParts, Query, State};
use axum::http::header;
use axum::http::request::Parts;
use axum::http::uri::Authority;
use axum::response::Response;
use futures_util::{Stream, StreamExt};
use serde::Deserialize;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};

use super::fault::Fault;
use super::problem::Problem;
use crate::app::{App, Error};
use crate::auth::{Caller, Operation};
use crate::config::Origin;
use crate::domain::events::Event;
use crate::feed::TooSlow;
use crate::sessions::Session;

/// Clients have nothing to say but pongs.
const MAX_MESSAGE: usize = 4096;
/// How long a goodbye may take.
const GOODBYE: Duration = Duration::from_secs(1);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsQuery {
    customer: Option<String>,
}

/// `GET /v1/events?customer=ada`: what happens to orders from now on. A client that reads too slowly is
/// closed with 1013, one that does not answer pings is let go, all are closed with 1001 when the
/// process ends, and with 1008 when their token does.
pub async fn events(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    query: Result<Query<EventsQuery>, axum::extract::rejection::QueryRejection>,
    Upgrade(upgrade): Upgrade,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(super::rest::unreadable_query)?;
    caller.check(Operation::WatchOrders)?;
    let session = app.sessions.begin(&caller.client).ok_or(Error::Full)?;
    let events = app.feed.events(query.customer).map(|event| match event {
        Err(TooSlow) => Err((close_code::AGAIN, "too slow")),
        Ok(event) => match told(&event) {
            Ok(text) => Ok(Message::text(text)),
            Err(_) => Err((close_code::ERROR, "internal")),
        },
    });
    let events = events.take_until(Box::pin(caller.token_ends()));
    let heartbeat = app.config.server.heartbeat.0;
    let upgrade = upgrade
        .max_message_size(MAX_MESSAGE)
        .max_frame_size(MAX_MESSAGE);
    Ok(upgrade.on_upgrade(async move |socket| {
        let talk = Talk {
            session,
            heartbeat,
            at_the_end: (close_code::POLICY, "the token has ended"),
        };
        let nothing_to_say = |_| Err((close_code::UNSUPPORTED, "there is nothing to say"));
        talk.go_on(socket, events, nothing_to_say).await;
    }))
}

/// An event as everybody may see it: who has caused it, and in which trace, is not for everybody.
fn told(event: &Event) -> serde_json::Result<String> {
    let mut event = serde_json::to_value(event)?;
    if let Some(event) = event.as_object_mut() {
        event.retain(|key, _| !["authid", "traceparent", "tracestate"].contains(&key.as_str()));
    }
    serde_json::to_string(&event)
}

/// Why a conversation is over, as the client is told it (RFC 6455, section 7.4).
pub type Goodbye = (u16, &'static str);

/// A conversation over a socket.
pub struct Talk {
    pub session: Session,
    /// How often it is asked whether somebody is still there.
    pub heartbeat: Duration,
    /// What is said when there is nothing more to say.
    pub at_the_end: Goodbye,
}

impl Talk {
    /// Says what comes, and hands over what is heard, until one of both is over, the client is gone or
    /// silent, or the process ends.
    pub async fn go_on(
        self,
        mut socket: WebSocket,
        to_say: impl Stream<Item = Result<Message, Goodbye>> + Unpin,
        hear: impl FnMut(Message) -> Result<(), Goodbye>,
    ) {
        if let Some((code, reason)) = self.talk(&mut socket, to_say, hear).await {
            let reason = reason.into();
            let close = Message::Close(Some(CloseFrame { code, reason }));
            // Whoever is gone needs no goodbye.
            let _ = timeout(GOODBYE, socket.send(close)).await;
        }
    }

    /// Nothing where the client is gone.
    async fn talk(
        &self,
        socket: &mut WebSocket,
        mut to_say: impl Stream<Item = Result<Message, Goodbye>> + Unpin,
        mut hear: impl FnMut(Message) -> Result<(), Goodbye>,
    ) -> Option<Goodbye> {
        let mut beat = interval(self.heartbeat);
        beat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heard = Instant::now();
        loop {
            let message = tokio::select! {
                () = self.session.ending() => {
                    return Some((close_code::AWAY, "the service is stopping"));
                }
                message = to_say.next() => match message {
                    None => return Some(self.at_the_end),
                    Some(Err(goodbye)) => return Some(goodbye),
                    Some(Ok(message)) => message,
                },
                said = socket.recv() => {
                    heard = Instant::now();
                    match said {
                        // Pings are answered by the library; a close is, too, by the next read.
                        Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Close(_))) => continue,
                        Some(Ok(message)) => match hear(message) {
                            Ok(()) => continue,
                            Err(goodbye) => return Some(goodbye),
                        },
                        Some(Err(_)) | None => return None,
                    }
                }
                _ = beat.tick() => {
                    if heard.elapsed() > 2 * self.heartbeat {
                        return None;
                    }
                    Message::Ping(axum::body::Bytes::new())
                }
            };
            // Whoever does not read must not be waited for for ever, and not at all at the end.
            tokio::select! {
                sent = timeout(self.heartbeat, socket.send(message)) => {
                    if !matches!(sent, Ok(Ok(()))) {
                        return None;
                    }
                }
                () = self.session.ending() => {
                    return Some((close_code::AWAY, "the service is stopping"));
                }
            }
        }
    }
}

/// A request to become a WebSocket, from a page that may: browsers ask nobody before they send one.
pub struct Upgrade(pub WebSocketUpgrade);

impl FromRequestParts<Arc<App>> for Upgrade {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Problem> {
        if !may_connect(parts, &app.config.server.allowed_origins) {
            return Err(
                Problem::new(Fault::Forbidden).detail("pages of that origin may not connect")
            );
        }
        let upgrade = WebSocketUpgrade::from_request_parts(parts, app).await;
        upgrade
            .map(Self)
            .map_err(|rejection: WebSocketUpgradeRejection| {
                Problem::new(Fault::Unreadable)
                    .status(rejection.status())
                    .detail(rejection.body_text())
            })
    }
}

/// Programs send no `Origin`; pages may be this host's own, or of those that are allowed.
fn may_connect(parts: &Parts, allowed: &[Origin]) -> bool {
    let Some(origin) = parts.headers.get(header::ORIGIN) else {
        return true;
    };
    let origin = origin.to_str().unwrap_or_default();
    // HTTP/2 has it in `:authority`.
    let host = match parts.headers.get(header::HOST) {
        Some(host) => host.to_str().ok(),
        None => parts.uri.authority().map(Authority::as_str),
    };
    let is_own = host.is_some_and(|host| {
        let own = origin.split_once("://").map(|(_, own)| own);
        own == Some(host)
    });
    is_own || allowed.iter().any(|allowed| allowed.0 == origin)
}
