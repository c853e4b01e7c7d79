//! Work on a thread of its own, which may never end.
//!
//! A file system whose server does not answer holds whoever asks it something, often in a sleep
//! that not even a kill ends. So nobody who has to go on asks: a thread does, and whoever waits for
//! it can stop waiting. It is none of the runtime's: those are few, and the runtime waits for them
//! at its end.
//!
//! Absent: a way to end such a thread. It ends when the server answers, and what it found then is
//! dropped: work must not change what somebody else relies on meanwhile.

use std::time::Duration;

use pageferry_proto::wire::code::{ErrorCode, Failure};
use tokio::sync::oneshot;

/// Begins `work` on a thread called `name` (15 bytes are shown). The receiver fails if there is no
/// thread to be had, or the work panics.
pub fn begin<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> oneshot::Receiver<T> {
    let (end, ended) = oneshot::channel();
    let spawned = std::thread::Builder::new()
        .name(name.to_owned())
        // Nobody may be waiting any more.
        .spawn(move || drop(end.send(work())));
    if let Err(error) = spawned {
        // The sender is gone with the closure, so whoever waits hears of it.
        tracing::warn!("no thread for {name}: {error}");
    }
    ended
}

/// As [`begin`], and waits for its end; to stop waiting, drop the future.
pub async fn done<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Failure> {
    begin(name, work).await.map_err(|_| {
        let text = format!("the thread for {name} ended without a word, or could not be had");
        Failure::new(ErrorCode::Internal, text)
    })
}

/// As [`done`], for at most `limit`. `what` is what is looked at, for the failure.
pub async fn within<T: Send + 'static>(
    name: &'static str,
    (what, limit): (&str, Duration),
    work: impl FnOnce() -> Result<T, Failure> + Send + 'static,
) -> Result<T, Failure> {
    match tokio::time::timeout(limit, done(name, work)).await {
        Ok(done) => done?,
        Err(_) => Err(Failure::new(
            ErrorCode::Timeout,
            format!("looking at {what} did not end within {limit:?}: does its storage answer?"),
        )),
    }
}
