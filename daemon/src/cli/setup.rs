//! `pageferry setup containerd`: what containers that come are started by, put where they name it;
//! and with more around it [`kubernetes`].
//!
//! A container names the program for its whole life, so that it is not where packages put theirs,
//! and is removed only when nobody names it.

mod handler;
pub mod kubernetes;
mod network;

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pageferry_containerd::{Client, ClientError, Container, SOCKET};
use pageferry_oci::INSTALLED;

/// Why it is not set up, or not undone.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The program that is to be put there is not beside this one.
    #[error("cannot read {}: it is to be where pageferry is", path.display())]
    Program {
        /// The program.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be made or removed.
    #[error("{action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// It is missing, or that of another build.
    #[error("{INSTALLED} is {what}: run `pageferry setup containerd`")]
    Differs {
        /// What is wrong with it.
        what: &'static str,
    },
    /// containerd cannot be asked.
    #[error(transparent)]
    Containerd(#[from] ClientError),
    /// Containers name the program.
    #[error(
        "{INSTALLED} stays: containerd starts it for {}; remove these containers first",
        containers.join(", ")
    )]
    Named {
        /// Their names.
        containers: Vec<String>,
    },
    /// Pods have addresses that only the program for them knows of.
    #[error(
        "pods that have moved still have their addresses, as {} say: delete them first, or \
         `pageferry-ipam release` what is left of them",
        addresses.join(", ")
    )]
    Addresses {
        /// The files.
        addresses: Vec<String>,
    },
    /// containerd's configuration is none that the handler can be added to.
    #[error(transparent)]
    Handler(#[from] handler::Unfit),
    /// Something is not there, or does not work.
    #[error("{0}")]
    Missing(String),
}

/// How long containerd may take to list its containers.
const LIST_MAX: Duration = Duration::from_secs(20);

/// Puts the program there, in the place of one of another build.
pub fn install() -> Result<String, SetupError> {
    put_program()?;
    check()
}

fn put_program() -> Result<(), SetupError> {
    let program = program()?;
    let installed = Path::new(INSTALLED);
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| SetupError::File {
            action,
            path,
            source,
        }
    };
    if let Some(folder) = installed.parent() {
        let made = fs::create_dir_all(folder);
        made.map_err(failed("cannot create", folder))?;
    }
    // Whoever starts it meanwhile starts the old one or the new one.
    let part = installed.with_extension("new");
    let written = fs::write(&part, program)
        .and_then(|()| fs::set_permissions(&part, fs::Permissions::from_mode(0o755)))
        .and_then(|()| fs::rename(&part, installed));
    written.map_err(failed("cannot write", installed))
}

/// Whether it is there, and containerd answers.
pub fn check() -> Result<String, SetupError> {
    let program = program()?;
    match fs::read(INSTALLED) {
        Ok(installed) if installed == program => {}
        Ok(_) => {
            let what = "that of another build";
            return Err(SetupError::Differs { what });
        }
        Err(_) => return Err(SetupError::Differs { what: "missing" }),
    }
    let named = named()?;
    Ok(match named.len() {
        0 => format!("{INSTALLED} is there; no container of containerd names it"),
        _ => format!(
            "{INSTALLED} is there; containerd starts it for {}",
            named.join(", ")
        ),
    })
}

/// Takes it away, unless a container names it.
pub fn remove() -> Result<String, SetupError> {
    let containers = match Path::new(SOCKET).exists() {
        true => named()?,
        // Without containerd nobody can be asked, and nobody starts it.
        false => Vec::new(),
    };
    if !containers.is_empty() {
        return Err(SetupError::Named { containers });
    }
    match fs::remove_file(INSTALLED) {
        Ok(()) => Ok(format!("{INSTALLED} is removed")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Ok(format!("{INSTALLED} was not there"))
        }
        Err(source) => Err(SetupError::File {
            action: "cannot remove",
            path: INSTALLED.into(),
            source,
        }),
    }
}

/// The program as it was built with this one.
fn program() -> Result<Vec<u8>, SetupError> {
    let own = std::env::current_exe().unwrap_or_default();
    let path = own.with_file_name("pageferry-oci");
    fs::read(&path).map_err(|source| SetupError::Program { path, source })
}

/// Containers of all namespaces that name it.
fn named() -> Result<Vec<String>, SetupError> {
    let named = pageferry_containerd::with((SOCKET.as_ref(), ANY), LIST_MAX, async |client| {
        let mut named = Vec::new();
        for namespace in client.namespaces().await? {
            named.extend(named_in(&client, &namespace).await?);
        }
        Ok(named)
    });
    Ok(named?)
}

async fn named_in(client: &Client, namespace: &str) -> Result<Vec<String>, ClientError> {
    let all = client.within(namespace)?.containers().await?;
    let naming = all
        .iter()
        .filter(|container| container.program() == INSTALLED);
    let name = |container: &Container| {
        let label = |name: &str| container.labels().get(name);
        let pod = label("io.kubernetes.pod.namespace").zip(label("io.kubernetes.pod.name"));
        match pod {
            Some((namespace, pod)) => format!("pod {namespace}/{pod}"),
            None => format!("containerd/{namespace}/{}", container.id()),
        }
    };
    let mut names: Vec<String> = naming.map(name).collect();
    names.sort();
    // A pod has a sandbox, too.
    names.dedup();
    Ok(names)
}

/// Some namespace: to list them, one must be in one.
const ANY: &str = "default";
