//! What is written down at a node of addresses that move.
//!
//! ```text
//!   /run/pageferry/ipam/expected/NAMESPACE_POD    a pod that comes, and its address
//!   /var/lib/pageferry/ipam/away/ADDRESS          one of this node's that is elsewhere
//!   /var/lib/pageferry/ipam/left/UID              a pod that runs elsewhere, and never here again
//!   /var/lib/pageferry/ipam/given/ID:INTERFACE    an attachment here with addresses of the range
//!   /var/lib/pageferry/ipam/kept/ID:INTERFACE     an attachment here with an address that came
//!   /var/lib/pageferry/ipam/reserved/ID:INTERFACE one that is gone, and still has its addresses
//!                                                 in the range
//! ```
//! The first three are written by whoever moves pods, the others by the program. Each file is
//! complete under its name, and durable.

use std::fs::{self, File};
use std::io::{self, Write};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::request::Environment;

/// Where a node has what a reboot ends.
pub const RUN: &str = "/run/pageferry/ipam";
/// Where a node has what must survive one.
pub const STATE: &str = "/var/lib/pageferry/ipam";
/// Pods that come to a node, each by `NAMESPACE_POD`.
pub const EXPECTED: &str = "/run/pageferry/ipam/expected";
/// Addresses of a node's range that are elsewhere, each by itself.
pub const AWAY: &str = "/var/lib/pageferry/ipam/away";

/// A pod that comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Expected {
    /// What it keeps, as `10.244.11.5/32`.
    #[serde(with = "host")]
    pub address: Ipv4Addr,
    /// By which it reaches others, if that is not the gateway of the node's range. The network
    /// plugin must have it at its bridge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<Ipv4Addr>,
    /// The UID of the pod. As long as it is not known, no pod of that name gets an address: a name
    /// may be anybody's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// The id of its migration: for whoever looks into it.
    pub migration: String,
}

/// An address that is elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Away {
    /// The id of the migration that took it: for whoever looks into it.
    pub migration: String,
}

/// A pod that has left: it runs elsewhere under another UID.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Left {
    /// The id of the migration that took it, if who wrote this knew: for whoever looks into it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<String>,
}

/// An attachment with addresses that the delegate gave.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Given {
    pub addresses: Vec<Ipv4Addr>,
}

/// An attachment with an address that came.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Kept {
    pub address: Ipv4Addr,
    /// `NAMESPACE/POD`.
    pub pod: String,
    /// The UID of that pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<String>,
    /// Where its network is: when that is gone, so is the pod.
    pub namespace: PathBuf,
}

/// An attachment that is gone, of which the delegate has not been told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Reserved {
    pub addresses: Vec<Ipv4Addr>,
    /// The delegate, and what it is to be told.
    pub delegate: String,
    pub environment: Environment,
    pub config: serde_json::Value,
}

/// Why something is not written down, or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file that somebody else has written.
    #[error("{} is not what is written there: remove it, or write it anew", path.display())]
    Text {
        /// Which one.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// What is no UID of a pod.
    #[error("{uid:?} is no UID of a pod")]
    Uid {
        /// What it is.
        uid: String,
    },
    /// Names that Kubernetes gives to nothing, or too long ones for a file.
    #[error(
        "{namespace:?} and {pod:?} are no namespace and no pod, or have more than {NAMES_MAX} \
             letters"
    )]
    Names {
        /// One.
        namespace: String,
        /// The other.
        pod: String,
    },
}

/// The folders of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folders {
    run: PathBuf,
    state: PathBuf,
}

impl Folders {
    /// [`RUN`] and [`STATE`], or others in their place.
    pub fn new(run: impl Into<PathBuf>, state: impl Into<PathBuf>) -> Self {
        let (run, state) = (run.into(), state.into());
        Self { run, state }
    }

    /// Those of this node.
    pub fn of_node() -> Self {
        Self::new(RUN, STATE)
    }

