//! Users of the nodes, and folders of theirs on the storage that nodes share.

use std::fs;
use std::os::unix::fs::chown;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::lab::Lab;
use crate::lab::init::SHARED;
use crate::lab::inside::Inside;

/// A folder on the storage that all nodes share, of a user of its own.
#[derive(Clone, Debug)]
pub struct Home {
    /// As nodes see it.
    pub path: String,
    /// As the host sees it.
    pub on_host: PathBuf,
    pub uid: u32,
}

impl Home {
    /// Makes an empty one that no earlier workload had.
    ///
    /// # Errors
    /// The nodes do not know the user.
    pub fn make(lab: &Lab, application: &str, user: &str) -> Result<Self> {
        let node = lab.node("a")?;
        let users = node.path("/etc/passwd");
        let users = fs::read_to_string(users).context("reading the users of a node")?;
        let line = users.lines().find_map(|line| {
            let (name, rest) = line.split_once(':')?;
            (name == user).then_some(rest)
        });
        let uid = line.and_then(|rest| rest.split(':').nth(1)?.parse().ok());
        let uid = uid.with_context(|| format!("the nodes know no user {user}"))?;
        let name = format!("{application}-{}", lab.workloads());
        let on_host = lab.folder.shared().join(&name);
        fs::create_dir_all(&on_host)
            .and_then(|()| chown(&on_host, Some(uid), Some(uid)))
            .with_context(|| format!("creating {}", on_host.display()))?;
        Ok(Self {
            path: format!("{SHARED}/{name}"),
            on_host,
            uid,
        })
    }

    /// A command at node a that runs as the user: what makes the folder ready.
    pub fn command(&self, lab: &Lab, program: &str) -> Result<Inside> {
        let (uid, gid) = (
            format!("--reuid={}", self.uid),
            format!("--regid={}", self.uid),
        );
        let command = lab.node("a")?.command("setpriv")?;
        Ok(command.args([&uid, &gid, "--clear-groups", "--", program]))
    }
}
