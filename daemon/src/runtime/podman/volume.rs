//! Named volumes of podman. What is in one travels as any folder does; the volume itself is made
//! anew at the target, and is podman's own there.
//!
//! At the source the volume is removed when its contents have left: podman keeps one that no
//! container has, but whoever started a container with what is left would begin with nothing.
//!
//! Absent, and refused by name: volumes of plugins, volumes that are mounts, and those that another
//! container has too.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::{fs, io};

use pageferry_files::{Identity, identity_of};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::VolumeDescription;
use serde::{Deserialize, Serialize};

use super::command::{podman_at_once, podman_has, podman_with, told};

/// The driver of volumes that are plain folders.
const LOCAL: &str = "local";

/// Options by which such a volume is a mount.
const MOUNT_OPTIONS: [&str; 3] = ["device", "o", "type"];

/// A volume at its source, as the journal keeps it, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    name: String,
    path: PathBuf,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    labels: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    options: BTreeMap<String, String>,
}

/// A volume that was made here for a container that comes, and what it is known by.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Made {
    name: String,
    path: PathBuf,
    created: String,
    /// What the empty folder is known by that podman has made for its contents.
    folder: Identity,
}

/// One of `podman volume inspect`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Inspected {
    name: String,
    #[serde(default)]
    created_at: String,
    driver: String,
    mountpoint: PathBuf,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    options: Option<BTreeMap<String, String>>,
}

impl Volume {
    /// The volume that is called so, which the containers `ids` have, that move together; if it can
    /// move.
    pub fn of(name: &str, ids: &[&str]) -> Result<Self, Failure> {
        let unfit = |text: String| Failure::new(ErrorCode::UnsupportedWorkload, text);
        let found = inspect(name).map_err(|why| unfit(format!("the volume {name}: {why}")))?;
        let volume = Self::fit(found)?;
        let filter = format!("volume={name}");
        let list = [
            "ps",
            "--all",
            "--no-trunc",
            "--filter",
            &filter,
            "--format",
            "{{.ID}}",
        ];
        let users = podman_at_once(list).map_err(|error| unfit(told(&error)))?;
        match users.lines().find(|user| !ids.contains(user)) {
            Some(other) => Err(unfit(format!(
                "the container {other} has the volume {name}, too, which would leave with this one"
            ))),
            None => Ok(volume),
        }
    }

    fn fit(found: Inspected) -> Result<Self, Failure> {
        let Inspected {
            name,
            created_at: _,
            driver,
            mountpoint: path,
            labels,
            options,
        } = found;
        let options = options.unwrap_or_default();
        let mounted = MOUNT_OPTIONS
            .iter()
            .find(|name| options.contains_key(**name));
        let why = match (driver == LOCAL, mounted) {
            (false, _) => format!("is one of the driver {driver}"),
            (true, Some(option)) => format!("is a mount (its option {option})"),
            (true, None) => {
                return Ok(Self {
                    name,
                    path,
                    labels: labels.unwrap_or_default(),
                    options,
                });
            }
        };
        let text = format!("the volume {name} of the container {why}, which is not moved yet");
        Err(Failure::new(ErrorCode::UnsupportedWorkload, text))
    }

    /// Where what is in it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the target is to make.
    pub fn describe(&self) -> VolumeDescription {
        VolumeDescription {
            name: self.name.clone(),
            path: self.path.to_string_lossy().into_owned(),
            labels: self.labels.clone(),
            options: self.options.clone(),
        }
    }

    /// Whether nothing is where its contents were, for certain.
    fn has_left(&self) -> io::Result<bool> {
        match fs::symlink_metadata(&self.path) {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) => Err(error),
        }
    }

    /// Removes it if its contents have left. Blocks, while podman answers.
    pub fn release(&self) {
        match self.has_left() {
            Ok(true) => {}
            Ok(false) => return,
            Err(error) => {
                tracing::warn!(
                    volume = self.name,
                    %error,
                    "podman keeps a volume of a container that has moved away"
                );
                return;
            }
        }
        if let Err(error) = remove(&self.name) {
            tracing::warn!(
                volume = self.name,
                error,
                "podman lists a volume that has moved away"
            );
        }
    }
}

/// Keeps those whose contents are one of `copied`.
pub fn retain(volumes: &mut Vec<Volume>, copied: &[PathBuf]) {
    volumes.retain(|volume| copied.contains(&volume.path));
}

/// Checks that what a peer has made is as [`Volume::of`] lets it through, and that it is one of the
/// container's, and comes with its contents.
pub fn check_offered(
    volume: &VolumeDescription,
    volumes: &[String],
    copied: &[&str],
) -> Result<(), Failure> {
    let options = &volume.options;
    let mount = MOUNT_OPTIONS
        .iter()
        .find(|name| options.contains_key(**name));
    let why = if let Some(option) = mount {
        format!("is a mount (its option {option}), which is not moved yet")
    } else if !volumes.contains(&volume.name) {
        "is none of the container's".to_owned()
    } else if !copied.contains(&&*volume.path) {
        format!("comes without its contents, which are in {}", volume.path)
    } else {
        return Ok(());
    };
    let text = format!("the volume {} that is offered {why}", volume.name);
    Err(Failure::new(ErrorCode::UnsupportedWorkload, text))
}

