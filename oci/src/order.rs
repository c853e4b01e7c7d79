//! Orders to restore, as files: `wanted/SPACE/ID` and, once a `create` has it, `taken/SPACE/ID`.
//!
//! Of an order that [is ahead](Order::is_ahead) there are three more, which go with it:
//! `held/SPACE/ID` says which process stands for the container, `passed/SPACE/ID` that its engine
//! may go on, and `started/SPACE/ID` that it has.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// Where the runtime is to find CRIU, images and a place to work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Order {
    /// The migration, which may clear it again.
    pub migration: String,
    /// All of the `PATH` of the runtime, with a `criu` in it.
    pub gate: PathBuf,
    /// What the runtime reads of images by itself.
    pub images: PathBuf,
    /// For logs.
    pub work: PathBuf,
    /// The engine is to go on before the restore, once that is [passed](Orders::pass): others of
    /// the pod come after this one, and are restored at the same time.
    pub is_ahead: bool,
}

/// Who is there for a container that is ahead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// The process that the engine takes for the container's.
    pub holder: i32,
    /// The runtime that restores it.
    pub runtime: i32,
}

/// The folder of all orders of this node.
#[derive(Clone, Debug)]
pub struct Orders(PathBuf);

/// What is known of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Taken {
    /// It is to be restored by whoever asks.
    Now(Order),
    /// Somebody else restores it, or has.
    Before,
    /// Nothing: it is a container like others.
    Unknown,
}

/// Why an order is not there, or not taken.
#[derive(Debug)]
pub struct OrderError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// What an order says that is ahead.
const AHEAD: &str = "ahead";

/// Where orders are: containers that have come name the program alone.
pub(crate) const FOLDER: &str = "/run/pageferry/oci";

impl Orders {
    /// Those of this node.
    pub fn of_node() -> Self {
        Self::at(FOLDER.into())
    }

    /// Those in another folder.
    pub fn at(folder: PathBuf) -> Self {
        Self(folder)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.0
    }

    fn wanted(&self, space: &str, id: &str) -> PathBuf {
        self.0.join("wanted").join(space).join(id)
    }

    fn taken(&self, space: &str, id: &str) -> PathBuf {
        self.0.join("taken").join(space).join(id)
    }

    fn passed_at(&self, space: &str, id: &str) -> PathBuf {
        self.0.join("passed").join(space).join(id)
    }

    fn held_at(&self, space: &str, id: &str) -> PathBuf {
        self.0.join("held").join(space).join(id)
    }

    fn started_at(&self, space: &str, id: &str) -> PathBuf {
        self.0.join("started").join(space).join(id)
    }

