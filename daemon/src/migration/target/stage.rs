//! Where something that comes is applied, from its claim to its end.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use pageferry_files::{Digest, Error, Keep, Placed, Shown, Staging, Totals, admit_in};
use pageferry_proto::wire::code::{ErrorCode, Failure};

use crate::migration::folders::failed;
use crate::runtime::rootfs::Bundle;

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
    /// It comes to what an engine has not made yet, and has so much.
    Awaited(Totals),
    /// It comes to this one.
    Overlay(PathBuf),
    Open(Box<Staging>),
    /// All has come to what an engine has made, and nothing of it is open any more.
    Proven(Shown),
    /// It is the workload's, or taken back.
    Gone,
}

impl Stage {
    /// Opens it if it is not.
    pub(super) fn open(&mut self) -> Result<&mut Staging, Error> {
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

    /// All has come: keeps by which the mount is known.
    pub(super) fn prove(&mut self) -> Result<(), Error> {
        let shown = self.open()?.shown()?;
        *self = Self::Proven(shown);
        Ok(())
    }
}

/// Where something is applied. A bundle is put where it is to be.
pub(super) fn stage(
    (placed, base): (&Placed, Option<Digest>),
    bundle: Option<&Bundle>,
) -> Result<Stage, Failure> {
    let place = placed.place.clone();
    let Some(bundle) = bundle else {
        return Ok(Stage::Claimed { place, base });
    };
    let made = bundle.make_in(&Keep::tree(&place));
    made.map_err(|error| {
        let text = format!("the bundle {}: {error}", bundle.path.display());
        Failure::new(ErrorCode::NodeUnfit, text)
    })?;
    let put = Keep::put_ahead(placed);
    put.map_err(|error| failed(&error, ErrorCode::PathTaken))?;
    let root = bundle.root();
    Ok(Stage::Ahead { root, base })
}

/// What an engine has made is there: what comes to it is applied at this stage.
pub(super) fn found(awaited: &Mutex<Stage>, there: Stage) -> Result<(), Failure> {
    let unfit = |error: Error| failed(&error, ErrorCode::NodeUnfit);
    let mut stage = awaited.lock().unwrap_or_else(PoisonError::into_inner);
    let (Stage::Awaited(totals), Stage::Overlay(made) | Stage::Ahead { root: made, .. }) =
        (&*stage, &there)
    else {
        return Ok(());
    };
    admit_in(made, totals).map_err(unfit)?;
    *stage = there;
    // It may be none.
    stage.open().map(drop).map_err(unfit)
}

/// What it was until now.
pub(super) fn gone(stage: &Arc<Mutex<Stage>>) -> Stage {
    let mut stage = stage.lock().unwrap_or_else(PoisonError::into_inner);
    std::mem::replace(&mut *stage, Stage::Gone)
}
