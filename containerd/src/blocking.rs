//! Calls for whoever is not asynchronous, or is and may block.

use std::path::Path;
use std::thread;
use std::time::Duration;

use tokio::runtime::Builder;
use tokio::time::timeout;

use crate::client::{Client, ClientError};

/// Has `work` done with a connection to the containerd at `socket`, in its `namespace`, and waits
/// for it for `limit` at most.
///
/// # Errors
/// [`ClientError::Late`], and what `work` says.
pub fn with<T: Send>(
    (socket, namespace): (&Path, &str),
    limit: Duration,
    work: impl AsyncFnOnce(Client) -> Result<T, ClientError> + Send,
) -> Result<T, ClientError> {
    block_on(limit, async || {
        work(Client::connect(socket, namespace).await?).await
    })
}

/// Waits for `work`, for `limit` at most.
///
/// # Errors
/// [`ClientError::Late`], and what `work` says.
pub fn block_on<T: Send, E: From<ClientError> + Send>(
    limit: Duration,
    work: impl AsyncFnOnce() -> Result<T, E> + Send,
) -> Result<T, E> {
    let work = move || {
        let runtime = Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(ClientError::Runtime)?;
        runtime.block_on(async {
            let late = |_| E::from(ClientError::Late { limit });
            timeout(limit, work()).await.map_err(late)?
        })
    };
    // A thread of its own: this one may be of another runtime.
    thread::scope(|scope| {
        let done = scope.spawn(work).join();
        done.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
