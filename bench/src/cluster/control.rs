//! The control plane: etcd, the API server, the controller manager and the scheduler.
//!
//! They run in the network of the lab's client, as processes of this machine, and all they write is
//! in the lab's run folder. The API server is at the port of its own service, and the client has
//! that service's address: pods reach it without a kube-proxy.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use super::certificates::{Authority, Subject, key_pair, kubeconfig, write};
use super::wait::Hopeless;
use crate::lab::Lab;
use crate::lab::inside::Inside;
use crate::lab::network::CLIENT_ADDRESS;

/// One program of the cluster, at work.
#[derive(Debug)]
pub struct Part {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Part {
    /// Starts a command with a log of its own.
    pub fn start(name: &str, command: Inside, log: PathBuf) -> Result<Self> {
        let folder = log.parent().context("a log has a folder")?;
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
        let output = File::options().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("opening {}", log.display()))?;
        let command = command.stdin(Stdio::null()).stdout(output.try_clone()?);
        Ok(Self {
            name: name.to_owned(),
            child: command.stderr(output).spawn()?,
            log,
        })
    }

    /// # Errors
    /// [`Hopeless`] when it has ended.
    pub fn check(&mut self) -> Result<()> {
        match self.child.try_wait().context("watching a program")? {
            None => Ok(()),
            Some(status) => Err(Hopeless(format!(
                "{} ended: {status} (log: {})",
                self.name,
                self.log.display()
            ))
            .into()),
        }
    }
}

impl Part {
    /// `kill -9`.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill().context("killing a program")?;
        self.child.wait().context("reaping a program")?;
        Ok(())
    }

    /// As `kill` does by itself, and waits until it has ended.
    pub fn end(&mut self) -> Result<()> {
        let pid = self.child.id().cast_signed();
        kill(Pid::from_raw(pid), Signal::SIGTERM).context("ending a program")?;
        self.child.wait().context("reaping a program")?;
        Ok(())
    }
}

/// Makes what the control plane proves who it is with, and the administrator.
pub fn make_identities(folder: &Path, authority: &Authority) -> Result<()> {
    write(&folder.join("ca.pem"), &authority.certificate)?;
    let (public, private) = key_pair()?;
    write(&folder.join("accounts.pub"), &public)?;
    write(&folder.join("accounts.key"), &private)?;
    let server = Subject {
        name: "kube-apiserver",
        group: None,
        addresses: &[CLIENT_ADDRESS, SERVICE_ADDRESS, Ipv4Addr::LOCALHOST],
        hosts: &HOSTS,
    };
    authority.issue(&server)?.write(folder, "apiserver")?;
    for (file, name, group) in CLIENTS {
        let identity = authority.issue(&Subject::client(name, group))?;
        identity.write(folder, file)?;
        write_config(folder, file, &kubeconfig(&server_url(), folder, file))?;
    }
    Ok(())
}

fn write_config(folder: &Path, name: &str, config: &Value) -> Result<()> {
    write(&folder.join(format!("{name}.conf")), &config.to_string())
}

/// Where clients of the lab find the API server.
pub fn server_url() -> String {
    format!("https://{CLIENT_ADDRESS}:{PORT}")
}

/// Starts etcd and the API server.
pub fn start_server(lab: &Lab, folder: &Path, programs: &Path) -> Result<Vec<Part>> {
    let path = |name: &str| folder.join(name).display().to_string();
    let etcd = [
        ("data-dir", path("etcd")),
        ("listen-client-urls", ETCD.to_owned()),
        ("advertise-client-urls", ETCD.to_owned()),
        ("listen-peer-urls", ETCD_PEERS.to_owned()),
        // Nothing of it outlives the lab.
        ("unsafe-no-fsync", "true".to_owned()),
    ];
    Ok(vec![
        start(lab, programs, "etcd", &etcd)?,
        start_api_server(lab, folder, programs)?,
    ])
}

