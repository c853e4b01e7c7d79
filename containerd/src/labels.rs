//! Labels of a container that is between two nodes.
//!
//! containerd's restart monitor starts every container again whose [`STATUS`] says that it is to
//! run, and which does not. A container that moves does not run at one of its nodes, at any moment.
//! So the label is put aside, in containerd's own database, under another name, before the source's
//! is frozen, and at the target before the container is made; and put back where it runs.

use std::collections::HashMap;

use crate::client::{Client, ClientError};

/// Whether the restart monitor is to keep it running.
pub const STATUS: &str = "containerd.io/restart.status";

/// The same, of a container that moves.
const ASIDE: &str = "pageferry/restart.status";

/// The migration with which a container has come that does not run yet.
pub const MIGRATION: &str = "pageferry/migration";

/// The labels of a container that is on its way: as `labels`, with the restart put aside.
pub fn aside(labels: &HashMap<String, String>) -> HashMap<String, String> {
    let mut labels = labels.clone();
    if let Some(status) = labels.remove(STATUS) {
        labels.insert(ASIDE.to_owned(), status);
    }
    labels
}

/// Has containerd not start the container again.
///
/// # Errors
/// As of all calls.
pub async fn put_aside(client: &Client, id: &str) -> Result<(), ClientError> {
    move_label(client, id, (STATUS, ASIDE), HashMap::new()).await
}

/// The container runs where it is: has containerd treat it as before, and forget that it came.
///
/// # Errors
/// As of all calls.
pub async fn put_back(client: &Client, id: &str) -> Result<(), ClientError> {
    let came = HashMap::from([(MIGRATION.to_owned(), String::new())]);
    move_label(client, id, (ASIDE, STATUS), came).await
}

async fn move_label(
    client: &Client,
    id: &str,
    (from, to): (&str, &str),
    mut set: HashMap<String, String>,
) -> Result<(), ClientError> {
    let Some(container) = client.container(id).await? else {
        return Ok(());
    };
    set.retain(|key, _| container.labels().contains_key(key));
    if let Some(value) = container.labels().get(from) {
        set.insert(to.to_owned(), value.clone());
        set.insert(from.to_owned(), String::new());
    }
    match set.is_empty() {
        true => Ok(()),
        // In one transaction of its database.
        false => client.set_labels(id, set).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_on_its_way_is_not_started_again() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let labels = HashMap::from([pair(STATUS, "running"), pair("a", "b")]);
        let expected = HashMap::from([pair(ASIDE, "running"), pair("a", "b")]);
        assert_eq!(aside(&labels), expected);
        assert_eq!(aside(&expected), expected);
    }
}