    /// Says which address a pod comes with. Said again, the later one counts.
    ///
    /// # Errors
    /// Names of nothing, or the file system.
    pub fn expect(&self, namespace: &str, pod: &str, what: &Expected) -> Result<(), StoreError> {
        write(&self.expected_file(namespace, pod)?, what)
    }

    /// It comes no more, or is here: the next sandbox of that pod gets an address of the range.
    /// Returns whether it was expected.
    ///
    /// # Errors
    /// As [`Folders::expect`].
    pub fn unexpect(&self, namespace: &str, pod: &str) -> Result<bool, StoreError> {
        remove(&self.expected_file(namespace, pod)?)
    }

    /// What a pod is expected with.
    ///
    /// # Errors
    /// Names of nothing, the file system, or a file that is not understood.
    pub fn expected(&self, namespace: &str, pod: &str) -> Result<Option<Expected>, StoreError> {
        read(&self.expected_file(namespace, pod)?)
    }

    /// An address of this node's range has left with its pod: it stays reserved from now on. To be
    /// called before the pod's sandbox here may end. It may be repeated.
    ///
    /// # Errors
    /// The file system: then nothing is promised, and the pod must not leave.
    pub fn away(&self, address: Ipv4Addr, what: &Away) -> Result<(), StoreError> {
        write(&self.away_file(address), what)
    }

    /// An address is in use here again, or nowhere. It goes back to the range when nobody here has
    /// it: with the next request, or at once by [`crate::release`]. Returns whether it was
    /// away.
    ///
    /// # Errors
    /// The file system.
    pub fn returned(&self, address: Ipv4Addr) -> Result<bool, StoreError> {
        remove(&self.away_file(address))
    }

    /// Whether an address is elsewhere.
    ///
    /// # Errors
    /// The file system.
    pub fn is_away(&self, address: Ipv4Addr) -> Result<bool, StoreError> {
        let path = self.away_file(address);
        path.try_exists().map_err(failed("look for", &path))
    }

    /// Addresses that this node's pods have kept or taken away, whose way is not that of its range;
    /// none if no address has ever moved here.
    ///
    /// # Errors
    /// The file system, or a file that is not understood: then any address may be one.
    pub fn moved(&self) -> Result<Option<Vec<Ipv4Addr>>, StoreError> {
        let away = self.state.join("away");
        let here = self.kept_folder();
        let known = [&away, &here].map(|path| path.try_exists().map_err(failed("look for", path)));
        let [any, other] = known;
        if !(any? | other?) {
            return Ok(None);
        }
        let mut all: Vec<Ipv4Addr> = list::<serde_json::Value>(&away)?
            .iter()
            .filter_map(|(name, _)| name.parse().ok())
            .collect();
        let kept = list::<Kept>(&here)?;
        let kept = kept.iter().filter(|(_, kept)| kept.namespace.exists());
        all.extend(kept.map(|(_, kept)| kept.address));
        Ok(Some(all))
    }

    /// A pod leaves: from now on this node gives it no address, so that a kubelet that comes up
    /// anew does not start it beside the one that runs elsewhere. To be called before it may run
    /// there. It may be repeated.
    ///
    /// # Errors
    /// What is no UID, or the file system: then nothing is promised, and the pod must not leave.
    pub fn leave(&self, uid: &str, what: &Left) -> Result<(), StoreError> {
        write(&self.left_file(uid)?, what)
    }

    /// A pod stays here, or is gone for good. Returns whether it had left.
    ///
    /// # Errors
    /// As [`Folders::leave`]: it still gets no address.
    pub fn stay(&self, uid: &str) -> Result<bool, StoreError> {
        remove(&self.left_file(uid)?)
    }

    /// What is known of a pod that has left.
    ///
    /// # Errors
    /// What is no UID, the file system, or a file that is not understood.
    pub fn left(&self, uid: &str) -> Result<Option<Left>, StoreError> {
        read(&self.left_file(uid)?)
    }

