//! What travels with one member of a workload, and where its own root file system comes to.

use pageferry_proto::wire::code::Failure;
use pageferry_proto::wire::copied::{BundleFolder, CopiedForm, CopiedPath};

use super::folders::malformed;
use crate::runtime::rootfs::{Bundle, RootPlace};

/// What comes with one member.
#[derive(Clone, Copy, Debug)]
pub struct Own<'a> {
    /// All that travels with it.
    pub copied: &'a [CopiedPath],
    /// Where its own root file system comes to.
    pub root: Option<&'a RootPlace>,
    /// Somebody looks where others are to be before they come.
    pub are_looked_for: bool,
}

impl<'a> Own<'a> {
    /// Each that comes, and where the member's root file system does.
    pub(super) fn each(
        &self,
    ) -> impl Iterator<Item = (&'a CopiedPath, Option<&'a RootPlace>)> + use<'a> {
        let root = self.root;
        self.copied.iter().map(move |coming| (coming, root))
    }
}

/// The bundle that something that comes is of, if it is.
pub(super) fn bundle_of<'a>(
    coming: &CopiedPath,
    root: Option<&'a RootPlace>,
) -> Option<(&'a Bundle, BundleFolder)> {
    match (coming.form, root) {
        (CopiedForm::Root(like), Some(RootPlace::Bundle(bundle))) => Some((bundle, like)),
        _ => None,
    }
}

/// Checks that what comes as a container's own is what it has here, once.
pub(super) fn check_forms(copied: &[CopiedPath], root: Option<&RootPlace>) -> Result<(), Failure> {
    let own = copied.iter().map(|coming| coming.form);
    let beside = |form: &CopiedForm| matches!(form, CopiedForm::Folder | CopiedForm::Volume);
    let own: Vec<_> = own.filter(|form| !beside(form)).collect();
    match (&own[..], root) {
        ([], None)
        | ([CopiedForm::Root(_)], Some(RootPlace::Bundle(_)))
        | ([CopiedForm::Layer], Some(RootPlace::Overlay)) => Ok(()),
        ([], Some(_)) => Err(malformed(
            "the container comes without its root file system",
        )),
        _ => Err(malformed(
            "what comes with a container is none of what it has here",
        )),
    }
}
