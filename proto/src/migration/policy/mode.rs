//! Whether pages may be missing when a workload starts at the target.

use std::fmt;
use std::str::FromStr;

/// How the memory of a workload moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Mode {
    /// All of it before the workload starts at the target. The loss of a node never loses the
    /// workload.
    #[default]
    Precopy,
    /// Rounds while each is much smaller than the one before; what is left then follows the
    /// workload. Until that is there, the loss of either node loses the workload.
    Hybrid,
    /// All of it after the workload: no round sends a page. Of the loss of a node as
    /// [`Mode::Hybrid`].
    Postcopy,
    /// As [`Mode::Precopy`] if rounds will do, by what they measure; else as [`Mode::Hybrid`].
    Auto,
}

/// What follows when the workload is not frozen in the time, or the rounds, that the policy allows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum OnTimeout {
    /// The migration ends, and the workload runs on at the source.
    #[default]
    Cancel,
    /// It is frozen at the end of the round, whatever downtime that means.
    Force,
    /// It is frozen at the end of the round, and what is left follows it.
    Postcopy,
}

/// A text that names no mode.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of precopy, hybrid, postcopy, auto")]
pub struct UnknownMode(pub String);

/// A text that says nothing of a time-out.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of cancel, force, postcopy")]
pub struct UnknownOnTimeout(pub String);

impl Mode {
    /// Every mode, in the order of numbers.
    pub const ALL: [Self; 4] = [Self::Precopy, Self::Hybrid, Self::Postcopy, Self::Auto];

    /// Its name: what the API and the command line say.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Precopy => "precopy",
            Self::Hybrid => "hybrid",
            Self::Postcopy => "postcopy",
            Self::Auto => "auto",
        }
    }

    /// Its number on the wire and in the journal.
    pub const fn number(self) -> u32 {
        self as u32
    }

    /// The mode with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.number() == number)
    }
}

impl OnTimeout {
    /// All of them, in the order of numbers.
    pub const ALL: [Self; 3] = [Self::Cancel, Self::Force, Self::Postcopy];

    /// Its name: what the API and the command line say.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Force => "force",
            Self::Postcopy => "postcopy",
        }
    }

    /// Its number on the wire and in the journal.
    pub const fn number(self) -> u32 {
        self as u32
    }

    /// The one with this number.
    pub fn from_number(number: u32) -> Option<Self> {
        Self::ALL.into_iter().find(|what| what.number() == number)
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl fmt::Display for OnTimeout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Mode {
    type Err = UnknownMode;

    fn from_str(text: &str) -> Result<Self, UnknownMode> {
        let named = Self::ALL.into_iter().find(|mode| mode.name() == text);
        named.ok_or_else(|| UnknownMode(text.to_owned()))
    }
}

impl FromStr for OnTimeout {
    type Err = UnknownOnTimeout;

    fn from_str(text: &str) -> Result<Self, UnknownOnTimeout> {
        let named = Self::ALL.into_iter().find(|what| what.name() == text);
        named.ok_or_else(|| UnknownOnTimeout(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_read_back() {
        for (number, mode) in (0..).zip(Mode::ALL) {
            assert_eq!(mode.to_string().parse(), Ok(mode));
            assert_eq!(Mode::from_number(number), Some(mode));
        }
        for (number, what) in (0..).zip(OnTimeout::ALL) {
            assert_eq!(what.to_string().parse(), Ok(what));
            assert_eq!(OnTimeout::from_number(number), Some(what));
        }
        assert_eq!(Mode::from_number(4), None);
        assert_eq!(OnTimeout::from_number(3), None);
        assert!("pre-copy".parse::<Mode>().is_err());
        assert!("".parse::<OnTimeout>().is_err());
    }
}
