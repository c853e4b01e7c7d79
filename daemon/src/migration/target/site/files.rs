//! Files that come with a workload to its place.

use std::time::Duration;

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::copied::{CopiedForm, CopiedPath};

use super::Site;
use crate::runtime::kind::Arriving;
use crate::runtime::rootfs::RootPlace;

/// How long the end of a migration waits until what its folders came through is gone.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);

impl Site {
    /// Makes places for folders that come, and the volumes that some of them are.
    pub(super) fn make_places(
        &self,
        arriving: &Arriving,
        (copied, root): (&[CopiedPath], Option<&RootPlace>),
    ) -> Result<(), Failure> {
        let is_volume = |copied: &CopiedPath| copied.form == CopiedForm::Volume;
        if !arriving.is_pod() && copied.iter().any(is_volume) {
            let text = "a volume of a pod's comes with what is no pod";
            return Err(Failure::new(ErrorCode::Malformed, text));
        }
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

    /// The kubelet has made the volumes that some of them come to, by when the runtime of the pod's
    /// container waits.
    pub(super) fn find_volumes(&mut self) -> Result<(), Failure> {
        let pod = self.arriving.as_mut().and_then(Arriving::as_pod);
        let Some(pod) = pod else { return Ok(()) };
        self.intake.folders().found_volumes(|name| pod.volume(name))
    }

    /// Folders that came with it are its own now. In the background: it takes as long as there are
    /// files.
    pub(super) fn settle_folders(&mut self) {
        let folders = self.intake.folders().clone();
        let settling = tokio::task::spawn_blocking(move || folders.settle());
        // Once it is begun there is nothing for a second one.
        self.settling.get_or_insert(settling);
    }

    /// Waits for that.
    pub(super) async fn folders_settled(&mut self) {
        let Some(settling) = self.settling.take() else {
            return;
        };
        match tokio::time::timeout(SETTLE_TIMEOUT, settling).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(migration = %self.id, "settling folders: {error}"),
            Err(_) => tracing::warn!(migration = %self.id,
                "folders that came are not settled within {SETTLE_TIMEOUT:?}: does their storage \
                 answer?"),
        }
    }
}
