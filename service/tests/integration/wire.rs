//! What lies between a service and a server, and what can happen to it.

use std::net::SocketAddr;
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
    /// The same for the connections that there are; new ones are whole.
    Forsaken,
}

pub struct Wire {
    pub address: SocketAddr,
    state: watch::Sender<State>,
    task: JoinHandle<()>,
}

impl Wire {
    /// To `to`, a host and port, from a port of its own.
    pub async fn to(to: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (state, seen) = watch::channel(State::Whole);
        let to = to.to_owned();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((near, _)) = listener.accept().await {
                connections.spawn(connect(near, to.clone(), seen.clone()));
            }
        });
        Self {
            address,
            state,
            task,
        }
    }

    pub fn becomes(&self, state: State) {
        self.state.send_replace(state);
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn connect(near: TcpStream, to: String, state: watch::Receiver<State>) {
    if *state.borrow() == State::Cut {
        return;
    }
    let Ok(far) = TcpStream::connect(to).await else {
        return;
    };
    let (near_read, near_write) = near.into_split();
    let (far_read, far_write) = far.into_split();
    let is_new = *state.borrow() == State::Forsaken;
    let mut directions = JoinSet::new();
    directions.spawn(carry(near_read, far_write, state.clone(), false, is_new));
    directions.spawn(carry(far_read, near_write, state.clone(), true, is_new));
    // When a direction has ended in order, the other may still have something to say.
    while directions.join_next().await.is_some() && *state.borrow() != State::Cut {}
}

async fn carry(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut state: watch::Receiver<State>,
    is_answers: bool,
    is_new: bool,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let now = *state.borrow_and_update();
        match now {
            State::Cut => return Ok(()),
            State::Lost => std::future::pending().await,
            State::HalfClosed if is_answers => return to.shutdown().await,
            State::Forsaken if is_answers && !is_new => return to.shutdown().await,
            State::Silent => {
                let _ = state.changed().await;
                continue;
            }
            State::Whole | State::Slow(_) | State::HalfClosed | State::Forsaken => {}
        }
        let read = tokio::select! {
            read = from.read(&mut buffer) => read?,
            _ = state.changed() => continue,
        };
        if read == 0 {
            return to.shutdown().await;
        }
        if let State::Slow(time) = now {
            tokio::time::sleep(time).await;
        }
        to.write_all(&buffer[..read]).await?;
    }
}
