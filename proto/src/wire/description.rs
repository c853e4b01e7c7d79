//! What the target must know of a workload before it says that it takes it.
//!
//! A description is made once, before the first round, and nothing in it is a promise: the
//! target compares what it can (files, pids, versions) and prepares what it must (network).

use std::net::IpAddr;

use crate::id::SpaceId;
use crate::wire::container::ContainerDescription;
use crate::wire::control::{ControlError, missing, short};
use crate::wire::copied::{COPIED_PATHS_MAX, CopiedPath};
use crate::wire::cpu::CpuDescription;
use crate::wire::needs::Needs;
use crate::wire::party;
use crate::wire::schema;
use crate::wire::shared::{SHARED_PATHS_MAX, SharedPath};

/// Most spaces, and most pids and threads, of one workload: a tree of a few thousand processes
/// is the largest that CRIU is known to dump in reasonable time.
pub const SPACES_MAX: usize = 4096;
/// Most pids in a description.
pub const PIDS_MAX: usize = 1 << 16;
/// Most network links of a workload.
pub const LINKS_MAX: usize = 64;
/// Most addresses of a link.
pub const ADDRESSES_MAX: usize = 64;
/// Most routes of a workload.
pub const ROUTES_MAX: usize = 1024;
/// Most files that are mapped or open. The frame's limit of 1 MiB comes earlier for long paths.
pub const FILES_MAX: usize = 1 << 16;
/// Most mounts of the node that a workload sees in a mount namespace of its own.
pub const MOUNTS_MAX: usize = 256;
/// Longest path, in bytes: the kernel's PATH_MAX.
pub const PATH_BYTES_MAX: usize = 4096;
/// Longest name of a link, in bytes: the kernel's IFNAMSIZ without its final zero.
pub const LINK_NAME_BYTES_MAX: usize = 15;
/// Longest host name, domain name, kernel release or command name, in bytes: the kernel's
/// `__NEW_UTS_LEN`.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest build id, in bytes: a SHA-512; the usual SHA-1 has 20.
pub const BUILD_ID_BYTES_MAX: usize = 64;

/// A workload as the source sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkloadDescription {
    /// The pid of the tree's root in the source node's pid namespace.
    pub root_pid: i32,
    /// Its address spaces.
    pub spaces: Vec<SpaceDescription>,
    /// All its tasks and threads as the node's pid namespace sees them. Empty if the workload
    /// has a pid namespace of its own: then they are taken by nobody at the target.
    pub pids: Vec<i32>,
    /// The namespaces that are its own, not the node's.
    pub own_namespaces: Namespaces,
    /// Its host name.
    pub hostname: String,
    /// Its NIS domain name.
    pub domainname: String,
    /// Its network links, except the loopback.
    pub links: Vec<LinkDescription>,
    /// Its routes, except those that the kernel makes from addresses.
    pub routes: Vec<RouteDescription>,
    /// Files it has mapped or open.
    pub files: Vec<FileDescription>,
    /// Files and folders that the operator declares to be one storage at both nodes.
    pub shared: Vec<SharedPath>,
    /// Folders that travel along.
    pub copied: Vec<CopiedPath>,
    /// The boot id of the source's kernel: two nodes with the same one are one kernel.
    pub boot_id: [u8; 16],
    /// The source's processor; none if the operator wants it not compared.
    pub cpu: Option<CpuDescription>,
    /// CRIU's version at the source, as CRIU numbers it: 40201 is 4.2.1.
    pub criu_version: u32,
    /// Size of a page at the source, in bytes.
    pub page_size: u32,
    /// The source's kernel release.
    pub kernel_release: String,
    /// The working directory of the root.
    pub cwd: String,
    /// The root directory of the root.
    pub root: String,
    /// The mounts in its own mount namespace that show files of the node; the first is its root.
    /// Empty if it has the node's mount namespace.
    pub mounts: Vec<MountDescription>,
    /// The memory it needs, and the limits it keeps.
    pub needs: Needs,
    /// What it is to the container runtime that runs it, if one does.
    pub container: Option<ContainerDescription>,
    /// Of a party, the members after this one, which is the first. Theirs have no members, links,
    /// routes and processor, and are of the same boot.
    pub members: Vec<Self>,
    /// What its party calls it; empty if it is no party.
    pub member_name: String,
}

/// A mount in a mount namespace of the workload's own that shows files of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountDescription {
    /// Where it is in the workload; absolute.
    pub path: String,
    /// Where the node has what it shows, at the source and at the target alike; absolute.
    pub node_path: String,
    /// Whether that is a directory.
    pub directory: bool,
}

/// One address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SpaceDescription {
    /// Its leader's pid in the workload's pid namespace, and whose of a party that is.
    pub vpid: SpaceId,
    /// Its leader's command name.
    pub comm: String,
    /// Its threads in the workload's pid namespace.
    pub threads: Vec<i32>,
    /// Resident and swapped memory, in bytes.
    pub memory_bytes: u64,
}

