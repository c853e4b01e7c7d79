//! The network of pods, in CNI's configuration: `pageferry-ipam` comes between its plugin and the
//! program that has the node's range, so that pods that move keep their addresses. Pure, but for
//! the file's place.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

/// The program that comes between.
pub const IPAM: &str = "pageferry-ipam";

/// The programs that it comes between: what it stands above keeps what it has given on disk.
const PLUGIN: &str = "bridge";
const DELEGATE: &str = "host-local";

/// What becomes of a configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// This is its new text.
    To(String),
    /// It is so already.
    None,
    /// It is one that stays as it is, and why: pods that come get other addresses, so that none
    /// with an address moves.
    Unfit(String),
}

/// The configuration that containerd takes: the first by its name.
pub fn find(folder: &Path) -> io::Result<Option<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        entries => entries?,
    };
    let paths = entries.map(|entry| entry.map(|entry| entry.path()));
    let mut paths = paths.collect::<io::Result<Vec<_>>>()?;
    paths.retain(|path| {
        let kind = path.extension().and_then(|kind| kind.to_str());
        matches!(kind, Some("conf" | "conflist" | "json"))
    });
    paths.sort();
    Ok(paths.into_iter().next())
}

/// Has the program come between.
pub fn wrap(text: &str) -> Change {
    changed(text, |ipam| match kind(ipam) {
        IPAM => Change::None,
        DELEGATE => {
            *ipam = json!({"type": IPAM, "delegate": ipam.take()});
            Change::To(String::new())
        }
        other => Change::Unfit(format!(
            "its addresses are given by {other:?}, and {IPAM} stands above {DELEGATE} alone"
        )),
    })
}

/// Takes the program out again.
pub fn unwrap(text: &str) -> Change {
    changed(text, |ipam| match kind(ipam) {
        IPAM => {
            *ipam = ipam["delegate"].take();
            Change::To(String::new())
        }
        _ => Change::None,
    })
}

fn kind(plugin: &Value) -> &str {
    plugin["type"].as_str().unwrap_or_default()
}

fn changed(text: &str, change: impl FnOnce(&mut Value) -> Change) -> Change {
    let mut network: Value = match serde_json::from_str(text) {
        Ok(network) => network,
        Err(error) => return Change::Unfit(format!("it is no JSON: {error}")),
    };
    let plugin = match network.get_mut("plugins") {
        Some(plugins) => plugins.get_mut(0),
        None => Some(&mut network),
    };
    let Some(plugin) = plugin else {
        return Change::Unfit("it has no plugins".to_owned());
    };
    let name = kind(plugin);
    if name != PLUGIN {
        return Change::Unfit(format!(
            "its links are made by {name:?}, and pods keep their addresses with {PLUGIN} alone"
        ));
    }
    let Some(ipam) = plugin.get_mut("ipam").filter(|ipam| ipam.is_object()) else {
        return Change::Unfit("nothing gives addresses in it".to_owned());
    };
    match change(ipam) {
        Change::To(_) => Change::To(format!("{network:#}\n")),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network(plugin: &str, ipam: &str) -> String {
        let ipam = json!({"type": ipam, "ranges": [[{"subnet": "10.244.1.0/24"}]]});
        let plugin = json!({"type": plugin, "bridge": "cni0", "ipam": ipam});
        json!({"cniVersion": "1.1.0", "name": "pods", "plugins": [plugin, {"type": "portmap"}]})
            .to_string()
    }

    #[test]
    fn the_program_comes_between_and_goes_again() {
        let before = network("bridge", "host-local");
        let Change::To(wrapped) = wrap(&before) else {
            panic!("it is fit");
        };
        let object: Value = serde_json::from_str(&wrapped).unwrap();
        let ipam = &object["plugins"][0]["ipam"];
        assert_eq!(ipam["type"], IPAM);
        assert_eq!(ipam["delegate"]["type"], "host-local");
        assert_eq!(object["plugins"][1]["type"], "portmap");
        assert_eq!(wrap(&wrapped), Change::None);
        let Change::To(unwrapped) = unwrap(&wrapped) else {
            panic!("it is in it");
        };
        let [now, then] = [&unwrapped, &before].map(|text| {
            let object: Value = serde_json::from_str(text).unwrap();
            object
        });
        assert_eq!(now, then);
        assert_eq!(unwrap(&unwrapped), Change::None);
        // One plugin alone is a network, too.
        let single = json!({"type": "bridge", "ipam": {"type": "host-local"}}).to_string();
        assert!(matches!(wrap(&single), Change::To(_)));
    }

    #[test]
    fn others_stay_as_they_are_and_it_is_said_why() {
        for (text, why) in [
            (network("calico", "calico-ipam"), "calico"),
            (network("bridge", "dhcp"), "dhcp"),
            ("{\"plugins\": []}".to_owned(), "no plugins"),
            ("{\"type\": \"bridge\"}".to_owned(), "addresses"),
            ("no".to_owned(), "no JSON"),
        ] {
            let Change::Unfit(said) = wrap(&text) else {
                panic!("{text}");
            };
            assert!(said.contains(why), "{said}");
        }
    }

    #[test]
    fn the_first_configuration_is_the_one() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(find(&folder.path().join("none")).unwrap(), None);
        for name in ["20-b.conflist", "10-a.conf", "05-readme.txt"] {
            fs::write(folder.path().join(name), "").unwrap();
        }
        let found = find(folder.path()).unwrap();
        assert_eq!(found, Some(folder.path().join("10-a.conf")));
    }
}
