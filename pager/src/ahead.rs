//! A CRIU that was started before the restore it is for, or a container runtime that was: it waits.

use criu_glue::rpc::Conversation;
use tracing::warn;

use crate::message::RestoreRequest;
use crate::runtime::Waiting;

/// It, and what it was started for.
#[derive(Debug)]
pub struct Ahead {
    request: RestoreRequest,
    ready: Ready,
}

/// Who waits.
#[derive(Debug)]
pub enum Ready {
    /// A CRIU of ours, to be asked.
    Criu(Box<Conversation>),
    /// A runtime that has asked for one.
    Runtime(Box<Waiting>),
}

impl Ready {
    /// The process that is CRIU, or is to become it.
    pub fn criu_pid(&self) -> i32 {
        match self {
            Self::Criu(criu) => criu.pid(),
            Self::Runtime(waiting) => waiting.criu_pid(),
        }
    }

    /// Whether a runtime waits, too.
    pub const fn is_runtime(&self) -> bool {
        matches!(self, Self::Runtime(_))
    }

    /// It is not needed. A runtime undoes what it has made.
    pub async fn call_off(self) {
        if let Self::Runtime(waiting) = self {
            waiting.call_off().await;
        }
    }

    fn is_open(&mut self) -> bool {
        match self {
            Self::Criu(criu) => criu.is_open(),
            Self::Runtime(waiting) => waiting.is_open(),
        }
    }
}

impl Ahead {
    /// One that has just been started.
    pub fn new(request: RestoreRequest, ready: Ready) -> Self {
        Self { request, ready }
    }

    /// It, if it was started as `request` asks for, and is still there. It may have been killed,
    /// for memory or by somebody; it has restored nothing yet, so that another one can.
    pub async fn take_for(mut self, request: &RestoreRequest) -> Option<Ready> {
        if !self.request.starts_like(request) {
            self.call_off().await;
            return None;
        }
        if !self.ready.is_open() {
            let pid = self.ready.criu_pid();
            warn!(pid, "the criu that waited is gone: starting another");
            self.call_off().await;
            return None;
        }
        Some(self.ready)
    }

    /// It is not needed. A runtime undoes what it has made.
    pub async fn call_off(self) {
        self.ready.call_off().await;
    }
}
