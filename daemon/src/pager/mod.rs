//! Skeleton.
pub mod space;
