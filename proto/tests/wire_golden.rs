//! The bytes of every message and header. A change here is a change of the protocol: it needs a
//! new version (clause V-2) and a node that still speaks the old one.

#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use expect_test::{Expect, expect};
use pageferry_proto::id::{Generation, Incarnation, MigrationId, Round, SpaceId, WorkloadName};
use pageferry_proto::migration::policy::Policy;
use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{
    ControlError, Final, Hello, Message, Offer, RoundEnd, SourceMessage, TargetMessage, Welcome,
};
use pageferry_proto::wire::cpu::{CpuDescription, XsaveComponent};
use pageferry_proto::wire::description::{
    FileDescription, FileUse, LinkAddress, LinkDescription, Namespaces, RouteDescription,
    SpaceDescription, WorkloadDescription,
};
use pageferry_proto::wire::frame;
use pageferry_proto::wire::needs::{CpuMax, Needs, ResourceLimits};
use pageferry_proto::wire::parcel::{BlockHeader, Codec, ParcelHeader, ParcelRun, RunKind};
use pageferry_proto::wire::shared::{Marker, SharedPath};
use pageferry_proto::wire::stream::{self, ImageFileHeader, ImageName, SetHeader};
use pageferry_proto::wire::stream::{StreamKind, StreamPrefix};
use pageferry_proto::wire::version::{ALPN, Version};

#[path = "wire_golden/container.rs"]
mod container;

use container::container;

const MIGRATION: MigrationId = MigrationId::new([0xa0; 16]);

/// Sixteen bytes a line, in hexadecimal.
fn hex(bytes: &[u8]) -> String {
    let mut text = String::new();
    for line in bytes.chunks(16) {
        for byte in line {
            write!(text, "{byte:02x}").unwrap();
        }
        text.push('\n');
    }
    text
}

/// The message has these bytes, and these bytes are that message.
fn check(message: impl Into<Message>, golden: &Expect) {
    let message = message.into();
    let bytes = message.encode().unwrap();
    golden.assert_eq(&hex(&bytes));
    let (header, body) = bytes.split_first_chunk().unwrap();
    assert_eq!(frame::length(*header), Ok(body.len()));
    assert_eq!(Message::decode(body), Ok(message));
}

fn generation() -> Generation {
    Generation::new(3).unwrap()
}

fn round() -> Round {
    Round::new(9).unwrap()
}

fn failure() -> Failure {
    Failure::new(ErrorCode::PidTaken, "pid 7 is taken")
}

fn address(ip: IpAddr, prefix: u8) -> LinkAddress {
    LinkAddress { ip, prefix }
}

fn description() -> WorkloadDescription {
    WorkloadDescription {
        root_pid: 4711,
        spaces: vec![SpaceDescription {
            vpid: SpaceId(1),
            comm: "redis-server".to_owned(),
            threads: vec![1, 7],
            memory_bytes: 1 << 30,
        }],
        pids: vec![4711, 4717],
        own_namespaces: Namespaces::NET.with(Namespaces::PID),
        hostname: "web".to_owned(),
        domainname: "(none)".to_owned(),
        links: vec![LinkDescription {
            name: "eth0".to_owned(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            addresses: vec![
                address(Ipv4Addr::new(10, 0, 0, 7).into(), 24),
                address(Ipv6Addr::LOCALHOST.into(), 128),
            ],
            bridge: Some("br0".to_owned()),
        }],
        routes: vec![RouteDescription {
            destination: LinkAddress {
                ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
                prefix: 0,
            },
            gateway: Some(IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1))),
            device: "eth0".to_owned(),
            metric: 100,
            source: None,
        }],
        files: vec![FileDescription {
            path: "/usr/bin/redis-server".to_owned(),
            size: 4096,
            build_id: vec![0xab, 0xcd],
            writable: false,
            mode: 0o100_755,
            kind: FileUse::Mapped,
            mapped_shared: true,
        }],
        shared: vec![shared()],
        copied: Vec::new(),
        boot_id: [0xb0; 16],
        cpu: Some(CpuDescription {
            vendor: "GenuineIntel".to_owned(),
            features: vec![1 << 28, 0, 1 << 5],
            avx10: 1,
            xcr0: 7,
            components: vec![XsaveComponent {
                number: 2,
                size: 256,
                offset: 576,
                aligned: true,
            }],
        }),
        criu_version: 40201,
        page_size: 4096,
        kernel_release: "6.12.0".to_owned(),
        cwd: "/".to_owned(),
        root: "/".to_owned(),
        mounts: Vec::new(),
        needs: needs(),
        container: Some(container()),
        members: Vec::new(),
        member_name: String::new(),
    }
}

