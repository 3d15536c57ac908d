//! What lies between a service and a server, and what can happen to it.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Whole,
    /// Connections end, and new ones too.
    Cut,
    /// Nothing gets through, and nobody is told, until it is whole again.
    Silent,
    /// The same, and nothing of those connections ever gets through again: new ones do.
    Lost,
    /// Everything takes this much longer.
    Slow(Duration),
    /// The server seems to have said all; what it is sent still arrives.
    HalfClosed,
}

/// Words of an answer that is to be lost.
type Loses = Arc<Mutex<Option<&'static str>>>;

pub struct Wire {
    pub address: SocketAddr,
    state: watch::Sender<State>,
    loses: Loses,
    task: JoinHandle<()>,
}

impl Wire {
    /// To `to`, a host and port, from a port of its own.
    pub async fn to(to: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (state, seen) = watch::channel(State::Whole);
        let loses = Loses::default();
        let to_lose = Arc::clone(&loses);
        let to = to.to_owned();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                let loses = Arc::clone(&to_lose);
                connections.spawn(connect(near, to.clone(), seen.clone(), loses));
            }
        });
        Self {
            address,
            state,
            loses,
            task,
        }
    }

    pub fn becomes(&self, state: State) {
        self.state.send_replace(state);
    }

    /// The next answer that has these words in it is lost, and its connection with it.
    pub fn loses(&self, words: &'static str) {
        *self.loses.lock().unwrap() = Some(words);
    }

    pub fn has_lost_it(&self) -> bool {
        self.loses.lock().unwrap().is_none()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn connect(near: TcpStream, to: String, state: watch::Receiver<State>, loses: Loses) {
    if *state.borrow() == State::Cut {
        return;
    }
    let Ok(far) = TcpStream::connect(to).await else {
        return;
    };
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let mut directions = JoinSet::new();
    directions.spawn(carry(near_read, far_write, state.clone(), None));
    directions.spawn(carry(far_read, near_write, state.clone(), Some(loses)));
    // When a direction has ended in order, the other may still have something to say.
    while directions.join_next().await.is_some() && *state.borrow() != State::Cut {}
}

async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<State>,
    // Of answers: which one is lost.
    loses: Option<Loses>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let now = *state.borrow_and_update();
        match now {
            State::Cut => return Ok(()),
            State::Lost => std::future::pending().await,
            State::HalfClosed if loses.is_some() => return to.shutdown().await,
            State::Silent => {
                let _ = state.changed().await;
                continue;
            }
            State::Whole | State::Slow(_) | State::HalfClosed => {}
        }
        let read = tokio::select! {
            read = from.read(&mut buffer) => read?,
            _ = state.changed() => continue,
        };
        let is_lost = loses.as_ref().is_some_and(|loses| {
            let mut loses = loses.lock().unwrap();
            let said = String::from_utf8_lossy(&buffer[..read]);
            loses.take_if(|words| said.contains(*words)).is_some()
        });
        if read == 0 || is_lost {
            return to.shutdown().await;
        }
        if let State::Slow(time) = now {
            tokio::time::sleep(time).await;
        }
        to.write_all(&buffer[..read]).await?;
    }
}
