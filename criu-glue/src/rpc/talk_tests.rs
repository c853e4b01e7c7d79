use super::super::event::Response;
use super::super::message::CriuNotify;
use super::*;

const CLIENT: By = By::Client { told: true };

fn notification(script: &str) -> Packet {
    let response = CriuResponse {
        kind: RequestType::Notify as i32,
        success: true,
        notify: Some(CriuNotify {
            script: Some(script.to_owned()),
            pid: None,
        }),
        ..CriuResponse::default()
    };
    response.encode_to_vec().into()
}

fn response() -> Packet {
    let response = CriuResponse {
        kind: RequestType::Dump as i32,
        success: true,
        ..CriuResponse::default()
    };
    response.encode_to_vec().into()
}

/// A conversation in which `by` has asked for a dump, and CRIU waits at `post-dump`.
fn at_the_gate(by: By) -> Talk {
    let mut talk = Talk::default();
    talk.request(RequestType::Dump as i32, by).expect("quiet");
    talk.heard(notification("post-dump")).expect("its turn");
    talk
}

/// What CRIU hears.
fn said(talk: &Talk, success: bool) -> Vec<u8> {
    let answer = talk.answer(success).expect("something waits");
    answer.packet().bytes.clone()
}

fn success(bytes: &[u8]) -> Option<bool> {
    CriuRequest::decode(bytes)
        .expect("an answer")
        .notify_success
}

#[test]
fn whoever_speaks_out_of_turn_is_named() {
    let mut talk = Talk::default();
    let criu = |told| matches!(told, Err(TalkError::OutOfTurn { who: "criu" }));
    assert!(criu(talk.heard(notification("pre-dump"))));
    assert!(matches!(talk.answer(true), Err(TalkError::NothingToAnswer)));
    talk.request(1, By::Us).expect("quiet");
    assert!(matches!(talk.request(1, By::Us), Err(TalkError::Busy)));
    assert!(matches!(talk.answer(true), Err(TalkError::NothingToAnswer)));
    talk.heard(notification("pre-dump")).expect("its turn");
    assert!(criu(talk.heard(response())));
    assert!(matches!(
        talk.request(1, By::Us),
        Err(TalkError::AnswerOwed)
    ));
    let client = talk.client_said(answer(true));
    assert!(matches!(
        client,
        Err(TalkError::OutOfTurn { who: "the client" })
    ));
    assert_eq!(talk.waiting(), Some(&NotifyScript::PreDump));
}

#[test]
fn a_request_is_done_with_its_response_and_another_may_follow() {
    let mut talk = at_the_gate(By::Us);
    assert_eq!(success(&said(&talk, true)), Some(true));
    talk.answered();
    assert!(talk.is_under_way());
    let event = talk.heard(response()).expect("its turn");
    assert!(matches!(
        event,
        Event::Response(Response { success: true, .. })
    ));
    assert!(!talk.is_under_way() && talk.is_about(RequestType::Dump));
    assert!(talk.take_response().is_none(), "nobody else has asked");
    talk.request(10, By::Us).expect("quiet");
}

#[test]
fn what_a_client_says_is_passed_on_as_it_is() {
    let mut talk = at_the_gate(CLIENT);
    assert_eq!(
        talk.untold().map(|packet| packet.bytes.clone()),
        Some(notification("post-dump").bytes)
    );
    talk.told();
    assert!(talk.untold().is_none() && talk.client_thinks());
    // Yes before the client has said so is none.
    assert!(matches!(talk.answer(true), Err(TalkError::AnswerOwed)));
    // type 6, opts { external "x" }, notify_success, and a field that nobody knows.
    let said_by_client = vec![8, 6, 18, 4, 0xaa, 2, 1, b'x', 24, 1, 0xc0, 0x3e, 7];
    assert!(
        talk.client_said(said_by_client.clone().into())
            .expect("its turn")
    );
    assert_eq!(talk.client_agrees(), Some(true));
    assert_eq!(said(&talk, true), said_by_client);
    assert_eq!(success(&said(&talk, false)), Some(false));
    talk.answered();
    talk.heard(response()).expect("its turn");
    let (kind, packet) = talk.take_response().expect("the client has asked");
    assert_eq!(
        (kind, packet.map(|packet| packet.bytes)),
        (1, Some(response().bytes))
    );
    assert!(talk.take_response().is_none(), "once");
}

#[test]
fn a_clients_no_is_never_made_a_yes() {
    let mut talk = at_the_gate(CLIENT);
    talk.told();
    talk.client_said(answer(false)).expect("its turn");
    assert_eq!(talk.client_agrees(), Some(false));
    assert_eq!(success(&said(&talk, true)), Some(false));
}

#[test]
fn what_a_client_says_too_late_is_not_taken_for_its_next_answer() {
    let mut talk = at_the_gate(CLIENT);
    talk.told();
    assert_eq!(success(&said(&talk, false)), Some(false));
    talk.answered();
    talk.heard(notification("network-unlock"))
        .expect("its turn");
    talk.told();
    assert!(!talk.client_said(answer(false)).expect("owed"));
    assert!(talk.client_thinks());
    assert!(talk.client_said(answer(true)).expect("its turn"));
    assert_eq!(talk.client_agrees(), Some(true));
}

#[test]
fn a_client_that_wants_no_notifications_is_told_of_none() {
    let talk = at_the_gate(By::Client { told: false });
    assert!(talk.untold().is_none());
    assert_eq!(success(&said(&talk, true)), Some(true));
}

#[test]
fn without_its_client_a_conversation_is_ours() {
    let mut talk = at_the_gate(CLIENT);
    talk.told();
    talk.client_gone();
    assert_eq!(talk.waiting(), Some(&NotifyScript::PostDump));
    assert!(talk.untold().is_none());
    assert_eq!(success(&said(&talk, true)), Some(true));
    talk.answered();
    talk.heard(response()).expect("its turn");
    assert!(talk.take_response().is_none());
}

#[test]
fn nonsense_of_a_client_leaves_the_notification_waiting() {
    let mut talk = at_the_gate(CLIENT);
    talk.told();
    let nonsense = talk.client_said(vec![0xff].into());
    assert!(
        matches!(nonsense, Err(TalkError::Decode(_))),
        "{nonsense:?}"
    );
    let request = talk.client_said(vec![8, 1].into());
    assert!(matches!(
        request,
        Err(TalkError::OutOfTurn { who: "the client" })
    ));
    assert_eq!(success(&said(&talk, false)), Some(false));
}

#[test]
fn of_a_criu_that_is_gone_nobody_is_told() {
    let mut talk = at_the_gate(CLIENT);
    talk.criu_gone();
    assert!(talk.untold().is_none() && talk.waiting().is_none());
    assert!(matches!(talk.answer(true), Err(TalkError::NothingToAnswer)));
    let (kind, packet) = talk.take_response().expect("the client has asked");
    assert!(kind == 1 && packet.is_none());
}