/// A set of kinds of namespaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Namespaces(u32);

/// One network link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LinkDescription {
    /// Its name in the workload.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Its largest packet, in bytes.
    pub mtu: u32,
    /// Its addresses.
    pub addresses: Vec<LinkAddress>,
    /// The bridge that the link's other end is a port of at the source, if it is one.
    pub bridge: Option<String>,
}

/// An address and the length of its network's prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkAddress {
    /// The address.
    pub ip: IpAddr,
    /// Length of the prefix, in bits.
    pub prefix: u8,
}

/// One route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouteDescription {
    /// Where it leads: the default route has the unspecified address and prefix 0.
    pub destination: LinkAddress,
    /// The next hop, if there is one.
    pub gateway: Option<IpAddr>,
    /// The link's name in the workload.
    pub device: String,
    /// Its metric.
    pub metric: u32,
    /// The preferred source address, if there is one.
    pub source: Option<IpAddr>,
}

/// One file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileDescription {
    /// Its path at the node.
    pub path: String,
    /// Its length, in bytes.
    pub size: u64,
    /// Its ELF build id; empty if it has none.
    pub build_id: Vec<u8>,
    /// Whether the workload may write it.
    pub writable: bool,
    /// Its type and permissions, as `st_mode`.
    pub mode: u32,
    /// How it is used; a file that is both mapped and open counts as open.
    pub kind: FileUse,
    /// Whether the workload may write it through a shared mapping.
    pub mapped_shared: bool,
}

/// How a workload uses a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileUse {
    /// By a mapping.
    Mapped,
    /// By a descriptor.
    Open,
}

impl Namespaces {
    /// The network namespace.
    pub const NET: Self = Self(1 << 0);
    /// The host name namespace.
    pub const UTS: Self = Self(1 << 1);
    /// The System V IPC namespace.
    pub const IPC: Self = Self(1 << 2);
    /// The pid namespace.
    pub const PID: Self = Self(1 << 3);
    /// The mount namespace.
    pub const MNT: Self = Self(1 << 4);
    /// No namespace.
    pub const NONE: Self = Self(0);

    const ALL: u32 = (1 << 5) - 1;

    /// The set of both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` are in the set.
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// The set as bits of the wire.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The set with these bits; none if a bit has no meaning.
    pub const fn from_bits(bits: u32) -> Option<Self> {
        if bits & !Self::ALL == 0 {
            Some(Self(bits))
        } else {
            None
        }
    }
}

impl From<&WorkloadDescription> for schema::WorkloadDescription {
    fn from(description: &WorkloadDescription) -> Self {
        Self {
            root_pid: description.root_pid,
            spaces: description.spaces.iter().map(Into::into).collect(),
            pids: description.pids.clone(),
            own_namespaces: description.own_namespaces.bits(),
            hostname: description.hostname.clone(),
            domainname: description.domainname.clone(),
            links: description.links.iter().map(Into::into).collect(),
            routes: description.routes.iter().map(Into::into).collect(),
            files: description.files.iter().map(Into::into).collect(),
            shared: description.shared.iter().map(Into::into).collect(),
            copied: description.copied.iter().map(Into::into).collect(),
            boot_id: description.boot_id.to_vec(),
            cpu: description.cpu.as_ref().map(Into::into),
            criu_version: description.criu_version,
            page_size: description.page_size,
            kernel_release: description.kernel_release.clone(),
            cwd: description.cwd.clone(),
            root: description.root.clone(),
            mounts: description.mounts.iter().map(Into::into).collect(),
            needs: Some((&description.needs).into()),
            container: description.container.as_ref().map(Into::into),
            members: party::members_to_wire(&description.members),
            member_name: description.member_name.clone(),
        }
    }
}

impl TryFrom<schema::WorkloadDescription> for WorkloadDescription {
    type Error = ControlError;

