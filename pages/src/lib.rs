//! Pages: from the memory of a running process to a store at the target.
//!
//! ```text
//!   source                                                  target
//!   track ─► dirty set ─► send ┬ thread: read ─► encode ┐   ┌ thread: decode ─► store  recv
//!   (Space)               (N)  ├ thread: read ─► encode ├─►─┤ thread: decode ─► store  (N)
//!                              └ …                      ┘   └ …
//!                         raw buffers (N)   parcels (N + 8)    parcels in flight (streams)
//! ```
//!
//! Memory beside the store, with N threads (default: the cores) and parcels of 4.2 MiB at most:
//!
//! | what | how much | with 2 cores |
//! |---|---|---|
//! | raw batches at the source | N × 4 MiB | 8 MiB |
//! | parcels at the source | (N + 8) × 4.2 MiB | 42 MiB |
//! | parcels at the target | 8 × 4.2 MiB, used again and again | 34 MiB |
//! | hashing at the source, if verified | N × 0.5 MiB, and N + 16 streams of 64 KiB | 2.2 MiB |
//! | digests at the target, if verified | 9 bytes per page, 550 at worst | 2.8 MiB for 1.3 GiB |
//! | page sets | 16 bytes per run of pages, at most 2^22 runs | 64 MiB at the very worst |
//!
//! Everything works on batches of up to 1024 pages; nothing is locked, allocated, logged or awaited
//! per page.
//!
//! Invariants: a page that was written after it was last found dirty is found again, or its space
//! is void ([`track`]); a page is held only after its contents are in the file ([`store`]). How a
//! memory file is laid out is said once, in [`store::MemoryFile`], for the daemon that writes it
//! and the pager that reads it.
//!
//! Absent: migrations, streams, certificates, CRIU's options. Parcels are taken by a
//! [`send::ParcelSink`], which may be a network or a test.

#![forbid(unsafe_code)]

pub mod decode;
pub mod digest;
pub mod encode;
mod pace;
pub mod pool;
pub mod read;
pub mod recv;
pub mod send;
pub mod store;
pub mod track;
