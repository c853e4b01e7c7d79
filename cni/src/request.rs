//! One request of a network plugin: the environment, and the network's configuration on standard
//! input.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::failure::{CONFIG, DECODE, ENVIRONMENT, Failure, VERSION};
use crate::folders::{Folders, RUN, STATE, is_name};

/// What can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Add,
    Del,
    Check,
    Status,
    Gc,
    Version,
}

/// The environment of a request, as a delegate gets it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Environment {
    pub container: String,
    pub interface: String,
    pub namespace: String,
    pub arguments: String,
    /// Folders of programs, with colons between them.
    pub path: String,
}

/// What is asked, understood and checked.
#[derive(Debug)]
pub struct Request {
    pub(crate) verb: Verb,
    pub(crate) environment: Environment,
    pub(crate) config: Value,
    version: String,
    folders: Folders,
}

/// What this program speaks.
pub(crate) const VERSIONS: [&str; 2] = ["1.0.0", "1.1.0"];

impl Request {
    /// Reads a request: `variable` says what an environment variable is, `input` is what came on
    /// standard input.
    ///
    /// # Errors
    /// A request that the specification does not allow, by its code there.
    pub fn read(variable: impl Fn(&str) -> Option<String>, input: &[u8]) -> Result<Self, Failure> {
        let verb = verb(&variable("CNI_COMMAND").unwrap_or_default())?;
        let config: Value = serde_json::from_slice(input).map_err(|error| {
            Failure::new(
                DECODE,
                format!("standard input is no configuration: {error}"),
            )
        })?;
        let version = config["cniVersion"].as_str().unwrap_or_default().to_owned();
        let folder = |key: &str, usual: &str| -> PathBuf {
            config["ipam"][key].as_str().unwrap_or(usual).into()
        };
        let request = Self {
            verb,
            environment: Environment {
                container: variable("CNI_CONTAINERID").unwrap_or_default(),
                interface: variable("CNI_IFNAME").unwrap_or_default(),
                namespace: variable("CNI_NETNS").unwrap_or_default(),
                arguments: variable("CNI_ARGS").unwrap_or_default(),
                path: variable("CNI_PATH").unwrap_or_default(),
            },
            folders: Folders::new(folder("runDir", RUN), folder("stateDir", STATE)),
            version,
            config,
        };
        request.check()?;
        Ok(request)
    }

    fn check(&self) -> Result<(), Failure> {
        if self.verb == Verb::Version {
            return Ok(());
        }
        let least = match self.verb {
            Verb::Status | Verb::Gc => &VERSIONS[1..],
            _ => &VERSIONS[..],
        };
        if !least.contains(&self.version.as_str()) {
            let text = format!(
                "the configuration's cniVersion is {:?}: for this it must be {}",
                self.version,
                least.join(" or ")
            );
            return Err(Failure::new(VERSION, text));
        }
        let environment = &self.environment;
        let missing = |name: &str| Failure::new(ENVIRONMENT, format!("{name} is missing or wrong"));
        if matches!(self.verb, Verb::Add | Verb::Del | Verb::Check) {
            if !is_name(&environment.container) {
                return Err(missing("CNI_CONTAINERID"));
            }
            if !is_interface(&environment.interface) {
                return Err(missing("CNI_IFNAME"));
            }
        }
        if matches!(self.verb, Verb::Add | Verb::Check) && environment.namespace.is_empty() {
            return Err(missing("CNI_NETNS"));
        }
        if environment.path.is_empty() {
            return Err(missing("CNI_PATH"));
        }
        self.delegate_name().map(drop)
    }

    /// What the caller speaks.
    pub fn version(&self) -> &str {
        &self.version
    }

    pub(crate) fn folders(&self) -> &Folders {
        &self.folders
    }

    /// The delegate's part of the configuration.
    pub(crate) fn delegate(&self) -> &Value {
        &self.config["ipam"]["delegate"]
    }

    /// What the delegate is called.
    pub(crate) fn delegate_name(&self) -> Result<&str, Failure> {
        let name = self.delegate()["type"].as_str().unwrap_or_default();
        match is_name(name) {
            true => Ok(name),
            false => Err(Failure::new(
                CONFIG,
                "ipam.delegate.type is to name the program that has the range, such as host-local",
            )),
        }
    }

    /// The configuration as the delegate is to see it: its part in the place of ours.
    pub(crate) fn delegated(&self) -> Value {
        let mut config = self.config.clone();
        config["ipam"] = self.delegate().clone();
        config
    }

    /// The pod's namespace and name, if it is a pod.
    pub(crate) fn pod(&self) -> Option<(&str, &str)> {
        let namespace = self.argument("K8S_POD_NAMESPACE");
        namespace.zip(self.argument("K8S_POD_NAME"))
    }

    /// The pod's UID, where the runtime says it.
    pub(crate) fn pod_uid(&self) -> Option<&str> {
        self.argument("K8S_POD_UID").filter(|uid| !uid.is_empty())
    }

    fn argument(&self, name: &str) -> Option<&str> {
        let mut pairs = self.environment.arguments.split(';');
        pairs.find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
    }

    /// What the network plugin has of this attachment from when it was made.
    pub(crate) fn earlier(&self) -> Vec<Ipv4Addr> {
        addresses(&self.config["prevResult"])
    }
}

/// The addresses of a result. Those of version 6 are left out.
pub(crate) fn addresses(result: &Value) -> Vec<Ipv4Addr> {
    let all = result["ips"].as_array().into_iter().flatten();
    let texts = all.filter_map(|one| one["address"].as_str());
    let addresses = texts.filter_map(|text| text.split('/').next()?.parse().ok());
    addresses.collect()
}

fn verb(name: &str) -> Result<Verb, Failure> {
    Ok(match name {
        "ADD" => Verb::Add,
        "DEL" => Verb::Del,
        "CHECK" => Verb::Check,
        "STATUS" => Verb::Status,
        "GC" => Verb::Gc,
        "VERSION" => Verb::Version,
        _ => {
            let text = format!("CNI_COMMAND is {name:?}, which is nothing that can be asked for");
            return Err(Failure::new(ENVIRONMENT, text));
        }
    })
}

/// As the specification has it: what the kernel takes, and no colon.
fn is_interface(name: &str) -> bool {
    let wrong = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    !name.is_empty() && name.len() < 16 && ![".", ".."].contains(&name) && !name.contains(wrong)
}

/// The program of this name in folders with colons between them.
pub(crate) fn find(path: &str, program: &str) -> Option<PathBuf> {
    let folders = path.split(':').filter(|folder| !folder.is_empty());
    let mut places = folders.map(|folder| Path::new(folder).join(program));
    places.find(|place| place.is_file())
}
