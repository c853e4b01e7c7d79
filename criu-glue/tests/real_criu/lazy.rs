//! The smallest page-fault side: one process, one region from a copy, zeros everywhere else.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use criu_glue::lazy::{LazyMessage, LazySocket};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tokio::sync::oneshot;

use crate::sys;

const PAGE: u64 = 4096;
const PAGEFAULT: u8 = 0x12;

/// What a process shall find in its memory.
pub struct Store {
    pub start: u64,
    pub contents: Vec<u8>,
}

/// Serves faults until it is dropped.
pub struct Server {
    stop: Arc<AtomicBool>,
    pub faults: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

/// Takes over the page faults of one restore of one process. Gives the server and, when the
/// restore has said that it is finished, fills the rest.
pub async fn take_over(directory: &Path, bound: oneshot::Sender<()>, store: Store) -> Server {
    let socket = LazySocket::bind(directory).expect("a work directory");
    bound.send(()).expect("somebody waits");
    let mut session = socket.accept().await.expect("criu connects");
    let message = session.next().await.expect("valid");
    let Some(LazyMessage::Uffd { fd, .. }) = message else {
        panic!("{message:?}")
    };
    let server = Server::start(fd.try_clone().expect("a descriptor"), store);
    let message = session.next().await.expect("valid");
    assert!(
        matches!(message, Some(LazyMessage::Finished)),
        "{message:?}"
    );
    server
}

impl Server {
    fn start(uffd: OwnedFd, store: Store) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let faults = Arc::new(AtomicUsize::new(0));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&faults));
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                serve(&uffd, &store, &counted);
            }
        });
        Self {
            stop,
            faults,
            thread: Some(thread),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(
                ended.is_ok() || std::thread::panicking(),
                "the page-fault side failed"
            );
        }
    }
}

/// Serves what comes within a moment.
fn serve(uffd: &OwnedFd, store: &Store, faults: &AtomicUsize) {
    let mut ready = [PollFd::new(uffd.as_fd(), PollFlags::POLLIN)];
    if poll(&mut ready, PollTimeout::from(20_u8)).expect("poll") == 0 {
        return;
    }
    let mut message = [0_u8; 32];
    match nix::unistd::read(uffd, &mut message) {
        Ok(32) => {}
        Ok(_) | Err(Errno::EAGAIN) => return,
        Err(error) => panic!("userfaultfd: {error}"),
    }
    if message[0] != PAGEFAULT {
        return;
    }
    faults.fetch_add(1, Ordering::Relaxed);
    let address: [u8; 8] = message[16..24].try_into().expect("eight bytes");
    let address = u64::from_ne_bytes(address) & !(PAGE - 1);
    let offset = address
        .checked_sub(store.start)
        .map(|at| usize::try_from(at).expect("64 bit"));
    let page = offset.and_then(|at| store.contents.get(at..at + 4096));
    let served = match page {
        Some(page) => sys::copy(uffd.as_fd(), address, page),
        None => sys::zero(uffd.as_fd(), address),
    };
    // ESRCH: the process is gone, which is its owner's affair.
    assert!(
        matches!(served, Ok(()) | Err(Errno::EEXIST | Errno::ESRCH)),
        "{served:?}"
    );
}
