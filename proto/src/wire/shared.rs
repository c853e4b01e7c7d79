//! A path that the operator declares to be one storage at both nodes, and what proves it.
//!
//! The source writes a *marker* below the path, whose name and content are random. Whoever finds it
//! under the same path has the same storage. Where nothing can be written, what the file system
//! says of the file or folder itself must be the same: inode, and when it was made or changed.

use crate::wire::control::{ControlError, missing, short};
use crate::wire::description::PATH_BYTES_MAX;
use crate::wire::schema;

/// Most shared paths, mounts below them included.
pub const SHARED_PATHS_MAX: usize = 256;

/// Bytes of a marker's name, before they are written in hexadecimal, and of its content.
pub const MARKER_PART_BYTES: usize = 16;

/// What a marker's name begins with.
pub const MARKER_PREFIX: &str = ".pageferry-";

/// The name of the image file that says how long files on shared storage are.
pub const LENGTHS_FILE: &str = "pageferry-files";

/// The name of the image file with the file locks that the target takes when the source has let go
/// of them.
pub const LOCKS_FILE: &str = "pageferry-locks";

/// A path that is one storage at both nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedPath {
    /// The path at both nodes; absolute.
    pub path: String,
    /// Whether it is a folder.
    pub directory: bool,
    /// The kind of file system at the source, as `f_type` of statfs(2).
    pub file_system: u64,
    /// Its inode.
    pub inode: u64,
    /// When it was made, in nanoseconds since 1970; 0 if the file system does not say.
    pub born_ns: u64,
    /// When it was last changed, in nanoseconds since 1970.
    pub changed_ns: u64,
    /// The marker in the folder, or for a file in the folder it is in; none if nothing can be
    /// written there.
    pub marker: Option<Marker>,
}

/// A small file that is there as long as the target looks for it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Marker {
    /// What its name is made of.
    pub name: [u8; MARKER_PART_BYTES],
    /// Its content.
    pub content: [u8; MARKER_PART_BYTES],
}

impl Marker {
    /// The marker with these random bytes.
    pub fn new(random: [u8; 2 * MARKER_PART_BYTES]) -> Self {
        let mut marker = Self {
            name: [0; MARKER_PART_BYTES],
            content: [0; MARKER_PART_BYTES],
        };
        let (name, content) = random.split_at(MARKER_PART_BYTES);
        marker.name.copy_from_slice(name);
        marker.content.copy_from_slice(content);
        marker
    }

    /// Its name in the folder.
    pub fn file_name(&self) -> String {
        let digits = self.name.iter().map(|byte| format!("{byte:02x}"));
        format!("{MARKER_PREFIX}{}", digits.collect::<String>())
    }

    /// Whether a file of this name is, or was, a marker.
    pub fn is_name(name: &str) -> bool {
        name.strip_prefix(MARKER_PREFIX).is_some_and(|digits| {
            digits.len() == 2 * MARKER_PART_BYTES
                && digits.bytes().all(|byte| byte.is_ascii_hexdigit())
        })
    }
}

/// Without its content: who knows that can say he has the storage.
impl std::fmt::Debug for Marker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Marker").field(&self.file_name()).finish()
    }
}

impl From<&SharedPath> for schema::SharedPath {
    fn from(shared: &SharedPath) -> Self {
        let marker = |marker: &Marker| [marker.name, marker.content].concat();
        Self {
            path: shared.path.clone(),
            directory: shared.directory,
            file_system: shared.file_system,
            inode: shared.inode,
            born_ns: shared.born_ns,
            changed_ns: shared.changed_ns,
            marker: shared.marker.as_ref().map(marker).unwrap_or_default(),
        }
    }
}

impl TryFrom<schema::SharedPath> for SharedPath {
    type Error = ControlError;

    fn try_from(wire: schema::SharedPath) -> Result<Self, ControlError> {
        if !wire.path.starts_with('/') {
            return Err(missing("shared path"));
        }
        short("shared path", wire.path.len(), PATH_BYTES_MAX)?;
        let length = i64::try_from(wire.marker.len()).unwrap_or(i64::MAX);
        let marker = if wire.marker.is_empty() {
            None
        } else {
            let invalid = ControlError::Invalid {
                field: "shared marker",
                value: length,
            };
            Some(Marker::new(wire.marker.try_into().map_err(|_| invalid)?))
        };
        Ok(Self {
            path: wire.path,
            directory: wire.directory,
            file_system: wire.file_system,
            inode: wire.inode,
            born_ns: wire.born_ns,
            changed_ns: wire.changed_ns,
            marker,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::stream::ImageName;

    // clause: F-9
    // clause: F-10
    #[test]
    fn lengths_and_locks_travel_as_image_files() {
        assert!(ImageName::new(LENGTHS_FILE).is_ok());
        assert!(ImageName::new(LOCKS_FILE).is_ok());
    }

    #[test]
    fn a_marker_is_known_by_its_name() {
        let marker = Marker::new([0xab; 32]);
        let name = marker.file_name();
        assert_eq!(name, format!(".pageferry-{}", "ab".repeat(16)));
        assert!(Marker::is_name(&name));
        for other in [".pageferry-", ".pageferry-xy", "a", &name[..40]] {
            assert!(!Marker::is_name(other), "{other}");
        }
        assert!(!Marker::is_name(&name.replace("ab", "xy")));
    }
}
