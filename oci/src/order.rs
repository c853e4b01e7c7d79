//! Orders to restore, as files: `wanted/SPACE/ID` and, once a `create` has it, `taken/SPACE/ID`.

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
        Ok(())
    }
}

impl Order {
    /// The migration and paths, each with a zero byte behind it.
    fn encode(&self) -> Vec<u8> {
        let paths = [&self.gate, &self.images, &self.work].map(|path| path.as_os_str());
        let parts = std::iter::once(self.migration.as_ref()).chain(paths);
        let part = |part: &OsStr| [part.as_bytes(), b"\0"].concat();
        parts.flat_map(part).collect()
    }

    fn decode(text: &[u8]) -> Option<Self> {
        let text = text.strip_suffix(b"\0")?;
        let mut all = text.split(|byte| *byte == 0);
        let migration = String::from_utf8(all.next()?.to_vec()).ok()?;
        let mut parts = all.map(|part| {
            let path = PathBuf::from(OsString::from_vec(part.to_vec()));
            Some(path).filter(|path| Path::is_absolute(path))
        });
        let order = Self {
            migration,
            gate: parts.next()??,
            images: parts.next()??,
            work: parts.next()??,
        };
        parts.next().is_none().then_some(order)
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
    fn what_is_no_order_is_none() {
        assert_eq!(Order::decode(&order().encode()), Some(order()));
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
