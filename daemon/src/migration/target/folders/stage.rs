//! Where a folder is applied, from the offer until it is the workload's.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pageferry_files::{Digest, Error, Shown, Staging, Totals};

/// Where a folder is applied.
#[derive(Debug)]
pub(super) enum Stage {
    /// Nothing has come, and what is kept has not been read.
    Claimed {
        place: PathBuf,
        base: Option<Digest>,
    },
    /// The same of one that is applied where it is.
    Ahead {
        root: PathBuf,
        base: Option<Digest>,
    },
    /// It comes to an overlay that is not mounted yet, and has so much.
    Awaited(Totals),
    /// It comes to this one.
    Overlay(PathBuf),
    Open(Box<Staging>),
    /// All has come to an overlay, and nothing of it is open any more.
    Proven(Shown),
    /// It is the workload's, or taken back.
    Gone,
}

impl Stage {
    /// Opens it if it is not.
    pub fn open(&mut self) -> Result<&mut Staging, Error> {
        let opened = match self {
            Self::Claimed { place, base } => Some(Staging::open(place, *base)?),
            Self::Ahead { root, base } => Some(Staging::open_root(root, *base)?),
            Self::Overlay(path) => Some(Staging::open_overlay(path)?),
            Self::Awaited(_) | Self::Open(_) | Self::Proven(_) | Self::Gone => None,
        };
        if let Some(staging) = opened {
            *self = Self::Open(Box::new(staging));
        }
        match self {
            Self::Open(staging) => Ok(staging),
            _ => Err(Error::Cut),
        }
    }

    /// All has come: keeps by which the overlay is known.
    pub fn prove(&mut self) -> Result<(), Error> {
        let shown = self.open()?.shown()?;
        *self = Self::Proven(shown);
        Ok(())
    }
}

/// What it was until now.
pub(super) fn gone(stage: &Arc<Mutex<Stage>>) -> Stage {
    let mut stage = stage.lock().unwrap_or_else(PoisonError::into_inner);
    std::mem::replace(&mut *stage, Stage::Gone)
}
