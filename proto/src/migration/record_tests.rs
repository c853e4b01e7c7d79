//! Records and their bytes.

use super::*;

fn entries() -> Vec<Entry> {
    let generation = Generation::FIRST;
    let peer: NodeName = "b".parse().unwrap();
    let workload = WorkloadName::Process(7);
    let state = DriverState::new(vec![1, 2, 3]).unwrap();
    let incarnation = Incarnation(u64::MAX);
    vec![
        Entry::Offered(OfferedEntry {
            workload: workload.clone(),
            peer: peer.clone(),
            policy: Policy {
                frozen_max: Some(Duration::from_secs(7)),
                mode: Mode::Auto,
                on_timeout: OnTimeout::Postcopy,
                downtime_bound: Some(Duration::from_secs(1)),
                ..Policy::DEFAULT
            },
            hold: true,
            state: state.clone(),
        }),
        Entry::Commit {
            generation,
            drains: false,
        },
        Entry::Commit {
            generation,
            drains: true,
        },
        Entry::Started { generation },
        Entry::Fenced { generation },
        Entry::Accepted(AcceptedEntry {
            workload,
            peer,
            incarnation,
            state: state.clone(),
        }),
        Entry::Ready(ReadyEntry {
            generation,
            incarnation,
            drains: true,
            state,
        }),
        Entry::Running { generation },
        Entry::Refused { generation },
        Entry::Settled { generation },
        Entry::Filled { generation },
        Entry::Aborted(Failure::new(ErrorCode::Timeout, "late")),
        Entry::Done,
    ]
}

#[test]
fn a_record_reads_back() {
    for entry in entries() {
        let record = Record {
            migration: MigrationId::new([3; 16]),
            entry,
        };
        assert_eq!(Record::from_bytes(&record.to_bytes()), Ok(record));
    }
}

#[test]
fn the_beginning_of_a_migration_keeps_its_bytes() {
    let bytes = |frozen_max| {
        let policy = Policy {
            frozen_max,
            ..Policy::DEFAULT
        };
        let record = Record {
            migration: MigrationId::new([3; 16]),
            entry: Entry::Offered(OfferedEntry {
                workload: WorkloadName::Process(7),
                peer: "b".parse().unwrap(),
                policy,
                hold: false,
                state: DriverState::new(vec![1]).unwrap(),
            }),
        };
        let bytes = record.to_bytes();
        bytes
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect::<String>()
    };
    let begin = "010a1003030303030303030303030303030303";
    let offered = "0a0970726f636573732f3712016218e0a712201e2880c8ceb40d420101";
    assert_eq!(bytes(None), format!("{begin}82011d{offered}"));
    let frozen_max = "4880897a";
    let bounded = bytes(Some(Duration::from_secs(2)));
    assert_eq!(bounded, format!("{begin}820121{offered}{frozen_max}"));
}

#[test]
fn a_record_says_of_which_kind_its_workload_is() {
    let texts = [
        "process/7",
        "runc/a",
        "crun/a",
        "podman/a",
        "podman-pod/a",
        "containerd/k8s.io/a",
    ];
    for text in texts {
        let record = Record {
            migration: MigrationId::new([3; 16]),
            entry: Entry::Accepted(AcceptedEntry {
                workload: text.parse().unwrap(),
                peer: "b".parse().unwrap(),
                incarnation: Incarnation(1),
                state: DriverState::default(),
            }),
        };
        let bytes = record.to_bytes();
        let found = bytes.windows(text.len());
        assert!(found.into_iter().any(|part| part == text.as_bytes()));
        assert_eq!(Record::from_bytes(&bytes), Ok(record));
        let kind = text.as_bytes()[0];
        let spoilt = bytes
            .iter()
            .map(|byte| if *byte == kind { b'x' } else { *byte });
        let error = Record::from_bytes(&spoilt.collect::<Vec<_>>()).unwrap_err();
        let unnamed = matches!(
            error,
            RecordError::Name {
                field: "workload",
                ..
            }
        );
        assert!(unnamed, "{error}");
    }
}

// clause: J-1
#[test]
fn a_record_says_its_format_first() {
    let record = Record {
        migration: MigrationId::new([3; 16]),
        entry: Entry::Done,
    };
    let mut bytes = record.to_bytes();
    assert_eq!(bytes[0], 1);
    bytes[0] = 2;
    assert_eq!(Record::from_bytes(&bytes), Err(RecordError::Format(2)));
    assert_eq!(Record::from_bytes(&[]), Err(RecordError::Empty));
    assert_eq!(
        Record::from_bytes(&[1]),
        Err(RecordError::Field("migration"))
    );
}

#[test]
fn a_state_is_bounded() {
    assert!(DriverState::new(vec![0; DriverState::BYTES_MAX]).is_ok());
    assert!(DriverState::new(vec![0; DriverState::BYTES_MAX + 1]).is_err());
}

// clause: J-8
#[test]
fn a_commit_that_drains_is_no_other_commit_with_a_field() {
    let bytes = |drains| {
        let entry = Entry::Commit {
            generation: Generation::FIRST,
            drains,
        };
        let migration = MigrationId::new([3; 16]);
        Record { migration, entry }.to_bytes()
    };
    // Field 17 of length 2, and field 20: a build that does not know 20 finds no entry.
    assert!(bytes(false).ends_with(b"\x8a\x01\x02\x08\x01"));
    assert!(bytes(true).ends_with(b"\xa2\x01\x02\x08\x01"));
}