/// Starts the API server alone.
pub fn start_api_server(lab: &Lab, folder: &Path, programs: &Path) -> Result<Part> {
    let path = |name: &str| folder.join(name).display().to_string();
    let server = [
        ("etcd-servers", ETCD.to_owned()),
        ("advertise-address", CLIENT_ADDRESS.to_string()),
        ("secure-port", PORT.to_string()),
        ("cert-dir", path("apiserver")),
        ("tls-cert-file", path("apiserver.pem")),
        ("tls-private-key-file", path("apiserver.key")),
        ("client-ca-file", path("ca.pem")),
        ("kubelet-certificate-authority", path("ca.pem")),
        ("kubelet-client-certificate", path("kubelet-client.pem")),
        ("kubelet-client-key", path("kubelet-client.key")),
        // Nobody resolves the names of nodes.
        ("kubelet-preferred-address-types", "InternalIP".to_owned()),
        ("service-cluster-ip-range", SERVICES.to_owned()),
        ("service-account-issuer", format!("https://{}", HOSTS[0])),
        ("service-account-key-file", path("accounts.pub")),
        ("service-account-signing-key-file", path("accounts.key")),
        ("authorization-mode", "Node,RBAC".to_owned()),
        ("enable-admission-plugins", "NodeRestriction".to_owned()),
        ("allow-privileged", "true".to_owned()),
    ];
    start(lab, programs, "kube-apiserver", &server)
}

/// Starts what works on the objects of the API.
pub fn start_controllers(lab: &Lab, folder: &Path, programs: &Path) -> Result<Vec<Part>> {
    let path = |name: &str| folder.join(name).display().to_string();
    let mut manager = common(path("manager.conf"));
    manager.extend([
        ("use-service-account-credentials", "true".to_owned()),
        ("service-account-private-key-file", path("accounts.key")),
        ("root-ca-file", path("ca.pem")),
    ]);
    let scheduler = common(path("scheduler.conf"));
    Ok(vec![
        start(lab, programs, "kube-controller-manager", &manager)?,
        start(lab, programs, "kube-scheduler", &scheduler)?,
    ])
}

fn common(config: String) -> Vec<(&'static str, String)> {
    vec![
        ("authentication-kubeconfig", config.clone()),
        ("authorization-kubeconfig", config.clone()),
        ("kubeconfig", config),
        ("bind-address", Ipv4Addr::LOCALHOST.to_string()),
        // There is one of it.
        ("leader-elect", "false".to_owned()),
    ]
}

fn start(lab: &Lab, programs: &Path, name: &str, flags: &[(&str, String)]) -> Result<Part> {
    let program = programs.join(name).display().to_string();
    let flags = flags
        .iter()
        .map(|(flag, value)| format!("--{flag}={value}"));
    let command = Inside::new(&program)
        .args(flags)
        .cgroups(&lab.cgroups(CGROUP)?)
        .enter(&lab.client.net)?;
    let log = lab.folder.logs().join(CGROUP).join(format!("{name}.log"));
    Part::start(name, command, log)
}

/// The name of the control plane among the lab's cgroups and logs.
pub const CGROUP: &str = "control";
/// Addresses of services.
pub const SERVICES: &str = "10.96.0.0/16";
/// That of the API server, which is the first one.
pub const SERVICE_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
/// The administrator, by the name of his files.
pub const ADMINISTRATOR: &str = "admin";
/// That of the API server's service.
const PORT: u16 = 443;
const ETCD: &str = "http://127.0.0.1:2379";
const ETCD_PEERS: &str = "http://127.0.0.1:2380";
const HOSTS: [&str; 4] = [
    "kubernetes.default.svc",
    "kubernetes",
    "kubernetes.default",
    "kubernetes.default.svc.cluster.local",
];
/// Names of files, and the users and groups that the API server takes them for.
const CLIENTS: [(&str, &str, Option<&str>); 4] = [
    (ADMINISTRATOR, "lab-admin", Some("system:masters")),
    ("manager", "system:kube-controller-manager", None),
    ("scheduler", "system:kube-scheduler", None),
    // Kubelets let it run commands and read logs.
    ("kubelet-client", "kube-apiserver", Some("system:masters")),
];
