//! Files that come with a workload to its place.

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::copied::CopiedPath;

use super::Site;
use crate::runtime::kind::Arriving;
use crate::runtime::rootfs::RootPlace;

impl Site {
    /// Makes places for folders that come, and the volumes that some of them are.
    pub(super) fn make_places(
        &self,
        arriving: &Arriving,
        (copied, root): (&[CopiedPath], Option<&RootPlace>),
    ) -> Result<(), Failure> {
        let folders = self.intake.folders();
        folders.make_volumes(arriving.volumes())?;
        folders.prepare(copied, root, arriving.looks_for_folders())
    }

    /// An engine has mounted what its container's files come to, by when its runtime waits.
    pub(super) fn find_overlay(&self) -> Result<(), Failure> {
        let overlay = self.arriving.as_ref().map(Arriving::overlay).transpose()?;
        let overlay = overlay.flatten().ok_or_else(|| {
            Failure::new(
                ErrorCode::Internal,
                "no engine has an overlay for its container",
            )
        })?;
        self.intake.folders().found(&overlay)
    }

    /// Folders that came with it are its own now. In the background: it takes as long as there are
    /// files.
    pub(super) fn settle_folders(&self) {
        let folders = self.intake.folders().clone();
        tokio::task::spawn_blocking(move || folders.settle());
    }
}
