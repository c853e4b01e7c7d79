//! What podman exports: a tar file, of which one entry says what the container is.
//!
//! A container that comes is not started by anybody but us, whatever becomes of the node: so podman
//! never reads there that it is to be. Its policy comes beside it.

use std::io::{self, Read};
use std::path::{Component, Path};

use serde_json::{Map, Value};
use tar::{Archive, Builder, Entry, EntryType};

/// The entry: podman's own record.
pub const CONFIG: &str = "config.dump";

/// Its named volumes there, and what each is called.
const VOLUMES: &str = "namedVolumes";
const VOLUME_NAME: &str = "volumeName";

/// What the container has printed. While podman copies it, it grows, and podman may leave out what
/// comes behind it.
const LOG: &str = "ctr.log";

/// The last that podman writes, in a folder.
const INVENTORY: &str = "inventory.img";

/// When it is started again, and how often.
const POLICY: [&str; 2] = ["restart_policy", "restart_retries"];

/// The archive, without a policy, and without what the container has printed: that stays where it
/// is, and may be as long as it likes.
pub fn without_policy(archive: impl Read) -> io::Result<Vec<u8>> {
    let mut written = Builder::new(Vec::new());
    let mut exported = Archive::new(archive);
    for entry in exported.entries()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        if is_called(&path, LOG) {
            continue;
        }
        let mut header = entry.header().clone();
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes)?;
        if is_config(&path) {
            let mut config: Map<String, Value> = serde_json::from_slice(&bytes)?;
            POLICY.iter().for_each(|name| drop(config.remove(*name)));
            bytes = serde_json::to_vec(&config)?;
            header.set_size(bytes.len() as u64);
        }
        written.append_data(&mut header, path, &bytes[..])?;
    }
    written.into_inner()
}

