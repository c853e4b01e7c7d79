//! What a target tells of its spans: its bytes, its limits, and that nothing follows from it.

#![allow(clippy::unwrap_used)]

mod rig;

use expect_test::expect;
use pageferry_proto::migration::timeline::{
    Asked, EXCHANGES_MAX, Exchange, SPANS_MAX, Span, Spans,
};
use pageferry_proto::wire::control::{ControlError, Message, SourceMessage, TargetMessage};
use pageferry_proto::wire::frame;
use rig::*;

fn span() -> Span {
    Span {
        name: "criu_tree".to_owned(),
        detail: "1".to_owned(),
        begin: 0x10,
        end: 0x20,
    }
}

fn spans() -> Spans {
    let exchange = Exchange {
        asked: Asked::Round(7),
        heard: 1,
        said: 2,
    };
    Spans {
        boot: "b".to_owned(),
        spans: vec![span()],
        exchanges: vec![exchange],
        dropped: 3,
        last: true,
    }
}

fn message(change: impl FnOnce(&mut Spans)) -> Message {
    let mut spans = spans();
    change(&mut spans);
    TargetMessage::Spans(Box::new(spans)).into()
}

fn back(message: &Message) -> Result<Message, ControlError> {
    let bytes = message.encode().unwrap();
    Message::decode(&bytes[frame::HEADER_BYTES..])
}

// clause: N-6
#[test]
fn they_keep_their_bytes_and_read_back() {
    let message = message(|_| ());
    let bytes = message.encode().unwrap();
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    expect![["44000000fa03410a016212200a09637269755f747265651201311910000000000000002120000000000000001a160802100719010000000000000021020000000000000020032801"]].assert_eq(&hex);
    assert_eq!(back(&message), Ok(message));
}

#[test]
fn what_is_beyond_a_limit_is_refused_by_name() {
    let refused = |field: &str, change: fn(&mut Spans)| {
        let error = back(&message(change)).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    };
    refused("spans.spans", |spans| {
        spans.spans = vec![span(); SPANS_MAX + 1];
    });
    refused("spans.exchanges", |spans| {
        spans.exchanges = vec![spans.exchanges[0]; EXCHANGES_MAX + 1];
    });
    refused("spans.boot", |spans| spans.boot = "\u{1b}[2J".to_owned());
    refused("spans.boot", |spans| spans.boot = "b".repeat(37));
    refused("span.name", |spans| spans.spans[0].name = String::new());
    refused("span.name", |spans| spans.spans[0].name = "A".to_owned());
    refused("span.name", |spans| spans.spans[0].name = "a".repeat(33));
    refused("span.detail", |spans| {
        spans.spans[0].detail = "\n".to_owned();
    });
    refused("span.end", |spans| spans.spans[0].end = 0);
    let all = message(|spans| spans.spans = vec![span(); SPANS_MAX]);
    assert_eq!(back(&all), Ok(all));
}

#[test]
fn an_offer_says_that_they_are_taken_and_a_machine_does_nothing_for_them() {
    let mut taking = offer();
    taking.spans = true;
    let encode = |offer| Message::from(SourceMessage::Offer(Box::new(offer))).encode();
    let (bytes, none) = (encode(taking).unwrap(), encode(offer()).unwrap());
    assert_eq!(bytes.len(), none.len() + 2);
    assert!(bytes.ends_with(b"\x78\x01"), "{bytes:x?}");
    let mut source = Source::copying();
    let told = TargetMessage::Spans(Box::new(spans()));
    assert_eq!(source.hear(told), []);
}
