//! Parties: workloads of several members, and whose an address space is.
//!
//! A member is one container's tree, with a pid namespace of its own, so that pids of two members
//! may be the same number. The number of a space says both: `member << 24 | pid`. Of member 0 that
//! is the pid, so that a workload that is no party has nothing of this in its bytes.

use std::fmt;

use super::IdError;

/// Most members of a party.
pub const MEMBERS_MAX: usize = 16;

/// Bits of a space's number that are the pid. The kernel's pids have at most 22.
const PID_BITS: u32 = 24;

/// Which member of a party, from 0. A workload that is no party is member 0 of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberIndex(u8);

impl MemberIndex {
    /// The first, and the only one of a workload that is no party.
    pub const FIRST: Self = Self(0);

    /// The member with this number, if there can be one.
    pub fn new(number: usize) -> Result<Self, IdError> {
        match u8::try_from(number) {
            Ok(small) if number < MEMBERS_MAX => Ok(Self(small)),
            Ok(_) | Err(_) => Err(IdError::Member(number)),
        }
    }

    /// Its number.
    pub const fn number(self) -> usize {
        self.0 as usize
    }

    /// Every member of a party of so many; of more than [`MEMBERS_MAX`] only those.
    pub fn all(count: usize) -> impl Iterator<Item = Self> {
        (0..=u8::MAX).take(count.min(MEMBERS_MAX)).map(Self)
    }
}

impl fmt::Display for MemberIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// One address space of a migration: whose it is, and the pid of its leader as seen in the pid
/// namespace of that member's root, which is what CRIU names it by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpaceId(pub u32);

impl SpaceId {
    /// The space of this pid in this member.
    pub fn of(member: MemberIndex, vpid: u32) -> Result<Self, IdError> {
        match vpid >> PID_BITS {
            0 => Ok(Self(u32::from(member.0) << PID_BITS | vpid)),
            _ => Err(IdError::SpacePid(vpid)),
        }
    }

    /// Whose it is; more than any member's number if it is nobody's.
    pub const fn member(self) -> usize {
        (self.0 >> PID_BITS) as usize
    }

    /// The pid of its leader in its member's pid namespace.
    pub const fn vpid(self) -> u32 {
        self.0 & ((1 << PID_BITS) - 1)
    }
}

impl fmt::Display for SpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.member() {
            0 => self.vpid().fmt(f),
            member => write!(f, "{member}.{}", self.vpid()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // clause: M-2
    #[test]
    fn a_space_says_whose_it_is_and_the_first_members_are_their_pids() {
        let last = MemberIndex::new(MEMBERS_MAX - 1).unwrap();
        let second = MemberIndex::new(1).unwrap();
        assert_eq!(SpaceId::of(MemberIndex::FIRST, 42), Ok(SpaceId(42)));
        assert_eq!(SpaceId::of(second, 42), Ok(SpaceId(0x0100_002a)));
        for member in [MemberIndex::FIRST, second, last] {
            let space = SpaceId::of(member, (1 << PID_BITS) - 1).unwrap();
            assert_eq!(space.member(), member.number());
            assert_eq!(space.vpid(), (1 << PID_BITS) - 1);
            // It is a number that the wire takes.
            i32::try_from(space.0).unwrap();
        }
        assert_eq!(SpaceId(42).to_string(), "42");
        assert_eq!(SpaceId(0x0100_002a).to_string(), "1.42");
        let refused = SpaceId::of(second, 1 << PID_BITS);
        assert_eq!(refused, Err(IdError::SpacePid(1 << PID_BITS)));
    }

    #[test]
    fn members_are_counted_from_zero_to_their_limit() {
        assert_eq!(MemberIndex::new(16), Err(IdError::Member(16)));
        assert_eq!(MemberIndex::new(256), Err(IdError::Member(256)));
        let numbers = |count| MemberIndex::all(count).map(MemberIndex::number);
        assert!(numbers(3).eq(0..3));
        assert!(numbers(usize::MAX).eq(0..MEMBERS_MAX));
    }
}