fn needs() -> Needs {
    Needs {
        private_bytes: 1 << 30,
        shared_bytes: 1 << 20,
        limits: ResourceLimits {
            memory_max: Some(2 << 30),
            memory_high: None,
            swap_max: Some(0),
            cpu_max: Some(CpuMax {
                quota_us: 150_000,
                period_us: 100_000,
            }),
            cpu_weight: Some(200),
            pids_max: Some(512),
        },
    }
}

fn shared() -> SharedPath {
    SharedPath {
        path: "/data".to_owned(),
        directory: true,
        file_system: 0x6969,
        inode: 2,
        born_ns: 1,
        changed_ns: 300,
        marker: Some(Marker::new([0xc0; 32])),
    }
}

fn offer() -> Offer {
    Offer {
        version: Version::CURRENT,
        workload: WorkloadName::Process(4711),
        generation: Generation::FIRST,
        policy: Policy {
            downtime_max: Duration::from_millis(1),
            frozen_max: Some(Duration::from_secs(2)),
            ..Policy::DEFAULT
        },
        description: description(),
        network: None,
    }
}

// clause: V-1
#[test]
fn the_alpn_names_the_major_version() {
    assert_eq!(ALPN, b"pageferry/1");
}

// clause: N-1
#[test]
fn the_greeting_keeps_its_bytes() {
    let hello = Hello {
        version: 1,
        migration: MIGRATION,
        lane: 1,
        lanes: 2,
    };
    check(
        Message::Hello(hello),
        &expect![[r#"
        1a0000000a1808011210a0a0a0a0a0a0
        a0a0a0a0a0a0a0a0a0a018012002
    "#]],
    );
    check(
        Message::Welcome(Welcome {
            version: Version::CURRENT,
        }),
        &expect![[r#"
            0400000012020801
        "#]],
    );
}

// clause: C-7
#[test]
fn the_offer_keeps_its_bytes() {
    check(
        SourceMessage::Offer(Box::new(offer())),
        &expect![[r#"
            b10100008201ad030801120c70726f63
            6573732f343731311801220f08e80710
            1e1880c8ceb40d3080897a2a870308e7
            24121a0801120c72656469732d736572
            7665721a0201072080808080041a04e7
            24ed2420092a037765623206286e6f6e
            65293a370a0465746830120602000000
            000118dc0b22080a040a000007101822
            150a1000000000000000000000000000
            0000011080012a0362723042140a0400
            0000001a040a00000122046574683028
            644a260a152f7573722f62696e2f7265
            6469732d7365727665721080201a02ab
            cd28ed8302300138015889ba02608020
            6a06362e31322e3072012f7a012f8a01
            360a052f64617461100118e9d2012002
            280130ac023a20c0c0c0c0c0c0c0c0c0
            c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0
            c0c0c0c0c0c0c0920110b0b0b0b0b0b0
            b0b0b0b0b0b0b0b0b0b09a01270a0c47
            656e75696e65496e74656c1207808080
            80010020180120072a0a080210800218
            c0042001c20120088080808004108080
            40188080808008280030f0930938a08d
            0640c801488004ca012b0a022f621202
            7b7d1a03312e33521c0a030a01771201
            731a087368613235363a302208736861
            3235363a31
        "#]],
    );
}

// clause: V-3
#[test]
fn messages_of_the_source_keep_their_bytes() {
    let generation = generation();
    let round = round();
    let pages = PageCount(300);
    check(
        SourceMessage::RoundEnd(RoundEnd {
            round,
            parcels: 2,
            pages,
            files: 0,
        }),
        &expect![[r#"
            0a0000008a01070809100218ac02
        "#]],
    );
    let end = Final {
        generation,
        round,
        parcels: 2,
        pages,
        live_sets: 1,
        images: 12,
        digests: 4,
        verify: true,
        locks: 0,
        files: 0,
        absent_sets: 0,
        absent_pages: PageCount::ZERO,
    };
    check(
        SourceMessage::Final(end),
        &expect![[r#"
        1400000092011108031009180220ac02
        2801300c38044001
    "#]],
    );
    check(
        SourceMessage::Go { generation },
        &expect![[r#"
        050000009a01020803
    "#]],
    );
    check(
        SourceMessage::Abort {
            generation,
            failure: failure(),
        },
        &expect![[r#"
            19000000a20116080312120823120e70
            696420372069732074616b656e
        "#]],
    );
    check(
        SourceMessage::Query { generation },
        &expect![[r#"
        05000000aa01020803
    "#]],
    );
    check(
        SourceMessage::Settled { generation },
        &expect![[r#"
        05000000b201020803
    "#]],
    );
}

#[test]
fn messages_of_the_target_keep_their_bytes() {
    let generation = generation();
    let incarnation = Incarnation(0x0102_0304_0506_0708);
    check(
        container::accepted(incarnation),
        &expect![[r#"
        0c000000820309090807060504030201
    "#]],
    );
    check(
        TargetMessage::Declined(failure()),
        &expect![[r#"
        170000008a03140a120823120e706964
        20372069732074616b656e
    "#]],
    );
    check(
        TargetMessage::RoundHeld { round: round() },
        &expect![[r#"
        050000009203020809
    "#]],
    );
    check(
        TargetMessage::FinalHeld { generation },
        &expect![[r#"
        050000009a03020803
    "#]],
    );
    check(
        TargetMessage::Ready {
            generation,
            incarnation,
        },
        &expect![[r#"
            0e000000a2030b080311080706050403
            0201
        "#]],
    );
    check(
        TargetMessage::Started {
            generation,
            root_pid: None,
        },
        &expect![[r#"
        05000000aa03020803
    "#]],
    );
    check(
        TargetMessage::Refused {
            generation,
            failure: None,
        },
        &expect![[r#"
        05000000b203020803
    "#]],
    );
    check(
        TargetMessage::Unknown { generation },
        &expect![[r#"
        05000000ba03020803
    "#]],
    );
    check(
        TargetMessage::Failed(failure()),
        &expect![[r#"
        17000000c203140a120823120e706964
        20372069732074616b656e
    "#]],
    );
}

#[test]
fn what_settles_a_migration_keeps_its_bytes() {
    let generation = generation();
    check(
        TargetMessage::Forgotten { generation },
        &expect![[r#"
        05000000ca03020803
    "#]],
    );
}

#[test]
fn headers_of_streams_keep_their_bytes() {
    let prefix = StreamPrefix {
        kind: StreamKind::Parcel,
        migration: MIGRATION,
    };
    expect![[r#"
        01a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0
        a0
    "#]]
    .assert_eq(&hex(&prefix.encode()));
    let run = |start, count| PageRun::new(PageIndex(start), PageCount(count)).unwrap();
    let runs = vec![
        ParcelRun {
            pages: run(0x10, 2),
            kind: RunKind::Data,
        },
        ParcelRun {
            pages: run(0x12, 512),
            kind: RunKind::Zero,
        },
    ];
    let header = ParcelHeader::new(SpaceId(7), round(), runs, 4000).unwrap();
    expect![[r#"
        07000000090000000200000002000000
        a00f0000100000000000000002000000
        0212000000000000000002000001
    "#]]
    .assert_eq(&hex(&header.encode()));
    let block = BlockHeader::new(Codec::Lz4, 8192, 3991).unwrap();
    expect![[r#"
        0200200000970f0000
    "#]]
    .assert_eq(&hex(&block.encode()));
    let set: PageSet = [run(0x10, 2), run(0x1000, 300)].into_iter().collect();
    let header = SetHeader {
        generation: Generation::new(3).unwrap(),
        space: SpaceId(7),
        length: set.to_wire().len().try_into().unwrap(),
    };
    expect![[r#"
        0300000007000000060000001002ee1f
        ac02
    "#]]
    .assert_eq(&hex(&[&header.encode()[..], &set.to_wire()].concat()));
    let name = ImageName::new("core-7.img").unwrap();
    let file = ImageFileHeader::new(Generation::new(3).unwrap(), name, 1000).unwrap();
    expect![[r#"
        030000000a636f72652d372e696d67e8
        03000000000000
    "#]]
    .assert_eq(&hex(&file.encode()));
    let mut body = b"pageferry".to_vec();
    stream::seal(&mut body);
    expect![[r#"
        706167656665727279d270ec65
    "#]]
    .assert_eq(&hex(&body));
}

fn refuse(bytes: &[u8], error: &ControlError) {
    assert_eq!(Message::decode(bytes), Err(error.clone()));
}

// clause: C-1
#[test]
fn a_lane_is_one_of_at_most_sixteen() {
    let check = |version, lane, lanes, legal| {
        let hello = Hello {
            version,
            migration: MIGRATION,
            lane,
            lanes,
        };
        let bytes = Message::Hello(hello).encode().unwrap();
        let read = Message::decode(&bytes[frame::HEADER_BYTES..]);
        assert_eq!(read.is_ok(), legal, "lane {lane} of {lanes}: {read:?}");
    };
    check(1, 0, 1, true);
    check(1, 15, 16, true);
    check(1, 1, 1, false);
    check(1, 0, 0, false);
    check(1, 16, 17, false);
    check(0, 0, 1, false);
    // A migration is named by sixteen bytes.
    assert!(Message::decode(&[0x0a, 0x07, 0x08, 0x01, 0x12, 0x01, 0xa0, 0x20, 0x01]).is_err());
}

// clause: N-4
#[test]
fn what_is_never_valid_is_refused_by_its_field() {
    refuse(&[], &ControlError::Missing { field: "message" });
    // A message of a number that no version has: field 200, empty.
    refuse(
        &[0xc2, 0x0c, 0x00],
        &ControlError::Missing { field: "message" },
    );
    // Go without a generation.
    assert!(matches!(
        Message::decode(&[0x9a, 0x01, 0x00]),
        Err(ControlError::Name {
            field: "go.generation",
            ..
        })
    ));
    // Failed without a failure, and with a failure without a code.
    refuse(
        &[0xc2, 0x03, 0x00],
        &ControlError::Missing {
            field: "failed.failure",
        },
    );
    let zero = ControlError::Invalid {
        field: "failed.failure",
        value: 0,
    };
    refuse(&[0xc2, 0x03, 0x02, 0x0a, 0x00], &zero);
    assert!(matches!(
        Message::decode(&[0xff; 8]),
        Err(ControlError::Decode(_))
    ));
}

// clause: V-4
#[test]
fn a_field_of_a_newer_version_is_skipped() {
    let go = Message::from(SourceMessage::Go {
        generation: generation(),
    });
    // Go with a field 15 that this version does not know.
    let bytes = [0x9a, 0x01, 0x04, 0x08, 0x03, 0x78, 0x01];
    assert_eq!(Message::decode(&bytes), Ok(go));
}

// clause: C-3
#[test]
fn an_offer_over_a_limit_is_refused() {
    let refused = |offer, field| {
        let bytes = Message::from(SourceMessage::Offer(Box::new(offer)))
            .encode()
            .unwrap();
        let error = Message::decode(&bytes[frame::HEADER_BYTES..]).unwrap_err();
        assert!(error.to_string().contains(field), "{error}");
    };
    for rounds_max in [0, 1001] {
        let mut offer = offer();
        offer.policy.rounds_max = rounds_max;
        refused(offer, "offer.policy.rounds_max");
    }
    let check = |change: fn(&mut WorkloadDescription), field| {
        let mut offer = offer();
        change(&mut offer.description);
        refused(offer, field);
    };
    check(|it| it.root_pid = 0, "description.root_pid");
    check(|it| it.pids[1] = -1, "description.pids");
    check(|it| it.spaces[0].vpid = SpaceId(0), "space.vpid");
    check(|it| it.hostname = "a".repeat(65), "description name");
    check(|it| it.cwd = "a".repeat(4097), "description path");
    check(|it| it.shared[0].path = "data".to_owned(), "shared path");
    check(|it| it.shared = vec![shared(); 257], "description.shared");
    check(|it| it.cpu.as_mut().unwrap().xcr0 = 3, "cpu.components");
    check(|it| it.links[0].name = String::new(), "link.name");
    check(|it| it.links[0].addresses[0].prefix = 33, "link.addresses");
    check(|it| it.files[0].path = String::new(), "file.path");
    check(|it| it.spaces = vec![space(); 4097], "description.spaces");
    let mut offer = offer();
    offer.description.shared = vec![shared(); 256];
    for shared in &mut offer.description.shared {
        shared.path = format!("/{}", "a".repeat(4095));
    }
    let message = Message::from(SourceMessage::Offer(Box::new(offer)));
    assert!(matches!(message.encode(), Err(ControlError::Frame(_))));
}

fn space() -> SpaceDescription {
    SpaceDescription {
        vpid: SpaceId(1),
        comm: String::new(),
        threads: vec![],
        memory_bytes: 0,
    }
}
