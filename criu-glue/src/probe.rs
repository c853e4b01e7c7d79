//! What a `criu` binary can do here, asked once.
//!
//! Asking also makes CRIU probe the kernel and keep the result in `/run/criu.kdat`; without that
//! file every run probes anew, for tens of milliseconds, and in a namespace whose loopback is down
//! it fails. So a node probes at its start, in its own namespaces, and `/run` must be a tmpfs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::options::Request;
use crate::rpc::{
    Conversation, Features, RequestFailed, Response, StartError, SwrkConfig, TalkError, Version,
};
use crate::view::{Blind, Feed, FeedError};

/// The oldest version that works on kernels from 6.16 on: older ones cannot dump a TCP socket
/// there. It is also the first to write pagemap counts the new way.
pub const VERSION_MIN: Version = Version {
    major: 4,
    minor: 2,
    sublevel: 0,
};

/// What there is.
#[derive(Debug)]
pub struct Capabilities {
    pub version: Version,
    pub features: Features,
    /// Whether CRIU sees through the preload library; no answer when no library was given.
    pub view: Option<Result<(), Blind>>,
}

/// Why a binary could not be probed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    #[error(transparent)]
    Start(#[from] StartError),
    #[error(transparent)]
    Talk(#[from] TalkError),
    #[error(transparent)]
    Feed(#[from] FeedError),
    #[error("{criu} did not answer within {PROBE_MAX:?}")]
    Silent { criu: PathBuf },
    #[error("{criu} does not tell its {what}")]
    Refused {
        criu: PathBuf,
        what: &'static str,
        #[source]
        source: RequestFailed,
    },
    #[error("{criu} sent a notification when asked for its {what}")]
    Notified { criu: PathBuf, what: &'static str },
}

impl Capabilities {
    /// Starts `criu` and asks. `library` is the view to try; `output` the file for what CRIU
    /// prints.
    ///
    /// # Errors
    /// [`ProbeError`] when there is no working CRIU.
    pub async fn probe(
        criu: &Path,
        library: Option<&Path>,
        output: &Path,
    ) -> Result<Self, ProbeError> {
        let feed = Feed::create()?;
        let view = library
            .map(|path| feed.share(path.to_owned()))
            .transpose()?;
        let config = SwrkConfig::new(criu.to_owned(), output.to_owned());
        let mut worker = Conversation::start(SwrkConfig { view, ..config })?;
        let answers = tokio::time::timeout(PROBE_MAX, async {
            let version = ask(criu, &mut worker, Request::version(), "version").await?;
            let seen = library.map(|_| feed.check_seen_by(&worker));
            let features = ask(criu, &mut worker, Request::feature_check(), "features").await?;
            Ok::<_, ProbeError>((version, seen, features))
        });
        let silent = |_| ProbeError::Silent {
            criu: criu.to_owned(),
        };
        let (version, seen, features) = answers.await.map_err(silent)??;
        let missing = |what| ProbeError::Refused {
            criu: criu.to_owned(),
            what,
            source: RequestFailed {
                errno: None,
                message: None,
            },
        };
        Ok(Self {
            version: version.version.ok_or_else(|| missing("version"))?,
            features: features.features.ok_or_else(|| missing("features"))?,
            view: seen,
        })
    }
}

async fn ask(
    criu: &Path,
    worker: &mut Conversation,
    request: Request,
    what: &'static str,
) -> Result<Response, ProbeError> {
    worker.request(request).await?;
    let mut notified = false;
    let response = worker.conclude(PROBE_MAX, |_| {
        notified = true;
        false
    });
    let response = response.await?;
    if notified {
        return Err(ProbeError::Notified {
            criu: criu.to_owned(),
            what,
        });
    }
    response
        .into_result()
        .map_err(|source| ProbeError::Refused {
            criu: criu.to_owned(),
            what,
            source,
        })
}

/// How long both answers may take: a cold probe of the kernel takes some 50 ms.
const PROBE_MAX: Duration = Duration::from_secs(20);
