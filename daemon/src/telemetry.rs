//! What a daemon says about itself: one line per event on stderr, and errors with their causes.
//!
//! Levels: *error*: what an operator asked for failed. *warn*: abnormal, and it went on. *info*:
//! edges of phases, once. *debug*: may repeat. *trace*: per parcel.
//!
//! Absent: files, rotation, metrics (`metrics`). Whoever starts the daemon keeps its stderr.

use std::error::Error;
use std::fmt;
use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

/// An error and all its causes, in one line: `what failed: why: why that`.
///
/// Errors here never repeat their source in their own text, so nothing is said twice.
#[derive(Clone, Copy, Debug)]
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(error) = *self;
        write!(f, "{error}")?;
        let mut cause = error.source();
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// Why logging cannot start.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter is not one.
    #[error("log filter {filter:?} is not a list of tracing directives")]
    Filter {
        /// The text.
        filter: String,
        /// What is wrong with it.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// Somebody was faster.
    #[error("logging is already set up in this process")]
    Twice(#[source] Box<dyn Error + Send + Sync>),
}

/// Starts logging to stderr, and says which program this is. `filter` is a level, or directives
/// such as `info,pageferry::net=debug`.
pub fn start(program: &str, filter: &str) -> Result<(), TelemetryError> {
    let directives = EnvFilter::try_new(filter).map_err(|source| TelemetryError::Filter {
        filter: filter.to_owned(),
        source,
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(directives)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .try_init()
        .map_err(TelemetryError::Twice)?;
    tracing::info!("{program} {VERSION}");
    Ok(())
}

/// What this build is: version, profile, compiler.
pub const VERSION: &str = concat!(
    env!("CARGO_PKG_VERSION"),
    " (",
    env!("PAGEFERRY_PROFILE"),
    ", ",
    env!("PAGEFERRY_RUSTC"),
    ")"
);

/// Exit code of a daemon that was told something wrong: `EX_USAGE` of sysexits.h.
pub const EXIT_USAGE: u8 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("cannot open {0}")]
    struct Outer(&'static str, #[source] io::Error);

    #[test]
    fn a_chain_says_everything_once() {
        let error = Outer("x", io::Error::other("no such thing"));
        assert_eq!(Chain(&error).to_string(), "cannot open x: no such thing");
    }

    #[test]
    fn a_filter_that_is_none_is_refused() {
        let error = start("test", "a=b=c").unwrap_err();
        assert!(matches!(error, TelemetryError::Filter { .. }), "{error}");
    }
}
