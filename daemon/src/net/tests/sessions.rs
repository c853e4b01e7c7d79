//! Lanes, and what is said on the control stream.

use pageferry_proto::wire::control::{SourceMessage, TargetMessage};
use pageferry_proto::wire::frame;

use super::*;
use crate::net::control::ReceiveError;

const GO: SourceMessage = SourceMessage::Go {
    generation: Generation::FIRST,
};
const STARTED: TargetMessage = TargetMessage::Started {
    generation: Generation::FIRST,
    root_pid: None,
};

#[tokio::test]
async fn messages_arrive_in_order_both_ways() {
    let cluster = Cluster::new();
    let (mut source, mut target, ..) = cluster.session(2).await;
    let mut generation = Generation::FIRST;
    for _ in 0..100 {
        source
            .sender
            .send(SourceMessage::Go { generation })
            .await
            .unwrap();
        let heard = within(target.receiver.next()).await.unwrap();
        assert_eq!(heard, Some(SourceMessage::Go { generation }));
        target.sender.send(STARTED).await.unwrap();
        let heard = within(source.receiver.next()).await.unwrap();
        assert_eq!(heard, Some(STARTED));
        generation = generation.next();
    }
}

#[tokio::test]
async fn last_words_arrive_before_the_lanes_close() {
    let cluster = Cluster::new();
    let (mut source, mut target, ..) = cluster.session(2).await;
    source.sender.send(GO).await.unwrap();
    within(source.sender.finish()).await.unwrap();
    source.lanes.close(ErrorCode::Finished);
    assert_eq!(within(target.lanes.lost()).await, ErrorCode::Finished);
    // What QUIC has delivered is still there to be read, up to the end.
    let heard = within(target.receiver.next()).await;
    assert!(
        matches!(heard, Ok(Some(GO)) | Err(ReceiveError::Read(_))),
        "{heard:?}"
    );
}

/// A daemon that is killed takes its runtime along and says nothing.
#[test]
fn a_listener_that_was_killed_and_started_again_is_noticed_by_its_reset() {
    let cluster = Cluster::new();
    let files = cluster.issue("b");
    let nowhere: SocketAddr = ANY_PORT.parse().unwrap();
    let bind = |listen| {
        Endpoint::bind(EndpointConfig {
            listen,
            credentials: Credentials::load(&files, &node("b")).unwrap(),
            peers: BTreeMap::from([(node("a"), nowhere)]),
        })
    };
    let doomed = tokio::runtime::Runtime::new().unwrap();
    let target = doomed.block_on(async { bind(nowhere).unwrap() });
    let address = target.listen();
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let source = cluster.endpoint("a", &[("b", address)]);
        let peer = node("b");
        let (dialled, accepted) =
            within(async { tokio::join!(source.dial(&peer), target.accept()) }).await;
        let dialled = dialled.unwrap();
        doomed.shutdown_background();
        drop((target, accepted));
        // The runtime gives its socket back in the background.
        let _restarted = within(async {
            loop {
                match bind(address) {
                    Ok(endpoint) => return endpoint,
                    Err(_) => tokio::task::yield_now().await,
                }
            }
        })
        .await;
        let end = within(dialled.closed()).await;
        assert_eq!(end, quinn::ConnectionError::Reset);
    });
}

#[tokio::test]
async fn a_session_is_lost_with_its_first_lane_to_break() {
    let cluster = Cluster::new();
    let (source, mut target, ..) = cluster.session(3).await;
    assert_eq!(source.lanes.stats().lanes, 3);
    drop(source);
    assert_eq!(within(target.lanes.lost()).await, ErrorCode::PeerLost);
    assert!(within(target.data.next()).await.is_none());
}

#[tokio::test]
async fn a_newer_session_of_the_same_node_takes_the_place_of_the_older() {
    let cluster = Cluster::new();
    let (older, older_target, source, mut listener) = cluster.session(2).await;
    let peer = node("b");
    let dialled = lanes::dial(&source, &peer, MIGRATION, 2);
    let (newer, newer_target) = within(async { tokio::join!(dialled, listener.next()) }).await;
    let (mut newer, mut newer_target) = (newer.unwrap(), newer_target.unwrap());
    assert_eq!(within(older.lanes.lost()).await, ErrorCode::Superseded);
    assert_eq!(
        within(older_target.lanes.lost()).await,
        ErrorCode::Superseded
    );
    drop((older, older_target));
    newer.sender.send(GO).await.unwrap();
    assert_eq!(
        within(newer_target.receiver.next()).await.unwrap(),
        Some(GO)
    );
}

#[tokio::test]
async fn another_node_cannot_take_over_a_session() {
    let cluster = Cluster::new();
    let nowhere = ANY_PORT.parse().unwrap();
    let target = Arc::new(cluster.endpoint("b", &[("a", nowhere), ("c", nowhere)]));
    let owner = cluster.endpoint("a", &[("b", target.listen())]);
    let thief = cluster.endpoint("c", &[("b", target.listen())]);
    let mut listener = Listener::start(target);
    let peer = node("b");
    let mut owned = within(lanes::dial(&owner, &peer, MIGRATION, 1))
        .await
        .unwrap();
    let mut held = within(listener.next()).await.unwrap();
    let error = within(lanes::dial(&thief, &peer, MIGRATION, 1))
        .await
        .unwrap_err();
    assert_eq!(error.code(), ErrorCode::MigrationUnknown, "{error}");
    owned.sender.send(GO).await.unwrap();
    assert_eq!(within(held.receiver.next()).await.unwrap(), Some(GO));
}