/// Checks that podman has a volume here whose contents do not come; `sources` is what is bound into
/// the container.
pub fn check_shared(name: &str, sources: &[&Path]) -> Result<(), Failure> {
    let unfit = |why| Failure::new(ErrorCode::NodeUnfit, why);
    let here = match exists(name).map_err(unfit)? {
        true => Some(inspect(name).map_err(unfit)?.mountpoint),
        false => None,
    };
    is_shared(name, here.as_deref(), sources).map_err(unfit)
}

fn is_shared(name: &str, here: Option<&Path>, sources: &[&Path]) -> Result<(), String> {
    match here {
        Some(here) if sources.contains(&here) => Ok(()),
        Some(here) => Err(format!(
            "the target's podman has the volume {name}, which does not travel, at {}, where the \
             source's is not",
            here.display()
        )),
        None => Err(format!(
            "the target's podman has no volume {name}, which does not travel: make it there \
             (podman volume create {name}), so that it is where the storage is that is shared"
        )),
    }
}

/// Refuses a volume of which podman has one here already.
pub fn check_free(volume: &VolumeDescription) -> Result<(), Failure> {
    let name = &*volume.name;
    match exists(name) {
        Ok(false) => Ok(()),
        Ok(true) => Err(Failure::new(
            ErrorCode::NameTaken,
            format!("podman has a volume {name} at the target already: remove it first"),
        )),
        Err(why) => Err(Failure::new(ErrorCode::NodeUnfit, why)),
    }
}

/// Makes it, with nothing in it. One that is there is an error. Blocks, while podman answers.
pub fn make(volume: &VolumeDescription) -> Result<Made, Failure> {
    let unfit = |text: String| Failure::new(ErrorCode::NodeUnfit, text);
    let mut words = vec!["volume".to_owned(), "create".to_owned()];
    for (name, values) in [("--label", &volume.labels), ("--opt", &volume.options)] {
        for (key, value) in values {
            words.extend([name.to_owned(), format!("{key}={value}")]);
        }
    }
    words.extend(["--".to_owned(), volume.name.clone()]);
    podman_with(words).map_err(|error| unfit(told(&error)))?;
    let here = inspect(&volume.name);
    let here = here.map_err(|why| unfit(format!("the volume {}: {why}", volume.name)))?;
    let folder = identity_of(&here.mountpoint).map_err(|error| unfit(error.to_string()))?;
    let made = Made {
        folder,
        name: here.name,
        path: here.mountpoint,
        created: here.created_at,
    };
    if made.path == Path::new(&volume.path) {
        return Ok(made);
    }
    drop(take_back(&made));
    Err(unfit(format!(
        "the target's podman has volumes at other paths than the source's: {} and not {}",
        made.path.display(),
        volume.path
    )))
}

impl Made {
    /// As podman calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where what is in it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the one that podman has is this one, and may go: what is in it has been there since
    /// before anything came, or nothing is. If it is this one and may not, why.
    fn may_go(&self, here: &Inspected) -> Result<bool, String> {
        if here.created_at.is_empty() {
            return Err("podman does not say when it was made".to_owned());
        }
        if (&here.created_at, &here.mountpoint) != (&self.created, &self.path) {
            return Ok(false);
        }
        if identity_of(&self.path).is_ok_and(|here| here == self.folder) {
            return Ok(true);
        }
        match fs::read_dir(&self.path).map(|mut all| all.next().is_none()) {
            Ok(true) => Ok(true),
            Ok(false) => Err(format!(
                "{} is not empty: remove it when it is certain that nobody needs that",
                self.path.display()
            )),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) => Err(format!("{}: {error}", self.path.display())),
        }
    }
}

/// Removes a volume that was made here, if it is still that one, and empty; unless a container has
/// it. One that is gone, or that is another one now, is no error. Blocks, while podman answers.
pub fn take_back(made: &Made) -> Result<(), String> {
    if !exists(&made.name)? {
        return Ok(());
    }
    match made.may_go(&inspect(&made.name)?)? {
        true => remove(&made.name),
        false => Ok(()),
    }
}

/// Removes the volume that is called so, unless a container has it. Blocks, while podman answers.
fn remove(name: &str) -> Result<(), String> {
    if !exists(name)? {
        return Ok(());
    }
    let removed = podman_at_once(["volume", "rm", "--", name]);
    removed.map(drop).map_err(|error| told(&error))
}

fn exists(name: &str) -> Result<bool, String> {
    podman_has(["volume", "exists", name]).map_err(|error| told(&error))
}

