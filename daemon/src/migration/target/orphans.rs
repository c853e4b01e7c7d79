//! What was made for an incoming migration of which there is no record: the daemon was killed
//! before the first one.
//!
//! Invariant: nothing is taken away that holds a process, or a pager that has restored anything.
//! Whatever is to run or is held has a record, so this finds only what was made to wait.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry_pager::client::{PagerClient, Remains};
use pageferry_pager::message::State;
use pageferry_proto::id::{MEMBERS_MAX, MemberIndex, MigrationId};
use tokio::task::block_in_place;

use super::site::TargetNode;
use crate::migration::text::chain;
use crate::runtime::kind::{leave, leave_around, settle_left, sweep, sweep_around};

/// How long a pager that was told to end may take.
const END_TIMEOUT: Duration = Duration::from_secs(2);

/// Removes folders, pagers and empty cgroups of migrations that are not known. To be called before
/// anything new is begun.
pub async fn clean_up(node: &TargetNode, is_known: impl Fn(MigrationId) -> bool) {
    for id in folders(&node.migrations) {
        if is_known(id) {
            continue;
        }
        let directory = node.migrations.join(id.to_string());
        let seats = seats(&directory);
        match end_pagers(&seats).await {
            Ok(has_run) => {
                tracing::info!(migration = %id, has_run, "removing what was left of it");
                block_in_place(|| match has_run {
                    true => {
                        seats.iter().for_each(|seat| leave(seat));
                        leave_around(&directory);
                    }
                    false => {
                        seats.iter().for_each(|seat| sweep(seat));
                        sweep_around(&directory);
                    }
                });
                drop(fs::remove_dir_all(&directory));
            }
            Err(why) => tracing::warn!(migration = %id, folder = %directory.display(),
                "no journal knows of this migration, and its folder is kept: {why}"),
        }
    }
    block_in_place(settle_left);
    if let Err(error) = node.holds.clean_up().await {
        tracing::warn!("a bridge is left: {}", chain(&error));
    }
    // What is left here may be used yet.
    let is_left = |id: MigrationId| node.migrations.join(id.to_string()).exists();
    block_in_place(|| node.shelf.clean_up(|id| is_known(id) || is_left(id)));
    for (name, freezer) in node.freezers.made() {
        // Pagers and watchers have a cgroup each, whose name goes on behind the id.
        let id = name.split('.').next().unwrap_or_default().parse();
        let ours = id.is_ok_and(|id| !is_known(id));
        if !ours || !freezer.is_empty() {
            continue;
        }
        // One that still has a process cannot be removed.
        let group = node.hierarchies.everywhere(&name);
        let removed = block_in_place(|| group.remove(END_TIMEOUT));
        if let Err(error) = removed.and_then(|()| freezer.remove()) {
            tracing::debug!("{}", chain(&error));
        }
    }
}

/// The folder of each member: that of the first is the migration's.
fn seats(directory: &Path) -> Vec<PathBuf> {
    let numbers = MemberIndex::all(MEMBERS_MAX).skip(1);
    let others = numbers.map(|member| directory.join(member.to_string()));
    let others = others.filter(|seat| seat.is_dir());
    std::iter::once(directory.to_owned())
        .chain(others)
        .collect()
}

/// Ends the pagers of all members, if none of them holds anything; whether any member has run.
async fn end_pagers(seats: &[PathBuf]) -> Result<bool, String> {
    let mut has_run = false;
    for seat in seats {
        has_run |= end_pager(seat).await?;
    }
    Ok(has_run)
}

/// Ends a pager that holds nothing; says why not if it may hold something. Answers whether its
/// workload has run.
async fn end_pager(directory: &Path) -> Result<bool, String> {
    let Ok((pager, _notices)) = PagerClient::connect(directory) else {
        return match Remains::read(directory) {
            // What it says must be found for as long as the workload is frozen.
            Ok(Remains::FillLost(line)) => Err(line),
            Ok(Remains::Filled(_)) => Ok(true),
            Ok(Remains::RestoreLost(_) | Remains::Nothing) => Ok(false),
            Err(error) => Err(error.to_string()),
        };
    };
    let status = pager.status().await.map_err(|error| chain(&error))?;
    if status.state != State::Idle {
        return Err(format!("its pager is {:?}", status.state));
    }
    let discarded = pager.discard().await.map_err(|error| chain(&error));
    discarded.map(|()| false)
}

fn folders(migrations: &Path) -> Vec<MigrationId> {
    let entries = fs::read_dir(migrations).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter_map(|name| name.parse().ok()).collect()
}