    fn try_from(wire: schema::WorkloadDescription) -> Result<Self, ControlError> {
        short("description.spaces", wire.spaces.len(), SPACES_MAX)?;
        short("description.pids", wire.pids.len(), PIDS_MAX)?;
        short("description.links", wire.links.len(), LINKS_MAX)?;
        short("description.routes", wire.routes.len(), ROUTES_MAX)?;
        short("description.files", wire.files.len(), FILES_MAX)?;
        short("description.mounts", wire.mounts.len(), MOUNTS_MAX)?;
        short("description.shared", wire.shared.len(), SHARED_PATHS_MAX)?;
        short("description.copied", wire.copied.len(), COPIED_PATHS_MAX)?;
        for path in [&wire.cwd, &wire.root] {
            short("description path", path.len(), PATH_BYTES_MAX)?;
        }
        for name in [&wire.hostname, &wire.domainname, &wire.kernel_release] {
            short("description name", name.len(), NAME_BYTES_MAX)?;
        }
        let own_namespaces = Namespaces::from_bits(wire.own_namespaces).ok_or(invalid(
            "description.own_namespaces",
            wire.own_namespaces.into(),
        ))?;
        let length = i64::try_from(wire.boot_id.len()).unwrap_or(i64::MAX);
        let boot_id = <[u8; 16]>::try_from(&*wire.boot_id);
        let boot_id = boot_id.map_err(|_| invalid("description.boot_id", length))?;
        let members = party::members_from_wire(wire.members, &wire.boot_id)?;
        let description = Self {
            root_pid: pid("description.root_pid", wire.root_pid)?,
            spaces: collect(wire.spaces)?,
            pids: pids("description.pids", wire.pids)?,
            own_namespaces,
            hostname: wire.hostname,
            domainname: wire.domainname,
            links: collect(wire.links)?,
            routes: collect(wire.routes)?,
            files: collect(wire.files)?,
            shared: collect(wire.shared)?,
            copied: collect(wire.copied)?,
            boot_id,
            cpu: wire.cpu.map(TryInto::try_into).transpose()?,
            criu_version: wire.criu_version,
            page_size: wire.page_size,
            kernel_release: wire.kernel_release,
            cwd: wire.cwd,
            root: wire.root,
            mounts: collect(wire.mounts)?,
            needs: wire.needs.try_into()?,
            container: wire.container.map(TryInto::try_into).transpose()?,
            members,
            member_name: wire.member_name,
        };
        party::check(&description)?;
        Ok(description)
    }
}

impl From<&SpaceDescription> for schema::Space {
    fn from(space: &SpaceDescription) -> Self {
        Self {
            vpid: space.vpid.0,
            comm: space.comm.clone(),
            threads: space.threads.clone(),
            memory_bytes: space.memory_bytes,
        }
    }
}

impl TryFrom<schema::Space> for SpaceDescription {
    type Error = ControlError;

    fn try_from(wire: schema::Space) -> Result<Self, ControlError> {
        short("space.comm", wire.comm.len(), NAME_BYTES_MAX)?;
        short("space.threads", wire.threads.len(), PIDS_MAX)?;
        if wire.vpid == 0 || i32::try_from(wire.vpid).is_err() {
            return Err(invalid("space.vpid", wire.vpid.into()));
        }
        Ok(Self {
            vpid: SpaceId(wire.vpid),
            comm: wire.comm,
            threads: pids("space.threads", wire.threads)?,
            memory_bytes: wire.memory_bytes,
        })
    }
}

impl From<&LinkDescription> for schema::Link {
    fn from(link: &LinkDescription) -> Self {
        let address = |address: &LinkAddress| schema::Address {
            ip: ip_bytes(address.ip),
            prefix: address.prefix.into(),
        };
        Self {
            name: link.name.clone(),
            mac: link.mac.to_vec(),
            mtu: link.mtu,
            addresses: link.addresses.iter().map(address).collect(),
            bridge: link.bridge.clone().unwrap_or_default(),
        }
    }
}

impl TryFrom<schema::Link> for LinkDescription {
    type Error = ControlError;

    fn try_from(wire: schema::Link) -> Result<Self, ControlError> {
        link_name("link.name", &wire.name)?;
        short("link.addresses", wire.addresses.len(), ADDRESSES_MAX)?;
        short("link.bridge", wire.bridge.len(), LINK_NAME_BYTES_MAX)?;
        let length = i64::try_from(wire.mac.len()).unwrap_or(i64::MAX);
        let mac = wire
            .mac
            .try_into()
            .map_err(|_| invalid("link.mac", length))?;
        let address = |wire: schema::Address| network("link.addresses", &wire.ip, wire.prefix);
        Ok(Self {
            name: wire.name,
            mac,
            mtu: wire.mtu,
            addresses: wire
                .addresses
                .into_iter()
                .map(address)
                .collect::<Result<_, _>>()?,
            bridge: Some(wire.bridge).filter(|bridge| !bridge.is_empty()),
        })
    }
}

impl From<&RouteDescription> for schema::Route {
    fn from(route: &RouteDescription) -> Self {
        Self {
            destination: ip_bytes(route.destination.ip),
            prefix: route.destination.prefix.into(),
            gateway: route.gateway.map(ip_bytes).unwrap_or_default(),
            device: route.device.clone(),
            metric: route.metric,
            source: route.source.map(ip_bytes).unwrap_or_default(),
        }
    }
}

impl TryFrom<schema::Route> for RouteDescription {
    type Error = ControlError;

