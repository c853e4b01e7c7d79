//! Folders that travel with the workload.
//!
//! What is on their streams is not this crate's: it is told by kind, folder and round, and counted.

use crate::id::{IdError, Round};
use crate::wire::control::{ControlError, missing, short};
use crate::wire::description::PATH_BYTES_MAX;
use crate::wire::schema;

/// Most folders that travel with one workload.
pub const COPIED_PATHS_MAX: usize = 64;

/// Most bytes of one difference of one folder, in bytes (16 TiB).
pub const FILES_BYTES_MAX: u64 = 16 << 40;

/// A folder that travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CopiedPath {
    /// Where it is at the source, and is to be at the target; absolute. Empty for what is the
    /// container's own, and the name of a volume of its pod's.
    pub path: String,
    /// What it is.
    pub form: CopiedForm,
    /// How many entries it has.
    pub entries: u64,
    /// What its files take on disk, in bytes.
    pub bytes: u64,
    /// What the target had of it when it left there, if it did.
    pub base: Option<[u8; 32]>,
}

/// What a folder that travels is to the workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CopiedForm {
    /// One that was named.
    Folder,
    /// The root file system of a container, whole; with it the folder that its bundle is.
    Root(BundleFolder),
    /// What a container has written over the layers of its image: the upper layer of an overlay.
    Layer,
    /// A volume that its pod has for as long as it lives, by the name that the pod has for it.
    Volume,
}

/// What is said of the folder of a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BundleFolder {
    /// Its permissions.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// What precedes a difference on its stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FilesHeader {
    /// The round that it is of.
    pub round: Round,
    /// Which folder of the description it is of, from 0.
    pub folder: u32,
}

impl FilesHeader {
    /// Length of the header, in bytes.
    pub const BYTES: usize = 8;

    /// Its bytes.
    pub fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..4].copy_from_slice(&self.round.number().to_le_bytes());
        bytes[4..].copy_from_slice(&self.folder.to_le_bytes());
        bytes
    }

    /// The header that these bytes are.
    pub fn decode(bytes: [u8; Self::BYTES]) -> Result<Self, IdError> {
        let [a, b, c, d, folder @ ..] = bytes;
        Ok(Self {
            round: Round::new(u32::from_le_bytes([a, b, c, d]))?,
            folder: u32::from_le_bytes(folder),
        })
    }
}

impl From<&CopiedPath> for schema::CopiedPath {
    fn from(copied: &CopiedPath) -> Self {
        let (form, bundle) = match copied.form {
            CopiedForm::Folder => (schema::CopiedForm::Folder, None),
            CopiedForm::Root(bundle) => (schema::CopiedForm::Root, Some(bundle)),
            CopiedForm::Layer => (schema::CopiedForm::Layer, None),
            CopiedForm::Volume => (schema::CopiedForm::Volume, None),
        };
        Self {
            form: form.into(),
            mode: bundle.map_or(0, |bundle| bundle.mode),
            uid: bundle.map_or(0, |bundle| bundle.uid),
            gid: bundle.map_or(0, |bundle| bundle.gid),
            path: copied.path.clone(),
            entries: copied.entries,
            bytes: copied.bytes,
            base: copied.base.map(Vec::from).unwrap_or_default(),
        }
    }
}

impl TryFrom<schema::CopiedPath> for CopiedPath {
    type Error = ControlError;

    fn try_from(wire: schema::CopiedPath) -> Result<Self, ControlError> {
        let form = form(&wire)?;
        let is_called = match form {
            CopiedForm::Folder => is_path(&wire.path),
            CopiedForm::Root(_) | CopiedForm::Layer => wire.path.is_empty(),
            CopiedForm::Volume => is_name(&wire.path),
        };
        if !is_called {
            return Err(missing("copied path"));
        }
        short("copied path", wire.path.len(), PATH_BYTES_MAX)?;
        let length = i64::try_from(wire.base.len()).unwrap_or(i64::MAX);
        let base = match wire.base.is_empty() {
            true => None,
            false => Some(wire.base.try_into().map_err(|_| ControlError::Invalid {
                field: "copied.base",
                value: length,
            })?),
        };
        Ok(Self {
            form,
            path: wire.path,
            entries: wire.entries,
            bytes: wire.bytes,
            base,
        })
    }
}

/// Whether it is a plain absolute path: what is beside it is called by its name.
fn is_path(path: &str) -> bool {
    let parts = path.strip_prefix('/').unwrap_or_default();
    parts.split('/').all(is_name)
}

fn is_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\0'])
}

fn form(wire: &schema::CopiedPath) -> Result<CopiedForm, ControlError> {
    let invalid = |field, value: i64| Err(ControlError::Invalid { field, value });
    let bundle = BundleFolder {
        mode: wire.mode,
        uid: wire.uid,
        gid: wire.gid,
    };
    if 0o7777 < bundle.mode || bundle.uid == u32::MAX || bundle.gid == u32::MAX {
        return invalid("copied.mode", bundle.mode.into());
    }
    Ok(match schema::CopiedForm::try_from(wire.form) {
        Ok(schema::CopiedForm::Folder) => CopiedForm::Folder,
        Ok(schema::CopiedForm::Root) => CopiedForm::Root(bundle),
        Ok(schema::CopiedForm::Layer) => CopiedForm::Layer,
        Ok(schema::CopiedForm::Volume) => CopiedForm::Volume,
        Err(_) => return invalid("copied.form", wire.form.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_containers_own_has_no_path() {
        let read = |path: &str, form: i32, mode: u32| {
            let wire = schema::CopiedPath {
                path: path.to_owned(),
                form,
                mode,
                ..schema::CopiedPath::default()
            };
            CopiedPath::try_from(wire).map(|copied| copied.form)
        };
        assert_eq!(read("/srv/data", 0, 0), Ok(CopiedForm::Folder));
        assert_eq!(read("", 2, 0), Ok(CopiedForm::Layer));
        assert_eq!(read("cache", 3, 0), Ok(CopiedForm::Volume));
        let bundle = BundleFolder {
            mode: 0o700,
            uid: 0,
            gid: 0,
        };
        assert_eq!(read("", 1, 0o700), Ok(CopiedForm::Root(bundle)));
        let copied = CopiedPath {
            path: String::new(),
            form: CopiedForm::Root(bundle),
            entries: 5,
            bytes: 6,
            base: Some([7; 32]),
        };
        let wire = schema::CopiedPath::from(&copied);
        assert_eq!(CopiedPath::try_from(wire), Ok(copied));
        for (path, form) in [
            ("/srv/data", 1),
            ("/srv/data", 2),
            ("", 0),
            ("a", 0),
            ("a", 2),
            ("", 3),
            ("..", 3),
            ("a/b", 3),
            ("a\0b", 3),
            ("/srv/data", 3),
        ] {
            assert!(read(path, form, 0).is_err(), "{path} {form}");
        }
        assert!(read("/srv/../data", 0, 0).is_err());
        assert!(read("", 4, 0).is_err() && read("", 1, 0o10_000).is_err());
    }
}
