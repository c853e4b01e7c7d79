//! The restartable sequence a thread was stopped in (`rseq(2)`).
//!
//! The kernel forgets it when the thread runs anything else, as CRIU makes it do. Back in its
//! middle the thread would end what the kernel should have it begin anew. So the field that names
//! it is put back before the thread is let go.

use crate::{kernel, known};

/// Where the thread's `rseq_cs` is, and what it was.
#[derive(Clone, Copy, Debug)]
pub struct Section {
    field: u64,
    descriptor: u64,
}

impl Section {
    /// Of the stopped thread `tid`, which runs its own code; `known` is what was collected of it.
    pub fn of(tid: i32, known: &[u8]) -> Option<Self> {
        let (_, told) = known::find(known, kernel::GET_RSEQ_CONFIGURATION, known::RSEQ_BYTES)?;
        let area = told.first_chunk().map(|area| u64::from_ne_bytes(*area))?;
        let field = area.checked_add(FIELD_AT).filter(|_| area != 0)?;
        let descriptor = kernel::word(tid, field).filter(|descriptor| *descriptor != 0)?;
        Some(Self { field, descriptor })
    }

    /// To be called when the stopped thread `tid` is home.
    pub fn put_back(self, tid: i32) -> bool {
        kernel::set_word(tid, self.field, self.descriptor)
    }
}

/// `offsetof(struct rseq, rseq_cs)` of `linux/rseq.h`.
const FIELD_AT: u64 = 8;