    fn left_file(&self, uid: &str) -> Result<PathBuf, StoreError> {
        if !is_name(uid) {
            let uid = uid.to_owned();
            return Err(StoreError::Uid { uid });
        }
        Ok(self.state.join("left").join(uid))
    }

    fn expected_file(&self, namespace: &str, pod: &str) -> Result<PathBuf, StoreError> {
        let named = [namespace, pod].into_iter().all(is_name_of_kubernetes);
        if !named || NAMES_MAX < namespace.len() + pod.len() {
            let (namespace, pod) = (namespace.to_owned(), pod.to_owned());
            return Err(StoreError::Names { namespace, pod });
        }
        Ok(self.run.join("expected").join(format!("{namespace}_{pod}")))
    }

    fn away_file(&self, address: Ipv4Addr) -> PathBuf {
        self.state.join("away").join(address.to_string())
    }

    pub(crate) fn kept_folder(&self) -> PathBuf {
        self.state.join("kept")
    }

    pub(crate) fn given_folder(&self) -> PathBuf {
        self.state.join("given")
    }

    pub(crate) fn reserved_folder(&self) -> PathBuf {
        self.state.join("reserved")
    }

    /// Held until the file is closed: whoever decides decides alone.
    pub(crate) fn lock(&self) -> Result<File, StoreError> {
        let path = self.run.join("lock");
        fs::create_dir_all(&self.run).map_err(failed("create", &self.run))?;
        let mut options = File::options();
        let file = options.create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(failed("open", &path))?;
        file.lock().map_err(failed("lock", &path))?;
        Ok(file)
    }
}

/// All files of a folder, by their names; none if there is no folder.
pub(crate) fn list<T: DeserializeOwned>(folder: &Path) -> Result<Vec<(String, T)>, StoreError> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed("list", folder))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed("list", folder))?.file_name();
        let name = name.to_string_lossy().into_owned();
        // What a writer did not finish.
        if name.ends_with(UNFINISHED) {
            continue;
        }
        if let Some(what) = read(&folder.join(&name))? {
            found.push((name, what));
        }
    }
    found.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(found)
}

pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    let text = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        text => text.map_err(failed("read", path))?,
    };
    let path = path.to_owned();
    let read = serde_json::from_slice(&text);
    read.map_err(|source| StoreError::Text { path, source })
}

/// Complete or not at all, and durable.
pub(crate) fn write<T: Serialize>(path: &Path, what: &T) -> Result<(), StoreError> {
    let folder = path.parent().unwrap_or(path);
    fs::create_dir_all(folder).map_err(failed("create", folder))?;
    let mut part = path.as_os_str().to_owned();
    // Several may write the same at once.
    part.push(format!(".{}{UNFINISHED}", std::process::id()));
    let part = PathBuf::from(part);
    let text = serde_json::to_vec(what).map_err(|source| StoreError::Text {
        path: path.to_owned(),
        source,
    })?;
    let written = File::create(&part).and_then(|mut file| {
        file.write_all(&text)?;
        file.sync_all()
    });
    let renamed = written.and_then(|()| fs::rename(&part, path));
    renamed.map_err(failed("write", path))?;
    sync(folder)
}

pub(crate) fn remove(path: &Path) -> Result<bool, StoreError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        removed => removed.map_err(failed("remove", path))?,
    }
    if let Some(folder) = path.parent() {
        sync(folder)?;
    }
    Ok(true)
}

fn sync(folder: &Path) -> Result<(), StoreError> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(failed("sync", folder))
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
    let path = path.to_owned();
    move |source| StoreError::File {
        action,
        path,
        source,
    }
}

/// What may be part of the name of a file.
pub(crate) fn is_name(name: &str) -> bool {
    let usual = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
    name.len() <= 200
        && name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(usual)
}

/// It has no underscore, so that two of them with one between are two of them.
fn is_name_of_kubernetes(name: &str) -> bool {
    let usual = |c: char| c.is_ascii_alphanumeric() || ".-".contains(c);
    name.starts_with(|c: char| c.is_ascii_alphanumeric()) && name.chars().all(usual)
}