    /// Says that the engine has started a container that is ahead: it knows what stands for that.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn start(&self, space: &str, id: &str) -> Result<(), OrderError> {
        put(&self.started_at(space, id), "")
    }

    /// Whether the engine has started it.
    pub fn is_started(&self, space: &str, id: &str) -> bool {
        self.started_at(space, id).exists()
    }

    /// Lets the engine of a container that is ahead go on. Process `within` is in the container's
    /// cgroups, as what stands for the container is to be until it is started.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn pass(&self, space: &str, id: &str, within: i32) -> Result<(), OrderError> {
        put(&self.passed_at(space, id), &within.to_string())
    }

    /// The process that was named when the engine was let go on, if it was.
    ///
    /// # Errors
    /// When what is there cannot be read.
    pub fn passed(&self, space: &str, id: &str) -> Result<Option<i32>, OrderError> {
        let path = self.passed_at(space, id);
        let numbers = numbers(&path)?;
        match numbers.as_deref() {
            None => Ok(None),
            Some([within]) => Ok(Some(*within)),
            Some(_) => Err(unknown(&path)),
        }
    }

    /// Says who is there for a container that is ahead.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn hold(&self, space: &str, id: &str, held: Held) -> Result<(), OrderError> {
        let Held { holder, runtime } = held;
        put(&self.held_at(space, id), &format!("{holder} {runtime}"))
    }

    /// Who is there for a container, if it is ahead.
    ///
    /// # Errors
    /// When what is there cannot be read.
    pub fn held(&self, space: &str, id: &str) -> Result<Option<Held>, OrderError> {
        let path = self.held_at(space, id);
        let numbers = numbers(&path)?;
        match numbers.as_deref() {
            None => Ok(None),
            Some([holder, runtime]) => Ok(Some(Held {
                holder: *holder,
                runtime: *runtime,
            })),
            Some(_) => Err(unknown(&path)),
        }
    }

    /// Whether the container is between [`Orders::write`] and [`Orders::clear`].
    pub fn has(&self, space: &str, id: &str) -> bool {
        self.wanted(space, id).exists() || self.taken(space, id).exists()
    }

    /// Has the next `create` of the container restore it. An order of the same migration before it
    /// counts no more.
    ///
    /// # Errors
    /// When the file cannot be made, or there is an order of another migration.
    pub fn write(&self, space: &str, id: &str, order: &Order) -> Result<(), OrderError> {
        self.clear(space, id, &order.migration)?;
        let path = self.wanted(space, id);
        let failed = |source| OrderError {
            action: "writing",
            path: path.clone(),
            source,
        };
        if self.has(space, id) {
            return Err(failed(io::ErrorKind::AlreadyExists.into()));
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        fs::write(&path, order.encode()).map_err(failed)
    }

    /// Takes the order for a container.
    ///
    /// # Errors
    /// When there is one that cannot be taken or read: nobody may create the container then.
    pub fn take(&self, space: &str, id: &str) -> Result<Taken, OrderError> {
        let (wanted, taken) = (self.wanted(space, id), self.taken(space, id));
        let failed = |source| OrderError {
            action: "taking",
            path: wanted.clone(),
            source,
        };
        if let Some(folder) = taken.parent().filter(|_| wanted.exists()) {
            fs::create_dir_all(folder).map_err(failed)?;
        }
        // Of two that try, one does.
        match fs::rename(&wanted, &taken) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok(match taken.exists() {
                    true => Taken::Before,
                    false => Taken::Unknown,
                });
            }
            Err(error) => return Err(failed(error)),
        }
        let text = fs::read(&taken).map_err(failed)?;
        let order = Order::decode(&text);
        order.map(Taken::Now).ok_or_else(|| {
            let text = "it is not what this build writes";
            failed(io::Error::new(io::ErrorKind::InvalidData, text))
        })
    }

    /// Whether a container is restored, or being so, by an order.
    pub fn is_taken(&self, space: &str, id: &str) -> bool {
        self.taken(space, id).exists()
    }

    /// The container is one like others from here on, or gone, as far as `migration` goes.
    ///
    /// # Errors
    /// When a file stays.
    pub fn clear(&self, space: &str, id: &str, migration: &str) -> Result<(), OrderError> {
        for path in [self.wanted(space, id), self.taken(space, id)] {
            let failed = |source| OrderError {
                action: "removing",
                path: path.clone(),
                source,
            };
            let cleared = fs::read(&path).and_then(|text| {
                let order = Order::decode(&text);
                let is_ours = order.is_none_or(|order| order.migration == migration);
                if is_ours {
                    fs::remove_file(&path)
                } else {
                    Ok(())
                }
            });
            match cleared {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed(error));
                }
                _ => {}
            }
        }
        if self.has(space, id) {
            return Ok(());
        }
        let beside = [
            self.passed_at(space, id),
            self.held_at(space, id),
            self.started_at(space, id),
        ];
        for path in beside {
            match fs::remove_file(&path) {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(OrderError {
                        action: "removing",
                        path,
                        source,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Writes a file that is there whole or not at all.
fn put(path: &Path, text: &str) -> Result<(), OrderError> {
    let new = path.with_extension("new");
    let made = path.parent().map_or(Ok(()), fs::create_dir_all);
    let written = made
        .and_then(|()| fs::write(&new, text))
        .and_then(|()| fs::rename(&new, path));
    written.map_err(|source| OrderError {
        action: "writing",
        path: path.to_owned(),
        source,
    })
}

/// The numbers in a file, if there is one.
fn numbers(path: &Path) -> Result<Option<Vec<i32>>, OrderError> {
    let text = match fs::read_to_string(path) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => {
            return Err(OrderError {
                action: "reading",
                path: path.to_owned(),
                source,
            });
        }
        Ok(text) => text,
    };
    let numbers: Result<_, _> = text.split(' ').map(str::parse).collect();
    numbers.map(Some).map_err(|_| unknown(path))
}

fn unknown(path: &Path) -> OrderError {
    let text = "it is not what this build writes";
    OrderError {
        action: "reading",
        path: path.to_owned(),
        source: io::Error::new(io::ErrorKind::InvalidData, text),
    }
}

impl Order {
    /// The migration, paths, and a word if it is ahead, each with a zero byte behind it.
    fn encode(&self) -> Vec<u8> {
        let paths = [&self.gate, &self.images, &self.work].map(|path| path.as_os_str());
        let parts = std::iter::once(self.migration.as_ref()).chain(paths);
        let parts = parts.chain(self.is_ahead.then_some(OsStr::new(AHEAD)));
        let part = |part: &OsStr| [part.as_bytes(), b"\0"].concat();
        parts.flat_map(part).collect()
    }

    fn decode(text: &[u8]) -> Option<Self> {
        let text = text.strip_suffix(b"\0")?;
        let mut all = text.split(|byte| *byte == 0);
        let migration = String::from_utf8(all.next()?.to_vec()).ok()?;
        let path = |part: &[u8]| {
            let path = PathBuf::from(OsString::from_vec(part.to_vec()));
            Some(path).filter(|path| Path::is_absolute(path))
        };
        let order = Self {
            migration,
            gate: path(all.next()?)?,
            images: path(all.next()?)?,
            work: path(all.next()?)?,
            is_ahead: match all.next() {
                None => false,
                Some(word) if word == AHEAD.as_bytes() => true,
                Some(_) => return None,
            },
        };
        all.next().is_none().then_some(order)
    }
}

impl fmt::Display for OrderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {}: {}",
            self.action,
            self.path.display(),
            self.source
        )
    }
}

