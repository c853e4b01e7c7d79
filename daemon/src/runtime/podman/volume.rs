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

use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::container::VolumeDescription;
use serde::{Deserialize, Serialize};

use super::command::{podman_at_once, podman_with, told};

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

/// One of `podman volume inspect`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Inspected {
    name: String,
    driver: String,
    mountpoint: PathBuf,
    #[serde(default)]
    labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    options: Option<BTreeMap<String, String>>,
}

impl Volume {
    /// The volume that is called so, which the container `id` has; if it can move.
    pub fn of(name: &str, id: &str) -> Result<Self, Failure> {
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
        match users.lines().find(|user| *user != id) {
            Some(other) => Err(unfit(format!(
                "the container {other} has the volume {name}, too, which would leave with this one"
            ))),
            None => Ok(volume),
        }
    }

    fn fit(found: Inspected) -> Result<Self, Failure> {
        let Inspected {
            name,
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

    /// Removes it if its contents have left. Blocks, while podman answers.
    pub fn release(&self) {
        if self.path.exists() {
            return;
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

/// Refuses a volume of which podman has one here already.
pub fn check_free(volume: &VolumeDescription) -> Result<(), Failure> {
    let name = &*volume.name;
    match podman_at_once(["volume", "exists", name]) {
        Err(_) => Ok(()),
        Ok(_) => Err(Failure::new(
            ErrorCode::NameTaken,
            format!("podman has a volume {name} at the target already: remove it first"),
        )),
    }
}

/// Makes it, with nothing in it. One that is there is an error. Blocks, while podman answers.
pub fn make(volume: &VolumeDescription) -> Result<(), Failure> {
    let unfit = |text: String| Failure::new(ErrorCode::NodeUnfit, text);
    let mut words = vec!["volume".to_owned(), "create".to_owned()];
    for (name, values) in [("--label", &volume.labels), ("--opt", &volume.options)] {
        for (key, value) in values {
            words.extend([name.to_owned(), format!("{key}={value}")]);
        }
    }
    words.extend(["--".to_owned(), volume.name.clone()]);
    podman_with(words).map_err(|error| unfit(told(&error)))?;
    let here = inspect(&volume.name).map(|here| here.mountpoint);
    if here.as_deref() == Ok(Path::new(&volume.path)) {
        return Ok(());
    }
    drop(remove(&volume.name));
    Err(unfit(match here {
        Ok(here) => format!(
            "the target's podman has volumes at other paths than the source's: {} and not {}",
            here.display(),
            volume.path
        ),
        Err(why) => format!("the volume {}: {why}", volume.name),
    }))
}

/// Removes the volume that is called so, unless a container has it. Blocks, while podman answers.
pub fn remove(name: &str) -> Result<(), String> {
    if podman_at_once(["volume", "exists", name]).is_err() {
        return Ok(());
    }
    let removed = podman_at_once(["volume", "rm", "--", name]);
    removed.map(drop).map_err(|error| told(&error))
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
}
