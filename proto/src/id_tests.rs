//! Names, as they are read and printed.

use super::*;

#[test]
fn a_migration_id_reads_what_it_prints() {
    let id = MigrationId::new([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 0xff]);
    assert_eq!(id.to_string(), "000102030405060708090a0b0c0d0eff");
    assert_eq!(id.to_string().parse(), Ok(id));
}

#[test]
fn a_migration_id_takes_nothing_but_digits() {
    for text in [
        "",
        "00",
        "+0102030405060708090a0b0c0d0e0ff",
        "zz0102030405060708090a0b0c0d0e",
    ] {
        assert_eq!(
            text.parse::<MigrationId>(),
            Err(IdError::MigrationId(text.to_owned()))
        );
    }
}

#[test]
fn zero_is_no_generation_and_no_round() {
    assert_eq!(Generation::new(0), Err(IdError::GenerationZero));
    assert_eq!(Round::new(0), Err(IdError::RoundZero));
    assert_eq!(Generation::new(1), Ok(Generation::FIRST));
    assert_eq!(Round::FIRST.next().number(), 2);
}

#[test]
fn a_node_name_is_a_lower_case_label() {
    assert_eq!("node-7".parse::<NodeName>().unwrap().as_str(), "node-7");
    for text in ["", "A", "a.b", "a_b", &"a".repeat(64)] {
        assert_eq!(
            text.parse::<NodeName>(),
            Err(IdError::NodeName(text.to_owned()))
        );
    }
}

#[test]
fn a_workload_name_reads_what_it_prints() {
    let texts = [
        "containerd/k8s.io/6f1e",
        "crun/web_1",
        "pod/0b6ab9a8-5f4e-4b6c-9a3e-2f6f3a0c1d2e",
        "podman/web",
        "podman-pod/shop",
        "process/4711",
        "runc/a.b+c-d",
    ];
    for (text, kind) in texts.into_iter().zip(WorkloadKind::ALL) {
        let name: WorkloadName = text.parse().unwrap();
        assert_eq!((name.kind(), name.to_string().as_str()), (kind, text));
    }
    assert_eq!("process/4711".parse(), Ok(WorkloadName::Process(4711)));
}

#[test]
fn a_pid_has_one_spelling() {
    for text in [
        "process/0",
        "process/-1",
        "process/+1",
        "process/01",
        "process/",
        "process/9999999999",
    ] {
        assert_eq!(
            text.parse::<WorkloadName>(),
            Err(IdError::Pid(text.to_owned()))
        );
    }
}

#[test]
fn a_container_is_named_by_what_can_be_the_name_of_a_file() {
    let long = "a".repeat(NAME_BYTES_MAX);
    assert!(format!("podman/{long}").parse::<WorkloadName>().is_ok());
    for name in [
        "",
        ".",
        "..",
        "-a",
        "a/b",
        "a b",
        "\u{e4}",
        &format!("{long}a"),
    ] {
        let refused = IdError::Container(name.to_owned());
        assert_eq!(format!("runc/{name}").parse::<WorkloadName>(), Err(refused));
    }
    let refused = "containerd/web".parse::<WorkloadName>().unwrap_err();
    let text = "workload \"containerd/web\" is not of the form containerd/NAMESPACE/ID";
    assert_eq!(refused.to_string(), text);
}

#[test]
fn a_pod_is_named_by_a_uuid_in_lower_case() {
    for name in [
        "",
        "web",
        "0B6AB9A8-5F4E-4B6C-9A3E-2F6F3A0C1D2E",
        "0b6ab9a85f4e4b6c9a3e2f6f3a0c1d2e",
        "0b6ab9a8-5f4e-4b6c-9a3e-2f6f3a0c1d2g",
        "0b6ab9a8-5f4e-4b6c-9a3e-2f6f3a0c1d2e-",
    ] {
        let refused = IdError::PodUid(name.to_owned());
        assert_eq!(format!("pod/{name}").parse::<WorkloadName>(), Err(refused));
    }
}

#[test]
fn a_network_is_named_by_what_can_be_the_name_of_a_file() {
    assert_eq!(
        "cni-1.a".parse::<NetworkName>().unwrap().as_str(),
        "cni-1.a"
    );
    for name in ["", "..", "a/b", "-a"] {
        let refused = IdError::Network(name.to_owned());
        assert_eq!(name.parse::<NetworkName>(), Err(refused));
    }
}

#[test]
fn a_kind_that_is_none_is_refused_by_its_name() {
    for (text, kind) in [("vm/web", "vm"), ("web", "web"), ("", "")] {
        let refused = text.parse::<WorkloadName>().unwrap_err();
        let expected = format!(
            "workload {text:?} is of no known kind: {kind:?} is not one of containerd, crun, \
             pod, podman, podman-pod, process, runc"
        );
        assert_eq!(refused.to_string(), expected);
    }
}
