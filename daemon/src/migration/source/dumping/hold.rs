//! That CRIU, and who traces for it, have let go of a tree: a thaw before that would do nothing.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use pageferry_sys::task::is_seizing;

use crate::migration::source::workload::Workload;
use crate::migration::text::chain;

/// A CRIU that lost its daemon lets go by itself. But one that was killed while its tracer waited
/// for a task to trap, which is stopped and frozen, has left it waiting for the thaw. Nobody else
/// who traces is waited for: a debugger may stay for days. What comes of a CRIU that does not end
/// is said, and the rest of the tree goes on.
pub async fn end(workload: &Workload, criu: &Path, limit: Duration) {
    let held_by = || workload.tracer().filter(|tracer| is_criu(*tracer, criu));
    let seizing = |tracer| {
        if is_seizing(tracer)
            && workload.freezer.exists()
            && let Err(error) = workload.freezer.thaw()
        {
            tracing::warn!("what criu waits for stays frozen: {}", chain(&error));
        }
    };
    if let Some(tracer) = let_go(held_by, seizing, limit).await {
        tracing::warn!(
            root = workload.root(),
            tracer,
            "criu was told to end and still holds tasks: it may wait for a file system that \
             does not answer; the workload is thawed, and they go on when criu ends"
        );
    }
}

/// Waits until nobody holds the tree any more, for at most `limit`; who still does then. `seizing`
/// is called with whoever does, again and again.
async fn let_go(
    held_by: impl Fn() -> Option<i32>,
    seizing: impl Fn(i32),
    limit: Duration,
) -> Option<i32> {
    let deadline = Instant::now() + limit;
    while let Some(tracer) = held_by() {
        seizing(tracer);
        if Instant::now() > deadline {
            return Some(tracer);
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    None
}

/// Whether task `tracer` is CRIU, by the program it runs or its name, or traces for CRIU.
fn is_criu(tracer: i32, criu: &Path) -> bool {
    let runs = fs::read_link(format!("/proc/{tracer}/exe")).unwrap_or_default();
    let name = fs::read_to_string(format!("/proc/{tracer}/comm")).unwrap_or_default();
    name.starts_with("criu")
        || runs
            .file_name()
            .is_some_and(|name| Some(name) == criu.file_name())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread::JoinHandle;

    use super::*;
    use pageferry_sys::ptrace;
    use pageferry_sys::task::tracer;
    use pageferry_trial::Trial;

    /// The other process of these tests.
    #[test]
    fn workload() {
        pageferry_trial::obey();
    }

    /// A thread that traces process `pid` until this is dropped.
    struct Tracing(Option<mpsc::Sender<()>>, Option<JoinHandle<()>>);

    impl Tracing {
        fn begin(pid: i32, name: &str) -> Self {
            let (seized, ready) = mpsc::channel();
            let (done, finish) = mpsc::channel::<()>();
            let thread = std::thread::Builder::new().name(name.to_owned());
            let thread = thread.spawn(move || {
                ptrace::seize(pid).unwrap();
                seized.send(()).unwrap();
                let _ = finish.recv();
            });
            ready.recv().unwrap();
            Self(Some(done), Some(thread.unwrap()))
        }
    }

    impl Drop for Tracing {
        fn drop(&mut self) {
            drop(self.0.take());
            let _ = self.1.take().unwrap().join();
        }
    }

    #[tokio::test]
    async fn only_criu_is_waited_for_and_not_for_ever() {
        let trial = Trial::start("migration::source::dumping::hold::tests::workload");
        let pid = trial.pid();
        let criu = Path::new("/usr/sbin/criu");
        let held_by = || tracer(pid).filter(|tracer| is_criu(*tracer, criu));
        let debugger = Tracing::begin(pid, "gdb");
        assert!(tracer(pid).is_some());
        let long = Duration::from_secs(60);
        assert_eq!(let_go(held_by, |_| (), long).await, None);
        drop(debugger);
        let criu_tracer = Tracing::begin(pid, "criu-tracer");
        let short = Duration::from_millis(20);
        assert_eq!(let_go(held_by, |_| (), short).await, tracer(pid));
        let ends = async {
            tokio::task::yield_now().await;
            drop(criu_tracer);
        };
        let (left, ()) = tokio::join!(let_go(held_by, |_| (), long), ends);
        assert_eq!(left, None);
    }
}
