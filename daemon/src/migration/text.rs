//! Errors as the texts that statuses and the other node are given.

use std::error::Error;

use pageferry_proto::wire::code::{ErrorCode, Failure};

/// An error with all its causes, in one line.
pub fn chain(error: &dyn Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// A failure that no operator can have caused.
pub fn internal(error: &dyn Error) -> Failure {
    Failure::new(ErrorCode::Internal, chain(error))
}
