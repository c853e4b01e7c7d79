//! Versions of the protocol, and how two nodes agree on one.
//!
//! The ALPN names the major version: nodes of different majors never get a connection. Within a
//! major the version is a number that grows by one with every change of the wire; a node speaks
//! its own and the one before it, so a cluster is upgraded one node at a time.

use std::fmt;

/// The ALPN of this major version.
pub const ALPN: &[u8] = b"pageferry/1";

/// A version of the wire within the major version. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(u32);

/// Why two nodes cannot talk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum VersionError {
    /// Version 0.
    #[error("version 0 is never valid")]
    Zero,
    /// Two nodes more than one version apart.
    #[error("version {offered} is more than one away from this node's {own}")]
    Apart {
        /// The version the peer named.
        offered: u32,
        /// This build's version.
        own: Version,
    },
    /// The peer answered with a version that was not offered to it.
    #[error("version {chosen} was chosen, which version {own} does not speak")]
    NotOffered {
        /// The version the peer chose.
        chosen: u32,
        /// This build's version.
        own: Version,
    },
}

impl Version {
    /// What this build speaks.
    pub const CURRENT: Self = Self(1);

    /// Its number.
    pub const fn number(self) -> u32 {
        self.0
    }

    /// The version to use with a peer whose own version is `offered`: the lower of the two,
    /// when they are at most one apart.
    pub fn agreed(offered: u32) -> Result<Self, VersionError> {
        agreed(Self::CURRENT, offered)
    }

    /// The version a peer chose from this build's offer.
    pub fn chosen(chosen: u32) -> Result<Self, VersionError> {
        let own = Self::CURRENT;
        if chosen == 0 {
            return Err(VersionError::Zero);
        }
        if chosen == own.0 || chosen == own.0 - 1 {
            return Ok(Self(chosen));
        }
        Err(VersionError::NotOffered { chosen, own })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn agreed(own: Version, offered: u32) -> Result<Version, VersionError> {
    if offered == 0 {
        return Err(VersionError::Zero);
    }
    if 1 < own.0.abs_diff(offered) {
        return Err(VersionError::Apart { offered, own });
    }
    Ok(Version(own.0.min(offered)))
}

#[cfg(test)]
mod tests {
    use super::*;

    // clause: V-2
    #[test]
    fn neighbours_agree_on_the_older_version() {
        let own = Version(7);
        assert_eq!(agreed(own, 6), Ok(Version(6)));
        assert_eq!(agreed(own, 7), Ok(Version(7)));
        assert_eq!(agreed(own, 8), Ok(Version(7)));
        assert_eq!(agreed(own, 5), Err(VersionError::Apart { offered: 5, own }));
        assert_eq!(agreed(own, 9), Err(VersionError::Apart { offered: 9, own }));
        assert_eq!(agreed(own, 0), Err(VersionError::Zero));
    }

    // clause: C-2
    #[test]
    fn a_choice_that_was_not_offered_is_refused() {
        assert_eq!(Version::chosen(1), Ok(Version::CURRENT));
        assert_eq!(Version::chosen(0), Err(VersionError::Zero));
        assert!(matches!(
            Version::chosen(2),
            Err(VersionError::NotOffered { chosen: 2, .. })
        ));
        assert!(Version::chosen(u32::MAX).is_err());
    }
}
