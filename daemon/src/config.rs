//! What `pageferryd` runs with: the configuration file and the flags, resolved once, at start.
//!
//! Two stages. [`crate::args`] and the TOML parser say what was written; [`Config::load`] puts
//! both together with the defaults, and what comes out needs no further checks: names are
//! names, limits are within their ranges, paths are absolute. There is no `Default`.
//!
//! Unknown keys are refused, with the nearest known one: a misspelt limit that is silently
//! ignored is worse than a daemon that does not start. An error always names its key, as
//! `section.key`.
//!
//! Absent: reading again while running. Change the file and restart; migrations survive it.

use std::collections::BTreeMap;
use std::error::Error;
use std::io;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use pageferry_proto::id::NodeName;
use pageferry_proto::migration::policy::ROUNDS_LIMIT;
use toml::{Table, Value};

use self::parking::Parking;
use self::units::{Bytes, Span};
use crate::args::DaemonArgs;
use crate::net::tls::TlsFiles;

pub mod parking;
pub mod units;

/// Everything a daemon is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// This node.
    pub node: NodeName,
    /// UDP address peers dial.
    pub listen: SocketAddr,
    /// Folder for what must survive a reboot.
    pub state_dir: PathBuf,
    /// Folder for sockets and images.
    pub run_dir: PathBuf,
    /// Certificates and key.
    pub tls: TlsFiles,
    /// Nodes that may connect, and where each is dialled. Never this node.
    pub peers: BTreeMap<NodeName, SocketAddr>,
    /// Bridge whose ports the links of workloads become.
    pub bridge: Option<String>,
    /// How what comes for a workload that stands still is kept.
    pub parking: Parking,
    /// Whether workloads may leave this node, or come to it, before all their memory is there.
    pub postcopy: bool,
    /// The criu to run: a path, or a name to look for in `PATH`.
    pub criu: PathBuf,
    /// Library preloaded into criu.
    pub view_library: PathBuf,
    /// What container runtimes are to find as criu.
    pub stand_in: PathBuf,
    /// Whether a process that outlives criu traces the workload for it in a dump.
    pub tracer: bool,
    /// The pager to run.
    pub pager: PathBuf,
    /// What this node does at most.
    pub limits: Limits,
    /// What a migration does unless it is told otherwise.
    pub migrate: MigrateDefaults,
}

/// What a node does at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Workloads arriving at the same time, 1 to 64.
    pub incoming_max: usize,
    /// Workloads leaving at the same time, 1 to 64.
    pub outgoing_max: usize,
    /// QUIC connections per migration, 1 to 8.
    pub lanes: u8,
    /// Bytes of one workload's memory that may be copied inside the freeze, unless forced.
    pub eager_memory_max: u64,
}

/// What a migration does unless it is told otherwise.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateDefaults {
    /// Downtime to aim for; above zero.
    pub downtime_max: Duration,
    /// Pre-copy rounds before the freeze comes whatever it costs, 1 to 10 000.
    pub rounds_max: u32,
    /// Time until a migration that is not committed is aborted; above zero.
    pub timeout: Duration,
    /// How long a workload may stand still before the commit; none: by prediction. Above zero.
    pub frozen_max: Option<Duration>,
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is not TOML.
    #[error("configuration file {} is not TOML", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A key nobody knows.
    #[error("configuration key {key} is not known{}", suggestion(nearest.as_deref()))]
    UnknownKey {
        /// The key, with its section.
        key: String,
        /// A known one that it may have been meant to be.
        nearest: Option<String>,
    },
    /// A key without a default is missing.
    #[error("configuration key {key} is missing: set it in the file, or give {flag}")]
    Missing {
        /// The key.
        key: &'static str,
        /// The flag that sets it.
        flag: &'static str,
    },
    /// A value has the wrong type.
    #[error("configuration key {key} must be {wanted}, and is {found}")]
    Type {
        /// The key.
        key: String,
        /// What it must be.
        wanted: &'static str,
        /// What it is.
        found: &'static str,
    },
    /// A value cannot be read.
    #[error("configuration key {key} has a wrong value")]
    Value {
        /// The key.
        key: String,
        /// Why.
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    /// A number is outside its range.
    #[error("configuration key {key} must be {min} to {max}, and is {found}")]
    Range {
        /// The key.
        key: String,
        /// The smallest number allowed.
        min: u64,
        /// The largest.
        max: u64,
        /// What was given.
        found: i64,
    },
    /// A span of time is zero.
    #[error("configuration key {key} must be above zero")]
    Zero {
        /// The key.
        key: &'static str,
    },
    /// A folder is relative, and the daemon's own folder is nobody's business.
    #[error("configuration key {key} must be an absolute path, and is {}", path.display())]
    Relative {
        /// The key.
        key: &'static str,
        /// The path.
        path: PathBuf,
    },
    /// A peer is listed twice, or is this node.
    #[error("configuration key peer.name: {name} is {what}")]
    Peer {
        /// The name.
        name: NodeName,
        /// What is wrong with it.
        what: &'static str,
    },
}

