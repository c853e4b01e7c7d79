//! A container, for the message that offers one, and the answer to that.

use pageferry_proto::id::Incarnation;
use pageferry_proto::wire::container::{ContainerDescription, ContainerdDescription};
use pageferry_proto::wire::control::TargetMessage;

pub fn container() -> ContainerDescription {
    ContainerDescription {
        bundle: "/b".to_owned(),
        config: b"{}".to_vec(),
        runtime_version: "1.3".to_owned(),
        containerd: Some(ContainerdDescription {
            record: vec![0x0a, 0x01, b'w'],
            spec_type: "s".to_owned(),
            image_digest: "sha256:0".to_owned(),
            snapshot_parent: "sha256:1".to_owned(),
        }),
        podman: None,
        pod: None,
        podman_pod: None,
    }
}

pub fn accepted(incarnation: Incarnation) -> TargetMessage {
    TargetMessage::Accepted {
        incarnation,
        kept: Vec::new(),
        parks: false,
        drains: false,
    }
}
