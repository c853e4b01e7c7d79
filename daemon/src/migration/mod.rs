//! What drives a migration: the registry, one driver per migration, and the journal.

pub mod journal;