#[tokio::test]
async fn a_further_lane_without_its_first_is_refused() {
    let cluster = Cluster::new();
    let (source, _listener) = cluster.pair();
    let connection = within(source.dial(&node("b"))).await.unwrap();
    let hello = hello_frame(1, 2);
    let (mut sender, mut receiver) = connection.inner.open_bi().await.unwrap();
    sender.write_all(&hello).await.unwrap();
    assert!(within(receiver.read_chunk(1, true)).await.is_err());
    let reason = within(connection.closed()).await;
    let code = super::super::endpoint::closed_by_peer(&reason);
    assert_eq!(code, Some(ErrorCode::MigrationUnknown));
}

#[tokio::test]
async fn a_lane_that_is_there_already_is_refused() {
    let cluster = Cluster::new();
    let (_source, _target, endpoint, _listener) = cluster.session(2).await;
    let connection = within(endpoint.dial(&node("b"))).await.unwrap();
    let (mut sender, _receiver) = connection.inner.open_bi().await.unwrap();
    sender.write_all(&hello_frame(1, 2)).await.unwrap();
    let reason = within(connection.closed()).await;
    let code = super::super::endpoint::closed_by_peer(&reason);
    assert_eq!(code, Some(ErrorCode::Unexpected));
}

#[tokio::test]
async fn a_frame_that_is_too_long_is_refused_by_its_length() {
    let cluster = Cluster::new();
    let (endpoint, mut listener) = cluster.pair();
    let (_connection, mut sender) = raw_lane(&endpoint).await;
    let mut target = within(listener.next()).await.unwrap();
    let too_long = u32::try_from(frame::MESSAGE_BYTES_MAX + 1).unwrap();
    sender.write_all(&too_long.to_le_bytes()).await.unwrap();
    let error = within(target.receiver.next()).await.unwrap_err();
    assert!(matches!(error, ReceiveError::Frame(_)), "{error}");
}

#[tokio::test]
async fn a_frame_that_is_cut_short_is_an_error() {
    let cluster = Cluster::new();
    let (endpoint, mut listener) = cluster.pair();
    let (_connection, mut sender) = raw_lane(&endpoint).await;
    let mut target = within(listener.next()).await.unwrap();
    sender.write_all(&[200, 0, 0, 0, 1, 2, 3]).await.unwrap();
    sender.finish().unwrap();
    let error = within(target.receiver.next()).await.unwrap_err();
    assert!(matches!(error, ReceiveError::Early), "{error}");
}

#[tokio::test]
async fn a_frame_that_never_ends_is_given_up() {
    let cluster = Cluster::new();
    let (endpoint, mut listener) = cluster.pair();
    let (_connection, mut sender) = raw_lane(&endpoint).await;
    let mut target = within(listener.next()).await.unwrap();
    sender.write_all(&[200, 0, 0, 0, 1, 2, 3]).await.unwrap();
    let error = within(target.receiver.next()).await.unwrap_err();
    assert!(matches!(error, ReceiveError::Stalled), "{error}");
}

#[tokio::test]
async fn a_message_of_the_wrong_role_is_refused() {
    let cluster = Cluster::new();
    let (endpoint, mut listener) = cluster.pair();
    let (_connection, mut sender) = raw_lane(&endpoint).await;
    let mut target = within(listener.next()).await.unwrap();
    let message = pageferry_proto::wire::control::Message::Target(STARTED);
    sender.write_all(&message.encode().unwrap()).await.unwrap();
    let error = within(target.receiver.next()).await.unwrap_err();
    assert!(matches!(error, ReceiveError::Role), "{error}");
}

#[tokio::test]
async fn a_message_whose_sending_was_cancelled_is_sent_before_the_next() {
    let cluster = Cluster::new();
    let (mut source, mut target, ..) = cluster.session(1).await;
    // Polled once and dropped, wherever it was.
    for _ in 0..1000 {
        let send = source.sender.send(GO);
        tokio::select! {
            biased;
            sent = send => sent.unwrap(),
            () = std::future::ready(()) => {}
        }
    }
    let last = SourceMessage::Query {
        generation: Generation::FIRST,
    };
    source.sender.send(last.clone()).await.unwrap();
    for _ in 0..1000 {
        assert_eq!(within(target.receiver.next()).await.unwrap(), Some(GO));
    }
    assert_eq!(within(target.receiver.next()).await.unwrap(), Some(last));
}

pub(super) fn hello_frame(lane: u32, lanes: u32) -> Vec<u8> {
    use pageferry_proto::wire::control::{Hello, Message};
    let hello = Hello {
        version: pageferry_proto::wire::version::Version::CURRENT.number(),
        migration: MIGRATION,
        lane,
        lanes,
    };
    Message::Hello(hello).encode().unwrap()
}

/// A lane 0 whose control stream takes any bytes.
async fn raw_lane(endpoint: &Endpoint) -> (Connection, quinn::SendStream) {
    let connection = within(endpoint.dial(&node("b"))).await.unwrap();
    let (mut sender, mut receiver) = connection.inner.open_bi().await.unwrap();
    sender.write_all(&hello_frame(0, 1)).await.unwrap();
    within(receiver.read_chunk(1, true)).await.unwrap().unwrap();
    (connection, sender)
}
