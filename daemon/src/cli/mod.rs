//! The commands of `pageferry`.

pub mod ca;
