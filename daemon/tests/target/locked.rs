//! A list of file locks that cannot be ends the migration before anything is restored.

use pageferry_proto::wire::code::ErrorCode;
use pageferry_proto::wire::control::{Final, SourceMessage, TargetMessage};
use pageferry_proto::wire::needs::Needs;
use pageferry_proto::wire::shared::LOCKS_FILE;

use super::{Target, USUAL, last};

/// What is said of one lock of process `pid` by a source that says that there are `said`. Nothing
/// is left of the migration then.
async fn failure_of(number: u8, pid: i32, said: u32) -> String {
    let mut target = Target::start(number, &USUAL).await;
    target.offer(Needs::default()).await;
    let heard = target.hear().await;
    assert!(matches!(heard, TargetMessage::Accepted { .. }), "{heard:?}");
    target.send_tree().await;
    let range = r#""start":0,"bytes":null"#;
    let list =
        format!(r#"[{{"pid":{pid},"fd":3,"kind":"posix","exclusive":true,{range},"path":"/f"}}]"#);
    target.send_image(LOCKS_FILE, list.into_bytes()).await;
    let end = Final {
        locks: said,
        ..last(2)
    };
    target.say(SourceMessage::Final(end)).await;
    let failure = loop {
        match target.hear().await {
            TargetMessage::FinalHeld { .. } => {}
            TargetMessage::Failed(failure) => break failure,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(failure.code(), ErrorCode::Malformed, "{failure}");
    target.until(|target| target.left().is_empty()).await;
    failure.text().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_other_than_those_the_source_counted_are_malformed() {
    for (number, said) in [(7, 0), (8, 2)] {
        let text = failure_of(number, 1, said).await;
        assert!(text.contains(&format!("the source says {said}")), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_of_a_process_that_does_not_come_are_malformed() {
    let text = failure_of(9, 77, 1).await;
    assert!(text.contains("for process 77"), "{text}");
}