impl Config {
    /// Reads the file the flags name, or the usual one if it exists, and resolves everything.
    pub fn load(args: &DaemonArgs) -> Result<Self, ConfigError> {
        let path = args.config.as_deref().unwrap_or(Path::new(CONFIG_PATH));
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && args.config.is_none() => {
                String::new()
            }
            Err(source) => {
                let path = path.to_owned();
                return Err(ConfigError::Read { path, source });
            }
        };
        let table = text.parse().map_err(|source| ConfigError::Syntax {
            path: path.to_owned(),
            source: Box::new(source),
        })?;
        let beside = std::env::current_exe()
            .ok()
            .and_then(|path| Some(path.parent()?.to_owned()))
            .unwrap_or_else(|| PathBuf::from("/usr/bin"));
        Self::resolve(table, args, &beside)
    }

    /// Puts a file's contents, flags and defaults together. `beside` is the folder of the
    /// running program, where the pager is if nobody says otherwise.
    pub fn resolve(file: Table, args: &DaemonArgs, beside: &Path) -> Result<Self, ConfigError> {
        let mut root = Section::root(file);
        let mut tls = root.section("tls")?;
        let mut network = root.section("network")?;
        let mut criu = root.section("criu")?;
        let mut pager = root.section("pager")?;
        let node = required(&args.node, root.parsed("node")?, "node", "--node")?;
        let path = |flag: &Option<PathBuf>, file: Option<PathBuf>, default: &str| {
            flag.clone().or(file).unwrap_or_else(|| default.into())
        };
        let config = Self {
            listen: required(&args.listen, root.parsed("listen")?, "listen", "--listen")?,
            state_dir: absolute(
                "state_dir",
                path(&args.state_dir, root.path("state_dir")?, STATE_DIR),
            )?,
            run_dir: absolute(
                "run_dir",
                path(&args.run_dir, root.path("run_dir")?, RUN_DIR),
            )?,
            tls: TlsFiles {
                authority: path(&args.tls_ca, tls.path("ca")?, TLS_CA),
                certificate: path(
                    &args.tls_certificate,
                    tls.path("certificate")?,
                    TLS_CERTIFICATE,
                ),
                key: path(&args.tls_key, tls.path("key")?, TLS_KEY),
            },
            peers: peers(&mut root, args, &node)?,
            bridge: args.bridge.clone().or(network.string("bridge")?),
            parking: args
                .parking
                .or(network.parsed("parking")?)
                .unwrap_or(Parking::Auto),
            postcopy: args.postcopy.or(root.boolean("postcopy")?).unwrap_or(false),
            criu: path(&args.criu, criu.path("path")?, CRIU),
            view_library: path(
                &args.criu_view_library,
                criu.path("view_library")?,
                VIEW_LIBRARY,
            ),
            stand_in: args
                .criu_stand_in
                .clone()
                .or(criu.path("stand_in")?)
                .unwrap_or_else(|| beside.join("pageferry-criu")),
            tracer: args.criu_tracer.or(criu.boolean("tracer")?).unwrap_or(true),
            pager: args
                .pager
                .clone()
                .or(pager.path("path")?)
                .unwrap_or_else(|| beside.join("pageferry-pager")),
            limits: limits(root.section("limits")?, args)?,
            migrate: migrate(root.section("migrate")?, args)?,
            node,
        };
        for section in [root, tls, network, criu, pager] {
            section.finish()?;
        }
        Ok(config)
    }

    /// The socket of the control API.
    pub fn api_socket(&self) -> PathBuf {
        self.run_dir.join("api.sock")
    }

    /// The folder of the journals.
    pub fn journal_dir(&self) -> PathBuf {
        self.state_dir.join("journal")
    }

    /// The folder of what is known of folders that travel.
    pub fn folders_dir(&self) -> PathBuf {
        self.state_dir.join("folders")
    }
}

