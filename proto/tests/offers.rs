//! What an offer names: a workload of some kind, and perhaps a network that is there already.

#![allow(clippy::unwrap_used)]

mod rig;

use pageferry_proto::id::Round;
use pageferry_proto::migration::source::{SourceAction, SourceEvent, SourceMachine, SourceOffer};
use pageferry_proto::migration::timer::Time;
use pageferry_proto::wire::control::{Message, Offer, SourceMessage, TargetMessage};
use pageferry_proto::wire::copied::{CopiedForm, CopiedPath, FilesHeader};
use pageferry_proto::wire::frame;
use rig::*;

// clause: C-9
#[test]
fn an_offer_of_any_kind_of_workload_is_read() {
    let read = |workload: &str| {
        let workload = workload.parse().unwrap();
        let offer = Offer {
            workload,
            ..offer()
        };
        let message = Message::from(SourceMessage::Offer(Box::new(offer)));
        let bytes = message.encode().unwrap();
        assert_eq!(Message::decode(&bytes[frame::HEADER_BYTES..]), Ok(message));
        bytes
    };
    for workload in [
        "runc/web",
        "crun/web",
        "podman/web",
        "containerd/k8s.io/web",
    ] {
        read(workload);
    }
    let bytes = replaced(&read("runc/web"), b"runc/web", b"lxc0/web");
    let error = Message::decode(&bytes).unwrap_err();
    assert_eq!(error.to_string(), "field offer.workload is not a name");
    let why = std::error::Error::source(&error).unwrap().to_string();
    assert!(why.contains("\"lxc0\" is not one of containerd,"), "{why}");
}

// clause: C-10
#[test]
fn an_offer_says_at_its_end_which_network_the_workload_joins() {
    let joining = Offer {
        network: Some("web".parse().unwrap()),
        ..offer()
    };
    let encode = |offer| Message::from(SourceMessage::Offer(Box::new(offer))).encode();
    let (bytes, none) = (encode(joining).unwrap(), encode(offer()).unwrap());
    assert_eq!(bytes.len(), none.len() + 5);
    assert!(bytes.ends_with(b"\x32\x03web"), "{bytes:x?}");
    let error = Message::decode(&replaced(&bytes, b"\x32\x03web", b"\x32\x03../"));
    let error = error.unwrap_err().to_string();
    assert_eq!(error, "field offer.network is not a name");
}

// clause: F-11
#[test]
fn an_offer_says_which_folders_travel_and_the_answer_which_of_them_are_kept() {
    let mut travelling = offer();
    travelling.description.copied = vec![CopiedPath {
        path: "/srv/a".to_owned(),
        form: CopiedForm::Folder,
        entries: 5,
        bytes: 300,
        base: Some([7; 32]),
    }];
    let message = Message::from(SourceMessage::Offer(Box::new(travelling)));
    let bytes = message.encode().unwrap();
    assert_eq!(Message::decode(&bytes[frame::HEADER_BYTES..]), Ok(message));
    let told = [
        &b"\xd2\x01\x2f\x0a\x06/srv/a\x10\x05\x18\xac\x02\x22\x20"[..],
        &[7; 32],
    ]
    .concat();
    assert!(
        bytes.windows(told.len()).any(|part| part == told),
        "{bytes:x?}"
    );
    let accepted = Message::from(TargetMessage::Accepted {
        incarnation: INCARNATION,
        kept: vec![0, 3],
        parks: true,
        drains: true,
    });
    let bytes = accepted.encode().unwrap();
    assert!(
        bytes.ends_with(b"\x12\x02\x00\x03\x18\x01\x20\x01"),
        "{bytes:x?}"
    );
    assert_eq!(Message::decode(&bytes[frame::HEADER_BYTES..]), Ok(accepted));
}

// clause: N-4
#[test]
fn a_folder_that_travels_has_a_path_that_leads_nowhere_else() {
    let refused = |paths: &[&str]| {
        let mut travelling = offer();
        travelling.description.copied = paths
            .iter()
            .map(|path| CopiedPath {
                path: (*path).to_owned(),
                form: CopiedForm::Folder,
                entries: 5,
                bytes: 300,
                base: None,
            })
            .collect();
        let message = Message::from(SourceMessage::Offer(Box::new(travelling)));
        let bytes = message.encode().unwrap();
        Message::decode(&bytes[frame::HEADER_BYTES..]).is_err()
    };
    for odd in ["", "data", "/", "/a/", "/a/../b", "/a//b", "/a\0b"] {
        assert!(refused(&[odd]), "{odd:?}");
    }
    assert!(!refused(&["/a", "/b/c.d"]));
    assert!(refused(&["/a"; 65]));
}

// clause: D-8
#[test]
fn a_stream_of_files_says_which_folder_and_round_it_is_of() {
    let header = FilesHeader {
        round: Round::new(3).unwrap(),
        folder: 1,
    };
    assert_eq!(header.encode(), [3, 0, 0, 0, 1, 0, 0, 0]);
    assert_eq!(FilesHeader::decode(header.encode()), Ok(header));
    assert!(FilesHeader::decode([0; 8]).is_err());
}

#[test]
fn a_source_offers_the_network_that_was_asked_for() {
    let now = Time::default();
    let network = Some("web".parse().unwrap());
    let asked = SourceOffer {
        network: network.clone(),
        ..source_offer()
    };
    let machine = SourceMachine::new(asked, now);
    let mut source = Source { machine, now };
    source.actions();
    source.journalled(offered());
    let actions = source.feed(SourceEvent::PeerConnected);
    let [SourceAction::Send(SourceMessage::Offer(offer))] = &actions[..] else {
        panic!("{actions:?}");
    };
    assert_eq!(offer.network, network);
}

/// What is in a frame, with one part of it put in the place of another.
fn replaced(frame: &[u8], part: &[u8], by: &[u8]) -> Vec<u8> {
    let mut bytes = frame[frame::HEADER_BYTES..].to_vec();
    let found = bytes.windows(part.len()).position(|seen| seen == part);
    let at = found.expect("it is there");
    bytes[at..at + part.len()].copy_from_slice(by);
    bytes
}
