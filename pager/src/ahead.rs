//! A CRIU that was started before the restore it is for, and waits.

use criu_glue::rpc::Conversation;
use tracing::warn;

use crate::message::RestoreRequest;

/// It, and what it was started for.
#[derive(Debug)]
pub struct Ahead {
    request: RestoreRequest,
    criu: Conversation,
}

impl Ahead {
    /// One that has just been started.
    pub fn new(request: RestoreRequest, criu: Conversation) -> Self {
        Self { request, criu }
    }

    /// It, if it was started as `request` asks for, and is still there. It may have been killed,
    /// for memory or by somebody; it has restored nothing yet, so that another one can.
    pub fn take_for(self, request: &RestoreRequest) -> Option<Conversation> {
        if !self.request.starts_like(request) {
            return None;
        }
        if !self.criu.is_open() {
            let pid = self.criu.pid();
            warn!(pid, "the criu that waited is gone: starting another");
            return None;
        }
        Some(self.criu)
    }
}