fn limits(mut file: Section, args: &DaemonArgs) -> Result<Limits, ConfigError> {
    let mut count = |key, flag: Option<u32>, range: RangeInclusive<u32>, default: u32| {
        let value = flag.map(i64::from).or(file.integer(key)?);
        in_range(&format!("limits.{key}"), value, range, default)
    };
    let incoming_max = count("incoming_max", args.incoming_max, 1..=64, 4)?;
    let outgoing_max = count("outgoing_max", args.outgoing_max, 1..=64, 4)?;
    let lanes = count("lanes", args.lanes, 1..=LANES_MAX, 2)?;
    let eager_memory_max = args.eager_memory_max.or(file.parsed("eager_memory_max")?);
    file.finish()?;
    Ok(Limits {
        incoming_max: incoming_max as usize,
        outgoing_max: outgoing_max as usize,
        lanes: u8::try_from(lanes).expect("at most LANES_MAX"),
        eager_memory_max: eager_memory_max.map_or(256 << 20, |Bytes(bytes)| bytes),
    })
}

fn migrate(mut file: Section, args: &DaemonArgs) -> Result<MigrateDefaults, ConfigError> {
    let downtime_max = args.downtime_max.or(file.parsed("downtime_max")?);
    let timeout = args.timeout.or(file.parsed("timeout")?);
    let frozen_max = args.frozen_max.or(file.parsed("frozen_max")?);
    let rounds_max = args
        .rounds_max
        .map(i64::from)
        .or(file.integer("rounds_max")?);
    file.finish()?;
    let above_zero = |key, span: Option<Span>| match span {
        None => Ok(None),
        Some(Span(Duration::ZERO)) => Err(ConfigError::Zero { key }),
        Some(Span(duration)) => Ok(Some(duration)),
    };
    Ok(MigrateDefaults {
        downtime_max: above_zero("migrate.downtime_max", downtime_max)?
            .unwrap_or(Duration::from_millis(300)),
        rounds_max: in_range("migrate.rounds_max", rounds_max, 1..=ROUNDS_LIMIT, 30)?,
        timeout: above_zero("migrate.timeout", timeout)?.unwrap_or(Duration::from_secs(3600)),
        frozen_max: above_zero("migrate.frozen_max", frozen_max)?,
    })
}

/// Peers of the file, then those of the flags, which win.
fn peers(
    root: &mut Section,
    args: &DaemonArgs,
    node: &NodeName,
) -> Result<BTreeMap<NodeName, SocketAddr>, ConfigError> {
    let mut peers = BTreeMap::new();
    for mut peer in root.sections("peer")? {
        let name: NodeName = required(&None, peer.parsed("name")?, "peer.name", "--peer")?;
        let address = required(&None, peer.parsed("address")?, "peer.address", "--peer")?;
        peer.finish()?;
        if peers.insert(name.clone(), address).is_some() {
            let what = "listed twice";
            return Err(ConfigError::Peer { name, what });
        }
    }
    peers.extend(args.peers.iter().cloned());
    if peers.contains_key(node) {
        return Err(ConfigError::Peer {
            name: node.clone(),
            what: "this node itself",
        });
    }
    Ok(peers)
}

fn required<T: Clone>(
    flag: &Option<T>,
    file: Option<T>,
    key: &'static str,
    flag_name: &'static str,
) -> Result<T, ConfigError> {
    flag.clone().or(file).ok_or(ConfigError::Missing {
        key,
        flag: flag_name,
    })
}

fn absolute(key: &'static str, path: PathBuf) -> Result<PathBuf, ConfigError> {
    match path.is_absolute() {
        true => Ok(path),
        false => Err(ConfigError::Relative { key, path }),
    }
}

fn in_range(
    key: &str,
    value: Option<i64>,
    range: RangeInclusive<u32>,
    default: u32,
) -> Result<u32, ConfigError> {
    let Some(found) = value else {
        return Ok(default);
    };
    u32::try_from(found)
        .ok()
        .filter(|number| range.contains(number))
        .ok_or_else(|| ConfigError::Range {
            key: key.to_owned(),
            min: u64::from(*range.start()),
            max: u64::from(*range.end()),
            found,
        })
}

/// A table of the file, from which keys are taken; what is left at the end is unknown.
struct Section {
    name: String,
    table: Table,
    known: Vec<&'static str>,
}