impl std::error::Error for OrderError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order() -> Order {
        Order {
            migration: "m".to_owned(),
            gate: "/run/m/gate".into(),
            images: "/run/m/streams".into(),
            work: "/run/m".into(),
            is_ahead: false,
        }
    }

    #[test]
    fn an_order_is_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let orders = Orders::at(folder.path().to_owned());
        assert_eq!(orders.take("default", "web").unwrap(), Taken::Unknown);
        orders.write("default", "web", &order()).unwrap();
        assert!(orders.has("default", "web") && !orders.is_taken("default", "web"));
        assert_eq!(orders.take("other", "web").unwrap(), Taken::Unknown);
        assert_eq!(orders.take("default", "web").unwrap(), Taken::Now(order()));
        assert_eq!(orders.take("default", "web").unwrap(), Taken::Before);
        assert!(orders.has("default", "web") && orders.is_taken("default", "web"));
        // Nor by another migration.
        orders.clear("default", "web", "other").unwrap();
        let other = Order {
            migration: "other".to_owned(),
            ..order()
        };
        assert!(orders.write("default", "web", &other).is_err());
        assert_eq!(orders.take("default", "web").unwrap(), Taken::Before);
        orders.clear("default", "web", "m").unwrap();
        assert_eq!(orders.take("default", "web").unwrap(), Taken::Unknown);
    }

    #[test]
    fn what_stands_for_a_container_goes_with_its_order() {
        let folder = tempfile::tempdir().unwrap();
        let orders = Orders::at(folder.path().to_owned());
        let held = Held {
            holder: 5,
            runtime: 6,
        };
        assert_eq!(orders.held("default", "web").unwrap(), None);
        orders.write("default", "web", &order()).unwrap();
        orders.hold("default", "web", held).unwrap();
        assert_eq!(orders.passed("default", "web").unwrap(), None);
        orders.pass("default", "web", 7).unwrap();
        assert_eq!(orders.passed("default", "web").unwrap(), Some(7));
        assert!(!orders.is_started("default", "web"));
        orders.start("default", "web").unwrap();
        assert!(orders.is_started("default", "web"));
        orders.clear("default", "web", "other").unwrap();
        assert_eq!(orders.held("default", "web").unwrap(), Some(held));
        orders.clear("default", "web", "m").unwrap();
        assert_eq!(orders.held("default", "web").unwrap(), None);
        assert_eq!(orders.passed("default", "web").unwrap(), None);
        assert!(!orders.is_started("default", "web"));
        fs::write(folder.path().join("held/default/web"), "5").unwrap();
        let error = orders.held("default", "web").unwrap_err();
        assert!(error.to_string().contains("held/default/web"), "{error}");
    }

    #[test]
    fn what_is_no_order_is_none() {
        assert_eq!(Order::decode(&order().encode()), Some(order()));
        let ahead = Order {
            is_ahead: true,
            ..order()
        };
        assert_eq!(Order::decode(&ahead.encode()), Some(ahead));
        for text in [
            &b""[..],
            b"m\0/a\0/b\0",
            b"m\0/a\0/b\0c\0",
            b"m\0/a\0/b\0/c\0/d\0",
        ] {
            assert_eq!(Order::decode(text), None);
        }
        let folder = tempfile::tempdir().unwrap();
        let orders = Orders::at(folder.path().to_owned());
        orders.write("default", "web", &order()).unwrap();
        fs::write(folder.path().join("wanted/default/web"), "half").unwrap();
        let error = orders.take("default", "web").unwrap_err();
        assert!(error.to_string().contains("wanted/default/web"), "{error}");
        // Nor is it created by another.
        assert_eq!(orders.take("default", "web").unwrap(), Taken::Before);
    }
}
