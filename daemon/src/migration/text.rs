//! Errors as the texts that statuses and the other node are given.

use std::error::Error;

use pageferry_proto::wire::code::{ErrorCode, Failure};

/// An error with all its causes, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// A failure that no operator can have caused.
pub fn internal(error: &dyn Error) -> Failure {
    Failure::new(ErrorCode::Internal, chain(error))
}
