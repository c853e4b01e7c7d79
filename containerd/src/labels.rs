//! Labels of a container that is between two nodes.
//!
//! containerd's restart monitor starts every container again whose [`STATUS`] says that it is to
//! run, and which does not. A container that moves does not run at one of its nodes, at any moment.
//! So the label is put aside, in containerd's own database, under another name, before the source's
//! is frozen, and at the target before the container is made; and put back where it runs.

use std::collections::HashMap;

use crate::client::{Client, ClientError, Container};

/// Whether the restart monitor is to keep it running.
pub const STATUS: &str = "containerd.io/restart.status";

/// The same, of a container that moves.
const ASIDE: &str = "pageferry/restart.status";

/// The migration with which a container has come that does not run yet.
pub const MIGRATION: &str = "pageferry/migration";

/// A container that is about to leave, or has left. Another one of its name has it not.
const LEAVES: &str = "pageferry/leaves";

/// The labels of a container that is on its way: as `labels`, with the restart put aside.
pub fn aside(labels: &HashMap<String, String>) -> HashMap<String, String> {
    let mut labels = labels.clone();
    labels.remove(LEAVES);
    if let Some(status) = labels.remove(STATUS) {
        labels.insert(ASIDE.to_owned(), status);
    }
    labels
}

/// Has containerd not start the container again, which is about to leave.
///
/// # Errors
/// As of all calls.
pub async fn put_aside(client: &Client, id: &str) -> Result<(), ClientError> {
    let Some(container) = client.container(id).await? else {
        return Ok(());
    };
    let mut set = moved(container.labels(), (STATUS, ASIDE));
    set.insert(LEAVES.to_owned(), "yes".to_owned());
    // In one transaction of its database.
    client.set_labels(id, set).await
}

/// The container runs where it is: has containerd treat it as before, and forget that it came, or
/// was to leave.
///
/// # Errors
/// As of all calls.
pub async fn put_back(client: &Client, id: &str) -> Result<(), ClientError> {
    clear(client, id, |labels| moved(labels, (ASIDE, STATUS))).await
}

/// The container may have run where it is, and has ended: has containerd forget that it came, and
/// not start it again.
///
/// # Errors
/// As of all calls.
pub async fn let_go(client: &Client, id: &str) -> Result<(), ClientError> {
    clear(client, id, |_| HashMap::new()).await
}

/// Whether a container is one that is about to leave, or has left.
pub fn leaves(container: &Container) -> bool {
    container.labels().contains_key(LEAVES)
}

async fn clear(
    client: &Client,
    id: &str,
    set: impl FnOnce(&HashMap<String, String>) -> HashMap<String, String>,
) -> Result<(), ClientError> {
    let Some(container) = client.container(id).await? else {
        return Ok(());
    };
    let labels = container.labels();
    let mut set = set(labels);
    let ours = [MIGRATION, LEAVES].into_iter();
    let ours = ours.filter(|name| labels.contains_key(*name));
    set.extend(ours.map(|name| (name.to_owned(), String::new())));
    match set.is_empty() {
        true => Ok(()),
        false => client.set_labels(id, set).await,
    }
}

/// What is to be set to have a label be called otherwise; an empty one goes away.
fn moved(labels: &HashMap<String, String>, (from, to): (&str, &str)) -> HashMap<String, String> {
    match labels.get(from) {
        Some(value) => HashMap::from([
            (to.to_owned(), value.clone()),
            (from.to_owned(), String::new()),
        ]),
        None => HashMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_on_its_way_is_not_started_again() {
        let pair = |key: &str, value: &str| (key.to_owned(), value.to_owned());
        let labels = [pair(STATUS, "running"), pair("a", "b"), pair(LEAVES, "yes")];
        let labels = HashMap::from(labels);
        let expected = HashMap::from([pair(ASIDE, "running"), pair("a", "b")]);
        assert_eq!(aside(&labels), expected);
        assert_eq!(aside(&expected), expected);
        let back = HashMap::from([pair(STATUS, "running"), pair(ASIDE, "")]);
        assert_eq!(moved(&expected, (ASIDE, STATUS)), back);
        assert_eq!(moved(&labels, (ASIDE, STATUS)), HashMap::new());
    }
}
