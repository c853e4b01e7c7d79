//! Files that come with a workload to its place.

use std::time::Duration;

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::copied::{CopiedForm, CopiedPath};
use pageferry_proto::wire::description::WorkloadDescription;

use super::Site;
use crate::migration::target::own::Own;
use crate::runtime::kind::{Arriving, Coming};
use crate::runtime::rootfs::RootPlace;

/// How long the end of a migration waits until what its folders came through is gone.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(60);

impl Site {
    /// Makes places for folders that come with each member, and the volumes that some of them are.
    pub(super) fn make_places(
        &self,
        coming: &Coming,
        description: &WorkloadDescription,
    ) -> Result<(), Failure> {
        let is_volume = |copied: &CopiedPath| copied.form == CopiedForm::Volume;
        for (arriving, described) in coming.members.iter().zip(description.all_members()) {
            if !arriving.is_pod() && described.copied.iter().any(is_volume) {
                let text = "a volume of a pod's comes with what is no pod";
                return Err(Failure::new(ErrorCode::Malformed, text));
            }
        }
        let folders = self.intake.folders();
        let roots = coming.members.iter().map(Arriving::root_place);
        let roots = roots.collect::<Result<Vec<_>, _>>()?;
        for arriving in &coming.members {
            folders.make_volumes(arriving.volumes())?;
        }
        let members = coming.members.iter().zip(&roots);
        let own = members.zip(description.all_members());
        let own = own.map(|((arriving, root), described)| Own {
            copied: &described.copied,
            root: root.as_ref(),
            are_looked_for: arriving.looks_for_folders(),
        });
        folders.prepare(&own.collect::<Vec<_>>())
    }

    /// Engines have mounted what their containers' files come to, by when their runtimes wait.
    pub(super) fn find_overlays(&self) -> Result<(), Failure> {
        for seat in &self.seats {
            let Some(arriving) = &seat.arriving else {
                continue;
            };
            if arriving.root_place()? != Some(RootPlace::Overlay) {
                continue;
            }
            let overlay = arriving.overlay()?.ok_or_else(|| {
                Failure::new(
                    ErrorCode::Internal,
                    "no engine has an overlay for its container",
                )
            })?;
            self.intake
                .folders()
                .found(seat.member.number(), &overlay)?;
        }
        Ok(())
    }

    /// The kubelet has made the volumes that some of them come to, by when the runtime of the pod's
    /// container waits.
    pub(super) fn find_volumes(&mut self) -> Result<(), Failure> {
        for seat in &mut self.seats {
            let pod = seat.arriving.as_mut().and_then(Arriving::as_pod);
            let Some(pod) = pod else { continue };
            let folders = self.intake.folders();
            folders.found_volumes(seat.member.number(), |name| pod.volume(name))?;
        }
        Ok(())
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
