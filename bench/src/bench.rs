//! The benchmark: every way to move a workload, on one machine, in one run.
//!
//! A *cell* is a workload over a link by a system ([`kinds`]); a *run* is one move of a fresh
//! workload ([`trial`]); a [`series`] has the runs of all cells. What is measured, and how, is in
//! bench/README.md. Invariants: a figure is measured or absent; what fails says why; peers get what
//! makes them fastest, as far as it is theirs.

pub mod ab;
pub mod clients;
pub mod compare;
pub mod crowd;
pub mod drawing;
pub mod identity;
pub mod journal;
pub mod kinds;
pub mod layer;
pub mod plan;
pub mod published;
pub mod readme;
pub mod report;
pub mod run;
pub mod series;
pub mod spans;
pub mod subject;
pub mod table;
pub mod trial;
pub mod ycsb;