/// Together they name a file, whose name has at most 255 letters, also while it is written.
const NAMES_MAX: usize = 230;
/// How the name of a file ends that is not complete.
const UNFINISHED: &str = ".part";

/// An address as a network of itself.
mod host {
    use std::net::Ipv4Addr;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(address: &Ipv4Addr, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format!("{address}/32"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Ipv4Addr, D::Error> {
        let text = String::deserialize(from)?;
        let address = text.strip_suffix("/32").and_then(|text| text.parse().ok());
        address.ok_or_else(|| D::Error::custom(format!("{text:?} is not like 10.244.11.5/32")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_folders_of_a_node_are_where_they_are_said_to_be() {
        let node = Folders::of_node();
        let expected = node.expected_file("default", "web").expect("names");
        assert_eq!(expected, Path::new(EXPECTED).join("default_web"));
        let address = Ipv4Addr::new(10, 244, 11, 5);
        assert_eq!(node.away_file(address), Path::new(AWAY).join("10.244.11.5"));
    }

    #[test]
    fn what_is_expected_is_read_as_it_was_written_until_it_is_unexpected() {
        let folder = tempfile::tempdir().expect("a folder");
        let folders = Folders::new(folder.path().join("run"), folder.path().join("state"));
        assert_eq!(folders.expected("default", "web").expect("read"), None);
        let text = r#"{"address":"10.244.11.5/32","migration":"0123"}"#;
        let expected: Expected = serde_json::from_str(text).expect("an object");
        folders.expect("default", "web", &expected).expect("write");
        let file = folder.path().join("run/expected/default_web");
        assert_eq!(fs::read_to_string(file).expect("a file"), text);
        assert_eq!(
            folders.expected("default", "web").expect("read"),
            Some(expected)
        );
        assert!(folders.unexpect("default", "web").expect("remove"));
        assert!(!folders.unexpect("default", "web").expect("remove"));
    }

    #[test]
    fn what_has_moved_is_away_or_with_a_pod_that_is_here() {
        let folder = tempfile::tempdir().expect("a folder");
        let folders = Folders::new(folder.path().join("run"), folder.path().join("state"));
        assert_eq!(folders.moved().expect("read"), None);
        let [away, here, gone] = [5, 6, 7].map(|last| Ipv4Addr::new(10, 244, 11, last));
        let migration = "0123".to_owned();
        folders.away(away, &Away { migration }).expect("write");
        let network = folder.path().join("network");
        fs::write(&network, "").expect("a network");
        for (name, address, namespace) in [
            ("one:eth0", here, network),
            ("two:eth0", gone, folder.path().join("none")),
        ] {
            let kept = Kept {
                address,
                pod: "default/web".to_owned(),
                uid: None,
                namespace,
            };
            write(&folders.kept_folder().join(name), &kept).expect("write");
        }
        assert_eq!(folders.moved().expect("read"), Some(vec![away, here]));
        assert!(folders.returned(away).expect("removed"));
        assert_eq!(folders.moved().expect("read"), Some(vec![here]));
    }

    #[test]
    fn names_that_lead_elsewhere_and_networks_are_refused() {
        let folders = Folders::new("/nowhere", "/nowhere");
        for name in ["", "..", "a/b", "a_b", "-a"] {
            assert!(folders.expected(name, "web").is_err(), "{name:?}");
            assert!(folders.expected("default", name).is_err(), "{name:?}");
        }
        let long = "a".repeat(NAMES_MAX);
        assert!(folders.expected(&long, "web").is_err());
        for address in ["10.244.11.5", "10.244.11.0/24", "fd00::1/32", ""] {
            let text = format!(r#"{{"address":"{address}","migration":"0123"}}"#);
            assert!(
                serde_json::from_str::<Expected>(&text).is_err(),
                "{address}"
            );
        }
    }
}
