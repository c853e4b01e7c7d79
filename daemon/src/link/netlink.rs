//! A netlink handle bound to one network namespace.

use std::os::fd::{AsFd, BorrowedFd};

use pageferry_sys::namespace::{NamespaceKind, run_inside};
use rtnetlink::Handle;

use super::LinkError;

/// A route-netlink connection; its socket belongs to the namespace it was opened in.
///
/// Dropping it ends the connection's task.
#[derive(Debug)]
pub struct Netlink {
    handle: Handle,
    task: tokio::task::JoinHandle<()>,
}

impl Netlink {
    /// Opens a connection in the network namespace `net`, or in the caller's without one.
    ///
    /// Must be called inside a tokio runtime.
    pub fn open(net: Option<BorrowedFd<'_>>) -> Result<Self, LinkError> {
        let runtime = tokio::runtime::Handle::current();
        let connect = || {
            // The socket registers with the runtime's reactor, which a plain thread does not have.
            let _entered = runtime.enter();
            rtnetlink::new_connection()
        };
        let (connection, handle, _) = match net {
            Some(net) => run_inside(&[(NamespaceKind::Net, net.as_fd())], connect).flatten(),
            None => connect(),
        }
        .map_err(|source| LinkError::Io {
            action: "opening a netlink socket",
            source,
        })?;
        Ok(Self {
            handle,
            task: tokio::spawn(connection),
        })
    }

    /// The handle requests are made with.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Names the request that failed.
pub(super) fn failed(
    action: &'static str,
    object: impl Into<String>,
) -> impl FnOnce(rtnetlink::Error) -> LinkError {
    let object = object.into();
    move |source| LinkError::Netlink {
        action,
        object,
        source,
    }
}
