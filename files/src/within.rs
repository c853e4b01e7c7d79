//! What is particular to a folder that is there before anything comes, and that nobody uses yet: it
//! has what nothing came for. A runtime has made mount points in a root file system; an overlay
//! shows what the layers below have.
//!
//! Invariants: what comes takes the place of what is there, and of folders only what is said of
//! them; an overlay is changed through what it shows, never in its layers.

use std::collections::BTreeSet;
use std::io;

use rustix::fs::{AtFlags, Mode};
use rustix::io::Errno;

use crate::error::Error;
use crate::keep::HIDDEN;
use crate::kernel::{self, Folder};
use crate::name::Name;
use crate::tree::{Kind, Tree};
use crate::walk::walk;

/// What is in it that nothing came for.
#[derive(Debug, Default)]
pub(crate) struct Within {
    /// Of an overlay that is not known: it stays.
    others: BTreeSet<Name>,
    is_overlay: bool,
}

impl Within {
    /// Looks what is in a folder.
    pub(crate) fn of(folder: &Folder) -> Result<Self, Error> {
        let names = walk(folder, None)?.into_keys();
        Ok(Self {
            others: names.filter(|name| !name.is_root()).collect(),
            is_overlay: false,
        })
    }

    /// Of what an overlay shows.
    pub(crate) fn of_overlay(folder: &Folder) -> Result<Self, Error> {
        if !folder.is_overlay()? || !folder.is_mount()? {
            return Err(Error::unfit(
                folder.path(),
                "is not where an overlay is mounted",
            ));
        }
        Ok(Self {
            others: BTreeSet::new(),
            is_overlay: true,
        })
    }

    /// Removes what is there where something of this kind comes, for which nothing has come yet.
    /// Answers whether that is there now: a folder that was is taken over, and what is to be absent
    /// is.
    pub(crate) fn make_way(
        &mut self,
        folder: &mut Folder,
        name: &Name,
        kind: &Kind,
    ) -> Result<bool, Error> {
        if matches!(kind, Kind::Whiteout | Kind::Opaque) && !self.is_overlay {
            return Err(NO_LAYER);
        }
        if name.is_root() {
            return Ok(true);
        }
        let path = folder.path_of(name);
        let failed = |source| Error::Io {
            what: "make way for",
            path,
            source,
        };
        let made = Self::make_way_at(folder, name, kind).map_err(failed)?;
        match made {
            Way::TakenOver => drop(self.others.remove(name)),
            Way::Made => {
                folder.forget_parent();
                self.forget(name);
            }
            Way::Free => {}
        }
        Ok(matches!(made, Way::TakenOver) || *kind == Kind::Whiteout)
    }

    fn make_way_at(folder: &mut Folder, name: &Name, kind: &Kind) -> io::Result<Way> {
        let (parent, component) = folder.parent(name)?;
        let stat = match kernel::stat(parent, &component) {
            Err(Errno::NOENT) => return Ok(Way::Free),
            stat => stat?,
        };
        if *kind == Kind::Folder && kernel::kind(&stat) == Some(Kind::Folder) {
            return match kernel::is_mount(&stat) {
                true => Err(Errno::BUSY.into()),
                false => Ok(Way::TakenOver),
            };
        }
        kernel::remove_all(parent, &component)?;
        match kernel::stat(parent, &component) {
            Err(Errno::NOENT) => Ok(Way::Made),
            Ok(_) => Err(io::Error::other("it is there again")),
            Err(error) => Err(error.into()),
        }
    }

    /// Removes a folder, with what nothing came for.
    pub(crate) fn remove_folder(
        &mut self,
        folder: &mut Folder,
        tree: &Tree,
        name: &Name,
    ) -> Result<(), Error> {
        let inside = name.inside();
        let next = tree.names.range(inside.clone()..).next();
        if next.is_some_and(|(next, _)| next.as_bytes().starts_with(inside.as_bytes())) {
            return Err(Error::Malformed("a folder goes before what is in it"));
        }
        remove_at(folder, name)?;
        self.forget(name);
        Ok(())
    }

    fn forget(&mut self, name: &Name) {
        let inside = name.inside();
        self.others
            .retain(|other| other != name && !other.as_bytes().starts_with(inside.as_bytes()));
    }

    /// Removes what nothing came for to the end. Answers with the folders that had something.
    pub(crate) fn remove_others(&mut self, folder: &mut Folder) -> Result<BTreeSet<Name>, Error> {
        let mut changed = BTreeSet::new();
        for name in std::mem::take(&mut self.others).into_iter().rev() {
            remove_at(folder, &name)?;
            changed.insert(name.split().0);
        }
        Ok(changed)
    }

    /// Makes the place for files that are between two names: renames must not leave the mount.
    pub(crate) fn make_hold(folder: &Folder) -> Result<Folder, Error> {
        let made = rustix::fs::mkdirat(folder, HIDDEN, Mode::RWXU);
        made.map_err(Error::io("make", folder.path().join(HIDDEN)))?;
        folder.inner(HIDDEN.as_ref())
    }

    /// Removes it, in which nothing is any more.
    pub(crate) fn remove_hold(folder: &Folder) -> Result<(), Error> {
        let removed = rustix::fs::unlinkat(folder, HIDDEN, AtFlags::REMOVEDIR);
        removed.map_err(Error::io("remove", folder.path().join(HIDDEN)))
    }
}

/// Removes what is there under a name, with all that is in it.
fn remove_at(folder: &mut Folder, name: &Name) -> Result<(), Error> {
    let path = folder.path_of(name);
    let parent = folder.parent(name).map_err(io::Error::from);
    let removed = parent.and_then(|(parent, component)| kernel::remove_all(parent, &component));
    folder.forget_parent();
    removed.map_err(|source| Error::Io {
        what: "remove",
        path,
        source,
    })
}

pub(crate) const NO_LAYER: Error = Error::Malformed("what only a layer has comes to none");

/// What was where something comes.
enum Way {
    /// Nothing.
    Free,
    /// Something that is gone.
    Made,
    /// What comes.
    TakenOver,
}
