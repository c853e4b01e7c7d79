//! Where in the folder something is: components between slashes, none of which leads elsewhere.

use std::ffi::OsStr;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::error::Error;
use crate::keep::HIDDEN;
use crate::{COMPONENT_BYTES_MAX, DEPTH_MAX, NAME_BYTES_MAX};

/// A name within a folder. The folder's own is empty. A folder sorts before what is in it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Name(Box<[u8]>);

impl Name {
    /// The name that these bytes are, if they are one.
    pub fn new(bytes: &[u8]) -> Result<Self, Error> {
        if bytes.is_empty() {
            return Ok(Self::default());
        }
        if NAME_BYTES_MAX < bytes.len() {
            return Err(Error::Malformed("a name is too long"));
        }
        let mut depth = 0;
        for component in bytes.split(|byte| *byte == b'/') {
            depth += 1;
            let is_odd = component.is_empty() || component == b"." || component == b"..";
            if component == HIDDEN.as_bytes() {
                return Err(Error::Malformed("a name is of what is no workload's"));
            }
            if is_odd || COMPONENT_BYTES_MAX < component.len() || component.contains(&0) {
                return Err(Error::Malformed(
                    "a name leads out of its folder, or is none",
                ));
            }
        }
        if DEPTH_MAX < depth {
            return Err(Error::Malformed("a name is too deep"));
        }
        Ok(Self(bytes.into()))
    }

    /// That of an entry in this folder.
    pub fn child(&self, component: &[u8]) -> Result<Self, Error> {
        if self.is_root() {
            return Self::new(component);
        }
        Self::new(&[&self.0, &b"/"[..], component].concat())
    }

    /// Whether it is the folder itself.
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The folder that it is in, and what it is called there. For the root both are the root.
    pub fn split(&self) -> (Self, &OsStr) {
        match self.0.iter().rposition(|byte| *byte == b'/') {
            Some(at) => (
                Self(self.0[..at].into()),
                OsStr::from_bytes(&self.0[at + 1..]),
            ),
            None => (Self::default(), OsStr::from_bytes(&self.0)),
        }
    }

    /// Where the names begin, in their order, of what is in this folder; each begins with this.
    /// That of the root is empty, as all names are in it.
    pub fn inside(&self) -> Self {
        match self.is_root() {
            true => Self::default(),
            false => Self([&self.0, &b"/"[..]].concat().into()),
        }
    }

    /// Its bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// As a path, which is relative; the root is a dot.
    pub fn as_path(&self) -> &Path {
        match self.is_root() {
            true => Path::new("."),
            false => Path::new(OsStr::from_bytes(&self.0)),
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_path().display().fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_name_leads_out_of_its_folder() {
        let long = [b'a'; 256];
        let deep = [b"a/".repeat(DEPTH_MAX), b"a".to_vec()].concat();
        let odd: [&[u8]; 12] = [
            b".pageferry-files",
            b"a/.pageferry-files/b",
            b"..",
            b".",
            b"/a",
            b"a/",
            b"a//b",
            b"a/../b",
            b"a/.",
            b"a\0b",
            &long,
            &deep,
        ];
        for odd in odd {
            assert!(Name::new(odd).is_err(), "{}", String::from_utf8_lossy(odd));
        }
        for fine in [&b""[..], b"a", b"...", b"a/..b/c", b"\xff\xfe", b" "] {
            assert!(Name::new(fine).is_ok());
        }
    }

    #[test]
    fn a_name_is_its_folder_and_what_it_is_called_there() {
        let name = Name::new(b"a/b/c").expect("a name");
        assert_eq!(
            name.split(),
            (Name::new(b"a/b").expect("a name"), OsStr::new("c"))
        );
        let top = Name::new(b"a").expect("a name");
        assert_eq!(top.split(), (Name::default(), OsStr::new("a")));
        assert_eq!(
            top.child(b"b").expect("a name"),
            Name::new(b"a/b").expect("a name")
        );
        assert!(top.child(b"b/../c").is_err());
    }
}
