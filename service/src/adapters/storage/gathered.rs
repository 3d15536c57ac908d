//! Writes that are asked for at the same time, done as one: group commit. What is asked for while all
//! writers are at it gathers, and is the next writer's; nobody waits for more to come.

use std::sync::Arc;

use futures_util::future::join_all;
use tokio::sync::{Mutex, mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;

use super::StorageError;

/// In one statement.
const MOST: usize = 64;
/// Of those who wait for a writer; more wait before it.
const QUEUE: usize = 1024;

type Outcome = Result<(), StorageError>;

struct Asked<T> {
    item: Arc<T>,
    answer: oneshot::Sender<Outcome>,
}

pub(super) struct Gathered<T> {
    queue: mpsc::Sender<Asked<T>>,
    _writers: Vec<AbortOnDropHandle<()>>,
}

impl<T: Send + Sync + 'static> Gathered<T> {
    /// With so many writes at a time. `write` does all of what it is given, or nothing.
    pub(super) fn new<W, F>(writers: u32, write: W) -> Self
    where
        W: Fn(Vec<Arc<T>>) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Outcome> + Send + 'static,
    {
        let (queue, asked) = mpsc::channel(QUEUE);
        let asked = Arc::new(Mutex::new(asked));
        let writer = |_| {
            let (asked, write) = (Arc::clone(&asked), write.clone());
            AbortOnDropHandle::new(tokio::spawn(async move {
                loop {
                    let mut batch = Vec::new();
                    if asked.lock().await.recv_many(&mut batch, MOST).await == 0 {
                        return;
                    }
                    let served = tokio::spawn(serve(batch, write.clone()));
                    // A panic is the end of a batch, not of its writer.
                    let _ = AbortOnDropHandle::new(served).await;
                }
            }))
        };
        Self {
            queue,
            _writers: (0..writers).map(writer).collect(),
        }
    }

    /// Writes it, alone or with others. For whoever is gone before it is begun, nothing is written.
    pub(super) async fn write(&self, item: T) -> Outcome {
        let (answer, outcome) = oneshot::channel();
        let item = Arc::new(item);
        let given_up = || StorageError::Busy("the write was given up".to_owned());
        let queued = self.queue.send(Asked { item, answer }).await;
        queued.map_err(|_| given_up())?;
        outcome.await.map_err(|_| given_up())?
    }
}

/// Goes on for as long as anybody waits for it.
async fn serve<T, F>(mut batch: Vec<Asked<T>>, write: impl Fn(Vec<Arc<T>>) -> F)
where
    F: Future<Output = Outcome>,
{
    batch.retain(|asked| !asked.answer.is_closed());
    let items: Vec<Arc<T>> = batch.iter().map(|asked| Arc::clone(&asked.item)).collect();
    if items.is_empty() {
        return;
    }
    let all = tokio::select! {
        outcome = write(items) => outcome,
        _ = join_all(batch.iter_mut().map(|asked| asked.answer.closed())) => return,
    };
    let is_one_to_blame = batch.len() > 1 && matches!(all, Err(StorageError::Failed(_)));
    for mut asked in batch {
        let outcome = match is_one_to_blame {
            false => all.clone(),
            true => tokio::select! {
                outcome = write(vec![asked.item]) => outcome,
                () = asked.answer.closed() => continue,
            },
        };
        // Who has gone meanwhile does not want to know.
        let _ = asked.answer.send(outcome);
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

    fn gathered() -> (Arc<Writes>, Arc<Gathered<&'static str>>) {
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
                by.done.lock().unwrap().push(items);
                Ok(())
            }
        };
        (writes, Arc::new(Gathered::new(1, write)))
    }

    /// Asks for a write, and comes back when that is in the queue or with the writer.
    async fn ask(
        gathered: &Arc<Gathered<&'static str>>,
        item: &'static str,
    ) -> AbortOnDropHandle<Outcome> {
        let by = Arc::clone(gathered);
        let asked = tokio::spawn(async move { by.write(item).await });
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
        writes.may.add_permits(2);
        for outcome in asked {
            outcome.await.unwrap().unwrap();
        }
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
