//! What the simulated migration is offered with.

use std::net::{IpAddr, Ipv4Addr};

use super::world::{MIGRATION, Setup};
use pageferry_proto::id::{SpaceId, WorkloadName};
use pageferry_proto::migration::record::DriverState;
use pageferry_proto::migration::source::SourceOffer;
use pageferry_proto::wire::description::{
    LinkAddress, LinkDescription, Namespaces, SpaceDescription, WorkloadDescription,
};
use pageferry_proto::wire::needs::Needs;

pub(super) fn offer(setup: &Setup) -> SourceOffer {
    let space = |vpid| SpaceDescription {
        vpid: SpaceId(vpid),
        comm: "writer".to_owned(),
        threads: vec![1],
        memory_bytes: setup.pages * 4096,
    };
    SourceOffer {
        id: MIGRATION,
        workload: WorkloadName::Process(7),
        peer: "b".parse().expect("a name"),
        policy: setup.policy,
        network: None,
        hold: setup.hold,
        description: WorkloadDescription {
            root_pid: 7,
            spaces: (1..=setup.spaces).map(space).collect(),
            pids: vec![7],
            own_namespaces: Namespaces::NET,
            hostname: "writer".to_owned(),
            domainname: String::new(),
            links: vec![LinkDescription {
                name: "eth0".to_owned(),
                mac: [2, 0, 0, 0, 0, 1],
                mtu: 1500,
                addresses: vec![LinkAddress {
                    ip: IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1)),
                    prefix: 24,
                }],
                bridge: None,
            }],
            routes: Vec::new(),
            files: Vec::new(),
            shared: Vec::new(),
            copied: Vec::new(),
            boot_id: [7; 16],
            cpu: None,
            criu_version: 40201,
            page_size: 4096,
            kernel_release: "6.12".to_owned(),
            cwd: "/".to_owned(),
            root: "/".to_owned(),
            mounts: Vec::new(),
            needs: Needs::default(),
            container: None,
            members: Vec::new(),
            member_name: String::new(),
        },
        state: DriverState::new(b"source".to_vec()).expect("six bytes"),
    }
}
