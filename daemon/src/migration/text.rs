//! Errors as the texts that statuses and the other node are given.

use std::error::Error;

use pageferry_proto::wire::code::{ErrorCode, Failure};

use crate::link::LinkError;
use crate::telemetry::Chain;

/// An error with all its causes, in one line.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    Chain(error).to_string()
}

/// A failure that no operator can have caused.
pub fn internal(error: &(dyn Error + 'static)) -> Failure {
    Failure::new(ErrorCode::Internal, chain(error))
}

/// What is wrong with the workload's network, at either node.
pub fn network_unfit(error: &LinkError) -> Failure {
    Failure::new(ErrorCode::NetworkUnfit, chain(error))
}

/// `12.5 MiB`.
pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
