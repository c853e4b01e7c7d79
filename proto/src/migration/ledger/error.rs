//! What is wrong with what arrived.

use crate::id::{Generation, Round, SpaceId};
use crate::page::{PageCount, PageIndex};
use crate::wire::code::ErrorCode;

/// Why what has arrived cannot be what the source sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LedgerError {
    /// A parcel or an end of a round that is not open.
    #[error("round {found} is not the open round {open}")]
    Round {
        /// The round that is open.
        open: Round,
        /// The round that was named.
        found: Round,
    },
    /// A parcel or an end of a round after the final one.
    #[error("round {found} comes after the final round {last}")]
    Over {
        /// The final round.
        last: Round,
        /// The round that was named.
        found: Round,
    },
    /// A second end of the open round.
    #[error("round {0} ends twice")]
    EndsTwice(Round),
    /// More parcels, pages or streams than the source says.
    #[error("{found} {what} have arrived, the source sent {sent}")]
    TooMany {
        /// Of what.
        what: &'static str,
        /// How many have arrived.
        found: u64,
        /// How many the source says.
        sent: u64,
    },
    /// As many parcels as the source says, with fewer pages.
    #[error("round {round} has {found} pages, the source sent {sent}")]
    Pages {
        /// The round.
        round: Round,
        /// How many have arrived.
        found: PageCount,
        /// How many the source says.
        sent: PageCount,
    },
    /// A stream of an attempt after the one that the final message named, or the other way round.
    #[error("generation {found} comes after generation {last}, which was said to be the last")]
    Generation {
        /// The last one.
        last: Generation,
        /// What came of a newer one.
        found: Generation,
    },
    /// Two live sets of one space.
    #[error("space {0} has two live sets")]
    LiveTwice(SpaceId),
    /// Live pages that are not held.
    #[error(
        "space {space} lacks {missing} of {live} live pages, the first at {:#x}: {data} came as \
         data, {zero} as zero",
        first.address()
    )]
    Incomplete {
        /// The space.
        space: SpaceId,
        /// Its live pages.
        live: PageCount,
        /// How many of them came with contents.
        data: PageCount,
        /// How many of them are zero.
        zero: PageCount,
        /// How many pages are missing.
        missing: PageCount,
        /// The first of them.
        first: PageIndex,
    },
    /// What is held cannot be what came: a page in two forms, or more pages than came.
    #[error(
        "space {space} holds {data} pages as data and {zero} as zero, {both} of them as both, of \
         {received} that came"
    )]
    Count {
        /// The space.
        space: SpaceId,
        /// Pages held with contents.
        data: PageCount,
        /// Pages held as zero.
        zero: PageCount,
        /// Pages held as both.
        both: PageCount,
        /// Pages in all parcels.
        received: PageCount,
    },
    /// Two absent sets of one space.
    #[error("space {0} has two sets of absent pages")]
    AbsentTwice(SpaceId),
    /// Absent pages that are not live, or not as many as the source says.
    #[error(
        "space {space} has {live} live pages, and of {absent} that are to come {strange} are none \
         of them"
    )]
    AbsentNotLive {
        /// The space.
        space: SpaceId,
        /// Its live pages.
        live: PageCount,
        /// Its absent ones.
        absent: PageCount,
        /// Those of them that are not live.
        strange: PageCount,
    },
    /// As many absent sets as the source says, with other pages.
    #[error("{found} pages are to come, the source says {sent}")]
    AbsentPages {
        /// Pages in the sets.
        found: PageCount,
        /// What the source says.
        sent: PageCount,
    },
    /// Digests that are not one of each live page.
    #[error("space {space}: {digests} digests of {live} live pages")]
    Digests {
        /// The space.
        space: SpaceId,
        /// How many digests came.
        digests: PageCount,
        /// How many live pages there are.
        live: PageCount,
    },
    /// The final round has not ended.
    #[error("the final round has not arrived")]
    NotFinal,
}

impl LedgerError {
    /// What to tell the peer and the operator.
    pub const fn code(&self) -> ErrorCode {
        match self {
            Self::Round { .. }
            | Self::Over { .. }
            | Self::EndsTwice(_)
            | Self::TooMany { .. }
            | Self::Generation { .. }
            | Self::LiveTwice(_)
            | Self::AbsentTwice(_) => ErrorCode::Unexpected,
            Self::AbsentNotLive { .. }
            | Self::AbsentPages { .. }
            | Self::Pages { .. }
            | Self::Incomplete { .. }
            | Self::Count { .. } => ErrorCode::LedgerIncomplete,
            Self::Digests { .. } => ErrorCode::VerifyMismatch,
            Self::NotFinal => ErrorCode::Internal,
        }
    }
}
