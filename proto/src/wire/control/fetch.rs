//! What a target asks of the pages that the source has not sent.

use super::{ControlError, generation};
use crate::id::{Generation, SpaceId};
use crate::page::PageCount;
use crate::set::PageSet;
use crate::wire::parcel::DATA_PAGES_MAX;
use crate::wire::schema;

/// Most pages of one request: its answer is one parcel.
pub const FETCH_PAGES_MAX: u64 = DATA_PAGES_MAX as u64;

/// Most runs of one request. Which pages of a space are missing may look like a sieve; this keeps
/// a request below 4 KiB.
pub const FETCH_RUNS_MAX: usize = 256;

/// Pages that the target lacks, and the source has only in the frozen copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetch {
    /// The attempt that they belong to.
    pub generation: Generation,
    /// The space that they are of.
    pub space: SpaceId,
    /// 1 to [`FETCH_PAGES_MAX`] pages in at most [`FETCH_RUNS_MAX`] runs.
    pub pages: PageSet,
    /// A thread waits for one of them: before all that is not urgent.
    pub urgent: bool,
}

impl From<&Fetch> for schema::Fetch {
    fn from(fetch: &Fetch) -> Self {
        Self {
            generation: fetch.generation.number(),
            space: fetch.space.0,
            pages: fetch.pages.to_wire(),
            urgent: fetch.urgent,
        }
    }
}

impl TryFrom<schema::Fetch> for Fetch {
    type Error = ControlError;

    fn try_from(fetch: schema::Fetch) -> Result<Self, ControlError> {
        let field = "fetch.pages";
        let set = |source| ControlError::Set { field, source };
        let pages = PageSet::from_wire(&fetch.pages).map_err(set)?;
        let (PageCount(count), runs) = (pages.len(), pages.runs().len());
        if count == 0 || FETCH_PAGES_MAX < count || FETCH_RUNS_MAX < runs {
            let value = i64::try_from(count).unwrap_or(i64::MAX);
            return Err(ControlError::Invalid { field, value });
        }
        Ok(Self {
            generation: generation("fetch.generation", fetch.generation)?,
            space: SpaceId(fetch.space),
            pages,
            urgent: fetch.urgent,
        })
    }
}
