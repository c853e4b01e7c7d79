//! The two state machines of a migration, without IO.
//!
//! ```text
//! source  Offered → Copying{round} → Freezing → Finishing → Prepared → Committed → Done
//!            └──────────┴───────────────┴──────────┴→ Aborting → Aborted
//!                                                      Committed → Reclaiming → Aborted
//!                                                      Committed → Draining → Done, or Aborted
//! target  Accepted → Receiving → Restoring → Ready → Running{filling} → Done
//!            └───────────┴──────────┴→ Aborting → Aborted
//!                                        Ready → Refusing → Aborted
//!                                                    Running → Aborting → Aborted
//! ```
//!
//! `Draining`, and the way from `Running` to `Aborted`, are those of a workload that starts with
//! pages missing: the first is passed when all have followed, the second when they are lost.
//!
//! A machine takes events by `handle(now, event)` and, when `poll_timeout()` has passed, by
//! `handle_timeout(now)`; afterwards `poll_action()` is called until it returns none. The driver
//! carries actions out **in the order given**; it may run a long one (a round, a restore) in the
//! background, but an action that undoes it ([`source::SourceAction::Thaw`],
//! [`target::TargetAction::Discard`]) first ends what is under way, and an event of an action
//! that was undone may still arrive: the machines ignore it.
//!
//! [`handoff`] says why at most one side runs. [`policy`] decides when to freeze, [`ledger`] what
//! the target holds, and [`mod@absent`] what it lacks and asks for next. Absent: any knowledge of
//! how pages are found, sent or restored.

pub mod absent;
pub mod handoff;
pub mod ledger;
pub mod parked;
pub mod policy;
pub mod record;
pub mod source;
pub mod status;
pub mod target;
pub mod timer;
