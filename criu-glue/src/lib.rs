//! Everything known about CRIU, and nothing known about what uses it.
//!
//! The crate speaks to a stock `criu` binary: it starts `criu swrk` workers and talks to them, or
//! stands between one and the container runtime that has started it ([`rpc`]), says what they shall
//! do ([`options`]), and reads what they leave behind ([`image`], [`report`]). What a dump sees of
//! memory can be replaced ([`view`]); what a restore does not fill is handed over ([`lazy`]). It
//! keeps no state between runs and decides nothing about a migration.
//!
//! Written against CRIU 4.2 on Linux, 64-bit, little-endian.

pub mod rpc;

pub mod options;

pub mod view;

pub mod lazy;

pub mod image;

pub mod probe;
pub mod report;

pub use criu_tracer::repair;

mod sys;
