//! Names that others see: labels, annotations, conditions, field managers.

/// On a pod: the node that it is to move to. Taken off when the Migration is made.
pub const MIGRATE_TO: &str = "pageferry.dev/migrate-to";
/// What `migrate-to` says where any node will do: it is no name of one.
pub const ANYWHERE: &str = "*";
/// On a pod: what becomes of an eviction, `migrate` or `evict`, whatever a policy says.
pub const ON_EVICTION: &str = "pageferry.dev/on-eviction";
/// On a Migration: what asked for it, where no person did: `eviction`.
pub const REQUESTED_BY: &str = "pageferry.dev/requested-by";
/// Its value for an eviction.
pub const BY_EVICTION: &str = "eviction";
/// On a pod, for the descheduler: who evicts it has to expect that it only begins to go by that.
pub const EVICT_ONLY: &str = "descheduler.alpha.kubernetes.io/request-evict-only";
/// On a pod, for the descheduler: it is going, and by which Migration.
pub const EVICTING: &str = "descheduler.alpha.kubernetes.io/eviction-in-progress";
/// What the descheduler looks for in the answer to an eviction that has begun a move.
pub const EVACUATION: &str = "Eviction triggered evacuation";
/// On a pod: which move it came by, or is to come by: the id that the daemons know it by.
pub const MIGRATION: &str = "pageferry.dev/migration";
/// On a pod that comes: the name of its Migration, as a label, where it is short enough for one.
pub const MIGRATION_NAME: &str = "pageferry.dev/migration-name";
/// On a pod that comes: the address it is to have.
pub const KEEP_ADDRESS: &str = "pageferry.dev/keep-address";
/// On a pod that comes: what of its owner it gets at the switch, as JSON.
pub const ADOPT: &str = "pageferry.dev/adopt";
/// On a pod that comes: the name that the first of them had.
pub const ORIGIN: &str = "pageferry.dev/origin";
/// On a Migration: the side that a person says is dead and stays dead, `source` or `target`.
pub const RESOLVE: &str = "pageferry.dev/resolve";
/// On a node, by its agent: pods may come.
pub const READY: &str = "pageferry.dev/ready";
/// On a node, by its agent: what its daemon is called among daemons.
pub const DAEMON: &str = "pageferry.dev/daemon";
/// On our own pods.
pub const OURS: (&str, &str) = ("app.kubernetes.io/part-of", "pageferry");
/// What all of our annotations begin with.
pub const PREFIX: &str = "pageferry.dev/";
/// A condition of a pod that has come: it is what it was.
pub const RESTORED: &str = "pageferry.dev/restored";
/// On a Migration: it is not gone before nothing is left of it.
pub const FINALIZER: &str = "pageferry.dev/migration";
/// The class of pods that come.
pub const RUNTIME_CLASS: &str = "pageferry";
/// The taint by which a person says that a node is down.
pub const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
/// The label of a ReplicaSet's revision.
pub const TEMPLATE_HASH: &str = "pod-template-hash";
/// By which a ReplicaSet chooses whom it deletes.
pub const DELETION_COST: &str = "controller.kubernetes.io/pod-deletion-cost";

/// Who writes what: one field manager per actor, and disjoint fields.
pub mod manager {
    pub const CONTROLLER: &str = "pageferry-controller";
    pub const SOURCE: &str = "pageferry-agent-source";
    pub const TARGET: &str = "pageferry-agent-target";
    pub const KUBECTL: &str = "kubectl-migrate";
}

/// The id that daemons know a Migration by: its UID without dashes.
pub fn daemon_id(uid: &str) -> String {
    uid.chars().filter(|one| *one != '-').collect()
}

/// The name of the pod that comes in place of one: `web`, `web-m1`, `web-m2`, …
///
/// It does not grow with the number of moves but by a digit now and then: `origin` is the name of
/// the first, where the pod came by a move. A long name is cut so that the new one is one of at
/// most 63 characters, as hostnames are; what two of them that begin alike differ in is kept as a
/// number of the whole.
pub fn next_pod(name: &str, origin: Option<&str>) -> String {
    let moves = origin.and_then(|_| {
        let (_, number) = name.rsplit_once("-m")?;
        number.parse::<u64>().ok()
    });
    let base = origin.unwrap_or(name);
    let suffix = format!("-m{}", moves.unwrap_or(0).saturating_add(1));
    let fits = base.len() + suffix.len() <= HOSTNAME_MAX;
    let suffix = match fits {
        true => suffix,
        false => format!("-{:016x}{suffix}", number_of(base)),
    };
    let room = HOSTNAME_MAX - suffix.len();
    let mut kept: String = base.chars().take(room).collect();
    while kept.ends_with(['-', '.']) {
        kept.pop();
    }
    kept + &suffix
}

/// FNV-1a: the same in every version of this program, for the name must be.
fn number_of(text: &str) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325_u64;
    text.bytes().fold(start, |number, byte| {
        (number ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

const HOSTNAME_MAX: usize = 63;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_does_not_grow() {
        assert_eq!(next_pod("web", None), "web-m1");
        assert_eq!(next_pod("web-m1", Some("web")), "web-m2");
        assert_eq!(next_pod("web-m9", Some("web")), "web-m10");
        // A pod that a person called so has not moved yet.
        assert_eq!(next_pod("vim-m3", None), "vim-m3-m1");
        let long = "a".repeat(80);
        let next = next_pod(&long, None);
        assert_eq!((next.len(), next.ends_with("-m1")), (63, true));
        let after = next_pod(&next, Some(&long));
        assert_eq!((after.len(), after.ends_with("-m2")), (63, true));
    }

    #[test]
    fn long_names_that_begin_alike_stay_apart() {
        let (one, two) = ("a".repeat(70) + "-x1", "a".repeat(70) + "-x2");
        assert_ne!(next_pod(&one, None), next_pod(&two, None));
        // One that just fits is not cut, and one that grows by a digit is.
        let fits = "b".repeat(60);
        assert_eq!(next_pod(&fits, None), fits.clone() + "-m1");
        let tenth = next_pod(&(fits.clone() + "-m9"), Some(&fits));
        assert_eq!((tenth.len(), tenth.ends_with("-m10")), (63, true));
        assert_eq!(number_of(""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(number_of("a"), 0xaf63_dc4c_8601_ec8c);
    }

    #[test]
    fn an_id_is_what_a_daemon_takes() {
        let id = daemon_id("0f2c7f3e-8c1e-4a52-9a55-0d5f8f5d6c1a");
        assert_eq!(id, "0f2c7f3e8c1e4a529a550d5f8f5d6c1a");
    }
}
