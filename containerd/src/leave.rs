//! A container that goes: what is left of it when it runs elsewhere.

use std::time::Duration;

use crate::client::{Client, ClientError};

/// How long the shim may take to hear that its process has ended.
const STOPPED_MAX: Duration = Duration::from_secs(10);

/// Deletes the stopped task of a container, its snapshot and the container; all of them may be
/// gone.
///
/// # Errors
/// As of all calls: what was not reached is still there, and this may be tried again.
pub async fn remove(client: &Client, id: &str) -> Result<(), ClientError> {
    let Some(container) = client.container(id).await? else {
        return Ok(());
    };
    client.delete_task(id, STOPPED_MAX).await?;
    let snapshot = container.snapshot();
    if !snapshot.1.is_empty() {
        client.remove_snapshot(snapshot).await?;
    }
    // The last, since all else is found by it.
    client.delete(id).await
}
