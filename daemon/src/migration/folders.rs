//! What both sides say of folders that travel.

use pageferry_files::{Error, ErrorKind};
use pageferry_proto::wire::code::{ErrorCode, Failure};

use super::text::chain;

/// What an error of a folder is to the other node and the operator. `unfit` is what it is if the
/// folder itself is the reason.
pub fn failed(error: &Error, unfit: ErrorCode) -> Failure {
    let code = match error.kind() {
        ErrorKind::Unfit => unfit,
        ErrorKind::NoSpace => ErrorCode::DiskShort,
        ErrorKind::Malformed => ErrorCode::Malformed,
        ErrorKind::Differs => ErrorCode::FolderDiffers,
        ErrorKind::Limit => ErrorCode::Limit,
        ErrorKind::Io => ErrorCode::NodeUnfit,
    };
    Failure::new(code, chain(error))
}
