//! The two state machines of a migration, without IO.

pub mod policy;