    fn try_from(wire: schema::Route) -> Result<Self, ControlError> {
        link_name("route.device", &wire.device)?;
        Ok(Self {
            destination: network("route.destination", &wire.destination, wire.prefix)?,
            gateway: optional_ip("route.gateway", &wire.gateway)?,
            device: wire.device,
            metric: wire.metric,
            source: optional_ip("route.source", &wire.source)?,
        })
    }
}

impl From<&FileDescription> for schema::File {
    fn from(file: &FileDescription) -> Self {
        let kind = match file.kind {
            FileUse::Mapped => schema::FileKind::Mapped,
            FileUse::Open => schema::FileKind::Open,
        };
        Self {
            path: file.path.clone(),
            size: file.size,
            build_id: file.build_id.clone(),
            writable: file.writable,
            mode: file.mode,
            kind: kind.into(),
            mapped_shared: file.mapped_shared,
        }
    }
}

impl TryFrom<schema::File> for FileDescription {
    type Error = ControlError;

    fn try_from(wire: schema::File) -> Result<Self, ControlError> {
        if wire.path.is_empty() {
            return Err(missing("file.path"));
        }
        short("file.path", wire.path.len(), PATH_BYTES_MAX)?;
        short("file.build_id", wire.build_id.len(), BUILD_ID_BYTES_MAX)?;
        let kind = match schema::FileKind::try_from(wire.kind) {
            Ok(schema::FileKind::Mapped) => FileUse::Mapped,
            Ok(schema::FileKind::Open) => FileUse::Open,
            Ok(schema::FileKind::Unspecified) | Err(_) => {
                return Err(invalid("file.kind", wire.kind.into()));
            }
        };
        Ok(Self {
            path: wire.path,
            size: wire.size,
            build_id: wire.build_id,
            writable: wire.writable,
            mode: wire.mode,
            kind,
            mapped_shared: wire.mapped_shared,
        })
    }
}

impl From<&MountDescription> for schema::Mount {
    fn from(mount: &MountDescription) -> Self {
        Self {
            path: mount.path.clone(),
            node_path: mount.node_path.clone(),
            directory: mount.directory,
        }
    }
}

impl TryFrom<schema::Mount> for MountDescription {
    type Error = ControlError;

    fn try_from(wire: schema::Mount) -> Result<Self, ControlError> {
        for path in [&wire.path, &wire.node_path] {
            if !path.starts_with('/') {
                return Err(missing("mount path"));
            }
            short("mount path", path.len(), PATH_BYTES_MAX)?;
        }
        Ok(Self {
            path: wire.path,
            node_path: wire.node_path,
            directory: wire.directory,
        })
    }
}

fn collect<W, T>(wire: Vec<W>) -> Result<Vec<T>, ControlError>
where
    T: TryFrom<W, Error = ControlError>,
{
    wire.into_iter().map(T::try_from).collect()
}

const fn invalid(field: &'static str, value: i64) -> ControlError {
    ControlError::Invalid { field, value }
}

fn pid(field: &'static str, number: i32) -> Result<i32, ControlError> {
    if number < 1 {
        Err(invalid(field, number.into()))
    } else {
        Ok(number)
    }
}

fn pids(field: &'static str, numbers: Vec<i32>) -> Result<Vec<i32>, ControlError> {
    match numbers.iter().find(|&&number| number < 1) {
        Some(&number) => Err(invalid(field, number.into())),
        None => Ok(numbers),
    }
}

fn link_name(field: &'static str, name: &str) -> Result<(), ControlError> {
    if name.is_empty() {
        return Err(missing(field));
    }
    short(field, name.len(), LINK_NAME_BYTES_MAX)
}

pub(super) fn ip_bytes(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

fn ip(field: &'static str, bytes: &[u8]) -> Result<IpAddr, ControlError> {
    let v4 = <[u8; 4]>::try_from(bytes).map(IpAddr::from);
    let v6 = || <[u8; 16]>::try_from(bytes).map(IpAddr::from);
    let length = i64::try_from(bytes.len()).unwrap_or(i64::MAX);
    v4.or_else(|_| v6()).map_err(|_| invalid(field, length))
}

pub(super) fn optional_ip(
    field: &'static str,
    bytes: &[u8],
) -> Result<Option<IpAddr>, ControlError> {
    if bytes.is_empty() {
        Ok(None)
    } else {
        ip(field, bytes).map(Some)
    }
}

pub(super) fn network(
    field: &'static str,
    bytes: &[u8],
    prefix: u32,
) -> Result<LinkAddress, ControlError> {
    let ip = ip(field, bytes)?;
    let bits = if ip.is_ipv4() { 32 } else { 128 };
    match u8::try_from(prefix) {
        Ok(prefix) if prefix <= bits => Ok(LinkAddress { ip, prefix }),
        Ok(_) | Err(_) => Err(invalid(field, prefix.into())),
    }
}