impl Section {
    fn root(table: Table) -> Self {
        Self {
            name: String::new(),
            table,
            known: Vec::new(),
        }
    }

    fn take(&mut self, key: &'static str) -> Option<Value> {
        self.known.push(key);
        self.table.remove(key)
    }

    fn key(&self, key: &str) -> String {
        match self.name.as_str() {
            "" => key.to_owned(),
            section => format!("{section}.{key}"),
        }
    }

    fn mismatch(&self, key: &str, wanted: &'static str, found: &Value) -> ConfigError {
        ConfigError::Type {
            key: self.key(key),
            wanted,
            found: found.type_str(),
        }
    }

    fn string(&mut self, key: &'static str) -> Result<Option<String>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(self.mismatch(key, "a string", &other)),
        }
    }

    /// An empty path is the default, as the example file writes it.
    fn path(&mut self, key: &'static str) -> Result<Option<PathBuf>, ConfigError> {
        let text = self.string(key)?;
        Ok(text.filter(|text| !text.is_empty()).map(PathBuf::from))
    }

    fn parsed<T: FromStr<Err: Error + Send + Sync + 'static>>(
        &mut self,
        key: &'static str,
    ) -> Result<Option<T>, ConfigError> {
        let Some(text) = self.string(key)? else {
            return Ok(None);
        };
        text.parse().map(Some).map_err(|source| ConfigError::Value {
            key: self.key(key),
            source: Box::new(source),
        })
    }

    fn boolean(&mut self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Boolean(value)) => Ok(Some(value)),
            Some(other) => Err(self.mismatch(key, "true or false", &other)),
        }
    }

    fn integer(&mut self, key: &'static str) -> Result<Option<i64>, ConfigError> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Integer(number)) => Ok(Some(number)),
            Some(other) => Err(self.mismatch(key, "an integer", &other)),
        }
    }

    fn section(&mut self, key: &'static str) -> Result<Self, ConfigError> {
        let table = match self.take(key) {
            None => Table::new(),
            Some(Value::Table(table)) => table,
            Some(other) => return Err(self.mismatch(key, "a section [...]", &other)),
        };
        Ok(self.below(key, table))
    }

    fn sections(&mut self, key: &'static str) -> Result<Vec<Self>, ConfigError> {
        let values = match self.take(key) {
            None => Vec::new(),
            Some(Value::Array(values)) => values,
            Some(other) => return Err(self.mismatch(key, "sections [[...]]", &other)),
        };
        values
            .into_iter()
            .map(|value| match value {
                Value::Table(table) => Ok(self.below(key, table)),
                other => Err(self.mismatch(key, "sections [[...]]", &other)),
            })
            .collect()
    }

    fn below(&self, key: &str, table: Table) -> Self {
        Self {
            name: self.key(key),
            table,
            known: Vec::new(),
        }
    }

    fn finish(self) -> Result<(), ConfigError> {
        let Some(unknown) = self.table.keys().next() else {
            return Ok(());
        };
        let nearest = self
            .known
            .iter()
            .map(|known| (distance(unknown, known), known))
            .min()
            .filter(|(distance, known)| *distance <= known.len().div_ceil(3))
            .map(|(_, known)| self.key(known));
        Err(ConfigError::UnknownKey {
            key: self.key(unknown),
            nearest,
        })
    }
}

/// Insertions, deletions and replacements that make one word of another.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, from) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, to) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(from != *to);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

fn suggestion(nearest: Option<&str>) -> String {
    nearest.map_or_else(String::new, |nearest| format!(": did you mean {nearest}?"))
}

/// Read if no other file is named.
pub const CONFIG_PATH: &str = "/etc/pageferry/pageferryd.toml";

/// Where sockets are, for whoever looks for a daemon.
pub const RUN_DIR: &str = "/run/pageferry";

/// More connections than this help nobody: each costs a task, a socket and a window.
pub const LANES_MAX: u32 = 8;

const STATE_DIR: &str = "/var/lib/pageferry";
const TLS_CA: &str = "/etc/pageferry/ca.pem";
const TLS_CERTIFICATE: &str = "/etc/pageferry/node.pem";
const TLS_KEY: &str = "/etc/pageferry/node.key";
const CRIU: &str = "criu";
const VIEW_LIBRARY: &str = "/usr/lib/pageferry/libcriu_view.so";

#[cfg(test)]
#[path = "config/tests.rs"]
mod tests;
