//! What the API server tells of objects as it happens: one kubectl that watches, instead of many
//! that ask. Each of those would take a tenth of a second of a processor, in the middle of what is
//! measured.

use std::io::BufReader;
use std::process::{Child, ChildStdout, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::kubectl::Kubectl;

/// One thing that happened to an object.
#[derive(Clone, Debug)]
pub struct Event {
    /// When the lab heard of it.
    pub at: Instant,
    /// Whether it is gone.
    pub deleted: bool,
    /// As it is now.
    pub object: Value,
}

/// A watch, until it is dropped.
#[derive(Debug)]
pub struct Watching {
    child: Child,
    heard: Arc<Heard>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Heard {
    told: Mutex<Told>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Told {
    events: Vec<Event>,
    /// Nothing more comes, and why.
    over: Option<String>,
}

impl Watching {
    /// Watches what `kubectl get` would list by these arguments. What is there already comes first.
    pub fn start(kubectl: &Kubectl, arguments: &[&str]) -> Result<Self> {
        let command = kubectl.command()?.arg("get").args(arguments).args([
            "--watch",
            "--output-watch-events",
            "--output=json",
        ]);
        let command = command.stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.stderr(Stdio::null()).spawn()?;
        let stdout = child.stdout.take().context("stdout was just asked for")?;
        let heard = Arc::new(Heard::default());
        let shared = Arc::clone(&heard);
        let thread = std::thread::Builder::new().name("watching".to_owned());
        let thread = thread.spawn(move || shared.listen(stdout));
        Ok(Self {
            child,
            heard,
            thread: Some(thread.context("starting a thread")?),
        })
    }

    /// All that has happened so far.
    pub fn all(&self) -> Vec<Event> {
        self.heard.told().events.clone()
    }

    /// Looks at one event after the other until there is an answer.
    ///
    /// # Errors
    /// When `time_max` is over, when `look` fails, or when nothing more will be heard.
    pub fn wait<T>(
        &self,
        what: &str,
        time_max: Duration,
        mut look: impl FnMut(&Event) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + time_max;
        let (mut told, mut next) = (self.heard.told(), 0);
        loop {
            while let Some(event) = told.events.get(next) {
                next += 1;
                if let Some(answer) = look(event).with_context(|| what.to_owned())? {
                    return Ok(answer);
                }
            }
            if let Some(why) = &told.over {
                bail!("{what}: kubectl watches no more: {why}");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{what}: not within {time_max:?}");
            }
            let waited = self.heard.more.wait_timeout(told, left);
            told = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Heard {
    fn told(&self) -> MutexGuard<'_, Told> {
        // What was told is whole, whoever panicked.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn listen(&self, stdout: ChildStdout) {
        let events = serde_json::Deserializer::from_reader(BufReader::new(stdout));
        let mut why = "it has ended".to_owned();
        for event in events.into_iter::<Value>() {
            let mut event = match event {
                Ok(event) => event,
                Err(error) => {
                    why = error.to_string();
                    break;
                }
            };
            self.told().events.push(Event {
                at: Instant::now(),
                deleted: event["type"] == "DELETED",
                object: event["object"].take(),
            });
            self.more.notify_all();
        }
        self.told().over = Some(why);
        self.more.notify_all();
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
