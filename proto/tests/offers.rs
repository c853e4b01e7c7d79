//! What an offer names: a workload of some kind, and perhaps a network that is there already.

#![allow(clippy::unwrap_used)]

mod rig;

use pageferry_proto::migration::source::{SourceAction, SourceEvent, SourceMachine, SourceOffer};
use pageferry_proto::migration::timer::Time;
use pageferry_proto::wire::control::{Message, Offer, SourceMessage};
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
