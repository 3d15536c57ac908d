//! What is asked of a database at the same time, asked as one: group commit, and the same for reads. What is
//! asked for while all who ask are at it gathers, and goes with the next of them; nobody waits for more to
//! come.

use std::num::NonZeroU32;
use std::sync::Arc;

use futures_util::future::join_all;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use super::StorageError;
use super::pools::{Waiting, Waits};

/// Of so many connections one asks at a time: fewer and larger statements cost less, and are answered sooner
/// by a server that is busy.
const CONNECTIONS_FOR_A_WORKER: u32 = 8;
/// So that one which hears nothing does not keep all waiting.
const FEWEST_WORKERS: u32 = 2;
/// In one statement.
const MOST: usize = 64;
/// Of those who wait until somebody asks for them; more wait before it.
const QUEUE: usize = 1024;

struct Asked<T, A> {
    item: Arc<T>,
    /// Until its statement begins.
    waiting: Option<Waiting>,
    answer: oneshot::Sender<Result<A, StorageError>>,
}

/// Items of type `T`, each with an answer.
pub(super) struct Gathered<T, A = ()> {
    waits: Waits,
    queue: mpsc::Sender<Asked<T, A>>,
    _workers: Vec<AbortOnDropHandle<()>>,
}

impl<T: Send + Sync + 'static, A: Send + 'static> Gathered<T, A> {
    /// With a share of so many connections; `waits` counts those whose statement has not begun. `ask` does all
    /// of what it is given, or nothing; its answers are in the order of the items.
    pub(super) fn new<W, F>(connections: NonZeroU32, waits: Waits, ask: W) -> Self
    where
        W: Fn(Vec<Arc<T>>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Result<Vec<A>, StorageError>> + Send + 'static,
    {
        let workers = connections.get().div_ceil(CONNECTIONS_FOR_A_WORKER);
        let workers = workers.max(FEWEST_WORKERS).min(connections.get());
        let (queue, asked) = mpsc::channel(QUEUE);
        let asked = Arc::new(Mutex::new(asked));
        let worker = |_| {
            let (asked, ask) = (Arc::clone(&asked), ask.clone());
            AbortOnDropHandle::new(tokio::spawn(async move {
                loop {
                    let mut batch = Vec::new();
                    if asked.lock().await.recv_many(&mut batch, MOST).await == 0 {
                        return;
                    }
                    let served = tokio::spawn(serve(batch, ask.clone()));
                    // A panic is the end of a batch, not of its worker.
                    let _ = AbortOnDropHandle::new(served).await;
                }
            }))
        };
        Self {
            waits,
            queue,
            _workers: (0..workers).map(worker).collect(),
        }
    }

    /// Asks, alone or with others. For whoever is gone before it is begun, nothing is done.
    pub(super) async fn ask(&self, item: T) -> Result<A, StorageError> {
        let (answer, outcome) = oneshot::channel();
        let asked = Asked {
            item: Arc::new(item),
            waiting: Some(self.waits.one()),
            answer,
        };
        self.queue.send(asked).await.map_err(|_| given_up())?;
        outcome.await.map_err(|_| given_up())?
    }
}

fn given_up() -> StorageError {
    StorageError::Busy("what was asked for was given up".to_owned())
}

/// Goes on for as long as anybody waits for it.
async fn serve<T, A, F>(mut batch: Vec<Asked<T, A>>, ask: impl Fn(Vec<Arc<T>>) -> F)
where
    F: Future<Output = Result<Vec<A>, StorageError>>,
{
    batch.retain(|asked| !asked.answer.is_closed());
    for asked in &mut batch {
        asked.waiting = None;
    }
    let items: Vec<Arc<T>> = batch.iter().map(|asked| Arc::clone(&asked.item)).collect();
    if items.is_empty() {
        return;
    }
    let all = tokio::select! {
        outcome = ask(items) => outcome,
        _ = join_all(batch.iter_mut().map(|asked| asked.answer.closed())) => return,
    };
    // Who has gone meanwhile does not want to know.
    match all {
        Ok(answers) => {
            for (asked, answer) in batch.into_iter().zip(answers) {
                let _ = asked.answer.send(Ok(answer));
            }
        }
        // One may be to blame, and the others are not.
        Err(StorageError::Failed(_)) if batch.len() > 1 => {
            for mut asked in batch {
                let outcome = tokio::select! {
                    outcome = ask(vec![asked.item]) => outcome,
                    () = asked.answer.closed() => continue,
                };
                let outcome =
                    outcome.and_then(|answers| answers.into_iter().next().ok_or_else(given_up));
                let _ = asked.answer.send(outcome);
            }
        }
        Err(error) => {
            for asked in batch {
                let _ = asked.answer.send(Err(error.clone()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use tokio::sync::Semaphore;

    use super::*;

    /// What was written, by batches, when it may be: an item may be bad, and then nothing of its batch is.
    struct Writes {
        may: Semaphore,
        done: Mutex<Vec<Vec<&'static str>>>,
    }

    fn gathered() -> (Arc<Writes>, Arc<Gathered<&'static str, usize>>) {
        let writes = Arc::new(Writes {
            may: Semaphore::new(0),
            done: Mutex::default(),
        });
        let by = Arc::clone(&writes);
        let write = move |items: Vec<Arc<&'static str>>| {
            let by = Arc::clone(&by);
            async move {
                by.may.acquire().await.unwrap().forget();
                let items: Vec<_> = items.iter().map(|item| **item).collect();
                assert!(!items.contains(&"panic"), "as a test wants it");
                if items.contains(&"bad") {
                    return Err(StorageError::Failed("a bad one".to_owned()));
                }
                let answers = items.iter().map(|item| item.len()).collect();
                by.done.lock().unwrap().push(items);
                Ok(answers)
            }
        };
        (
            writes,
            Arc::new(Gathered::new(NonZeroU32::MIN, Waits::default(), write)),
        )
    }

    /// Asks for a write, and comes back when that is in the queue or with the writer.
    async fn ask(
        gathered: &Arc<Gathered<&'static str, usize>>,
        item: &'static str,
    ) -> AbortOnDropHandle<Result<usize, StorageError>> {
        let by = Arc::clone(gathered);
        let asked = tokio::spawn(async move { by.ask(item).await });
        // On one thread: everybody has gone as far as they can.
        for _ in 0..10 {
            tokio::task::yield_now().await;
        }
        AbortOnDropHandle::new(asked)
    }

    #[tokio::test]
    async fn what_is_asked_for_meanwhile_is_written_as_one() {
        let (writes, gathered) = gathered();
        let mut asked = Vec::new();
        for item in ["one", "two", "three", "four"] {
            asked.push(ask(&gathered, item).await);
        }
        // Before its turn has come.
        drop(asked.remove(2));
        // All but the first, whose statement has begun.
        assert_eq!(gathered.waits.number(), 3);
        writes.may.add_permits(2);
        let mut answers = Vec::new();
        for outcome in asked {
            answers.push(outcome.await.unwrap().unwrap());
        }
        assert_eq!(answers, ["one", "two", "four"].map(str::len));
        assert_eq!(gathered.waits.number(), 0);
        let done = writes.done.lock().unwrap();
        assert_eq!(*done, [vec!["one"], vec!["two", "four"]]);
    }

    #[tokio::test]
    async fn one_that_cannot_be_written_keeps_the_others_from_nothing() {
        let (writes, gathered) = gathered();
        let mut asked = Vec::new();
        for item in ["one", "two", "bad", "three"] {
            asked.push(ask(&gathered, item).await);
        }
        writes.may.add_permits(5);
        let mut outcomes = Vec::new();
        for outcome in asked {
            outcomes.push(outcome.await.unwrap().is_ok());
        }
        assert_eq!(outcomes, [true, true, false, true]);
        let done = writes.done.lock().unwrap();
        assert_eq!(*done, [["one"], ["two"], ["three"]]);
    }

    #[tokio::test]
    async fn a_panic_ends_a_batch_and_not_its_writer() {
        let (writes, gathered) = gathered();
        let panicked = ask(&gathered, "panic").await;
        let next = ask(&gathered, "next").await;
        writes.may.add_permits(2);
        let given_up = panicked.await.unwrap();
        assert!(
            matches!(given_up, Err(StorageError::Busy(_))),
            "{given_up:?}"
        );
        next.await.unwrap().unwrap();
    }

    /// A server that does not answer keeps the writer for as long as anybody waits.
    #[tokio::test]
    async fn what_nobody_waits_for_any_more_is_left() {
        let (writes, gathered) = gathered();
        drop(ask(&gathered, "silence").await);
        let next = ask(&gathered, "next").await;
        writes.may.add_permits(1);
        next.await.unwrap().unwrap();
        assert_eq!(*writes.done.lock().unwrap(), [["next"]]);
    }
}
