//! What is wrong with a message.

use crate::id::IdError;
use crate::set::PageSetError;
use crate::wire::frame::FrameError;
use crate::wire::version::VersionError;

/// Why bytes are not a message, or a message has no bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ControlError {
    /// Not the encoding of any message.
    #[error("message is not readable")]
    Decode(#[source] prost::DecodeError),
    /// The message is too long for a frame.
    #[error("message does not fit a frame")]
    Frame(#[source] FrameError),
    /// A field with a value that is never valid.
    #[error("field {field} has the invalid value {value}")]
    Invalid {
        /// The field's path.
        field: &'static str,
        /// Its value.
        value: i64,
    },
    /// A field that is not a name.
    #[error("field {field} is not a name")]
    Name {
        /// The field's path.
        field: &'static str,
        /// What is wrong with it.
        #[source]
        source: IdError,
    },
    /// A field that every message of this kind has.
    #[error("field {field} is missing")]
    Missing {
        /// The field's path.
        field: &'static str,
    },
    /// A field that is not a set of pages.
    #[error("field {field} is not a set of pages")]
    Set {
        /// The field's path.
        field: &'static str,
        /// What is wrong with it.
        #[source]
        source: PageSetError,
    },
    /// A text or a list longer than its limit.
    #[error("field {field} has {length} items or bytes, more than {max}")]
    TooLong {
        /// The field's path.
        field: &'static str,
        /// Its length.
        length: usize,
        /// Its limit.
        max: usize,
    },
    /// A version that does not fit.
    #[error("version does not fit")]
    Version(#[source] VersionError),
}