fn inspect(name: &str) -> Result<Inspected, String> {
    let printed = podman_at_once(["volume", "inspect", "--", name]);
    let printed = printed.map_err(|error| told(&error))?;
    let all: Vec<Inspected> = serde_json::from_str(&printed).map_err(|error| error.to_string())?;
    let mut all = all.into_iter();
    let found = all.find(|found| found.name == name);
    found.ok_or_else(|| "podman has none of this name".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn volume(driver: &str, options: &serde_json::Value) -> Result<Volume, Failure> {
        let found = json!({
            "Name": "data", "Driver": driver, "Mountpoint": "/v/data/_data",
            "CreatedAt": "2026-11-29T12:00:00Z", "Labels": {"a": "b"}, "Options": options,
        });
        Volume::fit(serde_json::from_value(found).unwrap())
    }

    #[test]
    fn a_volume_that_is_a_folder_moves_and_others_are_refused() {
        let plain = volume(LOCAL, &json!({})).unwrap();
        assert_eq!(plain.path(), Path::new("/v/data/_data"));
        assert_eq!(plain.describe().labels["a"], "b");
        volume(LOCAL, &json!(null)).unwrap();
        let mounted = volume(LOCAL, &json!({"type": "nfs", "device": ":/x"})).unwrap_err();
        assert!(
            mounted.text().contains("is a mount (its option device)"),
            "{mounted}"
        );
        let other = volume("sshfs", &json!({})).unwrap_err();
        assert!(other.text().contains("driver sshfs"), "{other}");
    }

    #[test]
    fn only_what_is_certainly_gone_has_left() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: PathBuf| Volume {
            path,
            ..volume(LOCAL, &json!({})).unwrap()
        };
        assert!(at(root.path().join("gone")).has_left().unwrap());
        assert!(!at(root.path().to_owned()).has_left().unwrap());
        let all = [root.path().join("one"), root.path().join("one/two")];
        let mut volumes: Vec<_> = all.clone().map(at).into();
        retain(&mut volumes, &all[..1]);
        assert_eq!(volumes, [at(all[0].clone())]);
        // As storage that does not answer.
        let file = root.path().join("file");
        fs::write(&file, "").unwrap();
        at(file.join("_data")).has_left().unwrap_err();
    }

    #[test]
    fn a_volume_that_is_not_as_it_must_be_does_not_come() {
        let mut offered = volume(LOCAL, &json!({})).unwrap().describe();
        let (names, copied) = (["data".to_owned()], ["/v/data/_data"]);
        check_offered(&offered, &names, &copied).unwrap();
        let refused = |names: &[String], copied: &[&str]| {
            let refused = check_offered(&offered, names, copied);
            refused.unwrap_err().to_string()
        };
        assert!(refused(&[], &copied).contains("none of the container's"));
        assert!(refused(&names, &["/v"]).contains("without its contents"));
        offered
            .options
            .insert("device".to_owned(), "/etc".to_owned());
        let mounted = check_offered(&offered, &names, &copied).unwrap_err();
        assert!(mounted.text().contains("option device"), "{mounted}");
    }

    #[test]
    fn a_volume_on_shared_storage_must_be_podmans_at_the_target_too() {
        let source = Path::new("/v/data/_data");
        is_shared("data", Some(source), &[source]).unwrap();
        let elsewhere = is_shared("data", Some(Path::new("/w/_data")), &[source]).unwrap_err();
        assert!(elsewhere.contains("/w/_data"), "{elsewhere}");
        let none = is_shared("data", None, &[source]).unwrap_err();
        assert!(none.contains("podman volume create data"), "{none}");
    }

    #[test]
    fn only_the_one_that_was_made_here_goes_again_and_nothing_of_anybody() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("_data");
        let here = |created: &str| -> Inspected {
            let found = json!({
                "Name": "data", "Driver": LOCAL, "Mountpoint": path, "CreatedAt": created,
            });
            serde_json::from_value(found).unwrap()
        };
        fs::create_dir(&path).unwrap();
        let made = Made {
            name: "data".to_owned(),
            path: path.clone(),
            created: "2026-11-29T12:00:00.1Z".to_owned(),
            folder: identity_of(&path).unwrap(),
        };
        // What podman has copied there from the image.
        fs::write(path.join("of the image"), "").unwrap();
        assert_eq!(made.may_go(&here(&made.created)), Ok(true));
        fs::remove_dir_all(&path).unwrap();
        assert_eq!(made.may_go(&here(&made.created)), Ok(true));
        fs::create_dir(&path).unwrap();
        assert_eq!(made.may_go(&here(&made.created)), Ok(true));
        // Made again by somebody, with nothing in it yet.
        assert_eq!(made.may_go(&here("2026-11-29T12:00:00.2Z")), Ok(false));
        made.may_go(&here("")).unwrap_err();
        fs::write(path.join("kept"), "").unwrap();
        let why = made.may_go(&here(&made.created)).unwrap_err();
        assert!(why.contains("is not empty"), "{why}");
    }
}
