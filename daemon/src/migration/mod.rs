//! What drives a migration: the registry, one driver per migration, and the journal.

pub mod clock;
pub mod folders;
pub mod journal;
pub mod log;
pub mod paths;
pub mod ports;
pub mod progress;
pub mod refusals;
pub mod registry;
pub mod session;
pub mod source;
pub mod target;
pub mod text;
pub mod timeline;