/// Whether podman has written it to its end.
pub fn is_whole(archive: &[u8]) -> io::Result<bool> {
    for entry in Archive::new(archive).entries()? {
        if entry?
            .path()?
            .file_name()
            .is_some_and(|name| name == INVENTORY)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// An entry of the archive, if it is in it.
pub fn entry(archive: &[u8], name: &str) -> Result<Option<Vec<u8>>, String> {
    let text = |error: io::Error| error.to_string();
    for entry in Archive::new(archive).entries().map_err(text)? {
        let mut entry = entry.map_err(text)?;
        if is_called(&entry.path().map_err(text)?, name) {
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).map_err(text)?;
            return Ok(Some(bytes));
        }
    }
    Ok(None)
}

/// Whether it is an archive of the container `id`, without a policy, and nothing in it leads
/// elsewhere; else what is wrong with it. Answers with the names of the volumes that it has.
pub fn check(archive: &[u8], id: &str) -> Result<Vec<String>, String> {
    let mut configs = Vec::new();
    let mut archive = Archive::new(archive);
    let entries = archive.entries().map_err(|error| error.to_string())?;
    for entry in entries {
        configs.extend(check_entry(entry, id)?);
    }
    let times = configs.len();
    match (configs.pop(), times) {
        (Some(volumes), 1) => Ok(volumes),
        _ => Err(format!("{CONFIG} is in it {times} times")),
    }
}

/// The names of the volumes, if it is the one that has them.
fn check_entry(
    entry: io::Result<Entry<'_, &[u8]>>,
    id: &str,
) -> Result<Option<Vec<String>>, String> {
    let text = |error: io::Error| error.to_string();
    let mut entry = entry.map_err(text)?;
    let path = entry.path().map_err(text)?.into_owned();
    let plain = |part| matches!(part, Component::CurDir | Component::Normal(_));
    let kind = entry.header().entry_type();
    if !path.components().all(plain) || !matches!(kind, EntryType::Regular | EntryType::Directory) {
        return Err(format!("{} is not what podman writes", path.display()));
    }
    if !is_config(&path) {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    entry.read_to_end(&mut bytes).map_err(text)?;
    let config: Map<String, Value> =
        serde_json::from_slice(&bytes).map_err(|error| format!("{CONFIG}: {error}"))?;
    if config.get("id").and_then(Value::as_str) != Some(id) {
        return Err(format!("{CONFIG} is that of another container"));
    }
    match POLICY.iter().find(|name| config.contains_key(**name)) {
        Some(name) => Err(format!("{CONFIG} has a {name}, which comes beside it")),
        None => volumes(&config).map(Some),
    }
}

fn volumes(config: &Map<String, Value>) -> Result<Vec<String>, String> {
    let all = match config.get(VOLUMES) {
        None | Some(Value::Null) => &[][..],
        Some(Value::Array(all)) => all,
        Some(_) => return Err(format!("{CONFIG} has {VOLUMES} that are none")),
    };
    let name = |volume: &Value| volume.get(VOLUME_NAME)?.as_str().map(str::to_owned);
    let names = all.iter().map(name).collect::<Option<Vec<_>>>();
    names.ok_or_else(|| format!("{CONFIG} has {VOLUMES} without a name"))
}

fn is_config(path: &Path) -> bool {
    is_called(path, CONFIG)
}

fn is_called(path: &Path, name: &str) -> bool {
    let mut parts = path.components().filter(|part| *part != Component::CurDir);
    parts.next() == Some(Component::Normal(name.as_ref())) && parts.next().is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use tar::Header;

    fn archive(entries: &[(&str, Value)]) -> Vec<u8> {
        let mut written = Builder::new(Vec::new());
        for (path, value) in entries {
            let bytes = value.to_string().into_bytes();
            let mut header = Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o600);
            written.append_data(&mut header, path, &bytes[..]).unwrap();
        }
        written.into_inner().unwrap()
    }

    #[test]
    fn a_container_comes_without_a_policy() {
        let config = json!({
            "id": "a1", "restart_policy": "always", "restart_retries": 3, "stopTimeout": 10,
            "createdTime": "2026-11-29T12:00:00Z", "shmSize": 65_536_000_u64,
        });
        let exported = archive(&[("spec.dump", json!({"ociVersion": "1"})), (CONFIG, config)]);
        let refused = check(&exported, "a1").unwrap_err();
        assert!(refused.contains("restart_policy"), "{refused}");
        let sent = without_policy(&exported[..]).unwrap();
        check(&sent, "a1").unwrap();
        assert!(
            check(&sent, "a2")
                .unwrap_err()
                .contains("another container")
        );
        let text = String::from_utf8_lossy(&sent).into_owned();
        assert!(text.contains("stopTimeout") && text.contains("65536000") && text.contains("oci"));
    }

    #[test]
    fn what_it_has_printed_stays_and_an_archive_that_ends_behind_that_is_none() {
        let whole = archive(&[
            (CONFIG, json!({"id": "a1"})),
            (LOG, json!("2026-11-29T12:00:00Z stdout F PONG")),
            ("checkpoint/inventory.img", json!(null)),
        ]);
        let sent = without_policy(&whole[..]).unwrap();
        check(&sent, "a1").unwrap();
        assert!(is_whole(&sent).unwrap());
        assert!(!String::from_utf8_lossy(&sent).contains("PONG"));
        // As podman leaves it: without what comes behind the log, or in the middle of that.
        let cut = archive(&[(CONFIG, json!({"id": "a1"})), (LOG, json!("PONG"))]);
        assert!(!is_whole(&without_policy(&cut[..]).unwrap()).unwrap());
        let log = cut.len() - 2 * 512 - 512;
        assert!(without_policy(&cut[..log]).is_err());
    }

    #[test]
    fn what_podman_does_not_write_is_refused() {
        let config = json!({"id": "a1"});
        assert!(check(b"no tar at all", "a1").is_err());
        assert!(check(&archive(&[("spec.dump", json!({}))]), "a1").is_err());
        let twice = [(CONFIG, config.clone()), ("./config.dump", config.clone())];
        assert!(
            check(&archive(&twice), "a1")
                .unwrap_err()
                .contains("2 times")
        );
        let with = |volumes: Value| archive(&[(CONFIG, json!({"id": "a1", VOLUMES: volumes}))]);
        let named = check(&with(json!([{VOLUME_NAME: "data", "dest": "/data"}])), "a1");
        assert_eq!(named, Ok(vec!["data".to_owned()]));
        assert_eq!(check(&with(Value::Null), "a1"), Ok(Vec::new()));
        for odd in [json!({"data": {}}), json!([{"dest": "/data"}])] {
            assert!(check(&with(odd), "a1").unwrap_err().contains(VOLUMES));
        }
        let linked = check(&archive_of_link(), "a1").unwrap_err();
        assert!(linked.contains("not what podman writes"), "{linked}");
    }

    fn archive_of_link() -> Vec<u8> {
        let mut written = Builder::new(Vec::new());
        let mut header = Header::new_gnu();
        header.set_entry_type(EntryType::Symlink);
        header.set_size(0);
        written
            .append_link(&mut header, "checkpoint", "/etc")
            .unwrap();
        written.into_inner().unwrap()
    }
}
