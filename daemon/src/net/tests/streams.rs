//! Data streams.

use bytes::Bytes;
use pageferry_proto::wire::stream::{DIGESTS_BYTES_MAX, StreamKind, StreamPrefix};
use quinn::ReadError;

use super::*;
use crate::net::stream::{DataSender, ReadStreamError};
use crate::net::tuning::{DATA_STREAMS, LANE_WINDOW_BYTES};

async fn read_all(target: &mut TargetSession) -> (StreamKind, Vec<u8>) {
    let mut stream = within(target.data.next()).await.unwrap();
    assert_eq!(stream.migration, MIGRATION);
    let mut bytes = Vec::new();
    within(stream.reader.read_to_end(&mut bytes)).await.unwrap();
    (stream.kind, bytes)
}

#[tokio::test]
async fn streams_arrive_whole_over_all_lanes() {
    let cluster = Cluster::new();
    let (source, mut target, ..) = cluster.session(3).await;
    let body = |n: u8| Bytes::from(vec![n; 300_000 + usize::from(n)]);
    let sending = tokio::spawn(send_each(source.data.clone(), (0..30).map(body).collect()));
    let mut seen = Vec::new();
    for _ in 0..30 {
        let (kind, bytes) = read_all(&mut target).await;
        assert_eq!(kind, StreamKind::Parcel);
        assert_eq!(bytes, body(bytes[0]));
        seen.push(bytes[0]);
    }
    sending.await.unwrap();
    seen.sort_unstable();
    assert_eq!(seen, (0..30).collect::<Vec<u8>>());
}

async fn send_each(data: DataSender, bodies: Vec<Bytes>) {
    let send = |body| {
        let data = data.clone();
        tokio::spawn(async move { data.send_stream(StreamKind::Parcel, body).await.unwrap() })
    };
    let sent: Vec<_> = bodies.into_iter().map(send).collect();
    for one in sent {
        one.await.unwrap();
    }
}

#[tokio::test]
async fn a_stream_is_read_in_pieces_of_any_size() {
    let cluster = Cluster::new();
    let (source, mut target, ..) = cluster.session(1).await;
    let body: Bytes = (0..=255u8).cycle().take(100_000).collect();
    let data = source.data.clone();
    let sent = body.clone();
    tokio::spawn(async move { data.send_stream(StreamKind::Digests, sent).await });
    let mut reader = within(target.data.next()).await.unwrap().reader;
    let mut head = [0; 1234];
    within(reader.read_exact(&mut head)).await.unwrap();
    assert_eq!(head, body[..1234]);
    let first = within(reader.chunk()).await.unwrap().unwrap();
    let mut rest = Vec::new();
    within(reader.read_to_end(&mut rest)).await.unwrap();
    assert_eq!([&first, &rest[..]].concat(), body[1234..]);
    assert!(within(reader.chunk()).await.unwrap().is_none());
    let error = within(reader.read_exact(&mut [0; 3])).await.unwrap_err();
    assert!(matches!(error, ReadStreamError::Early(3)), "{error}");
}

#[tokio::test]
async fn streams_that_nobody_reads_do_not_hold_up_the_one_that_is_read() {
    let cluster = Cluster::new();
    let (source, mut target, ..) = cluster.session(1).await;
    let large = Bytes::from(vec![1; LANE_WINDOW_BYTES as usize]);
    let bodies = vec![large.clone(); DATA_STREAMS as usize];
    let _sending = tokio::spawn(send_each(source.data.clone(), bodies));
    let mut waiting = Vec::new();
    for _ in 0..DATA_STREAMS {
        waiting.push(within(target.data.next()).await.unwrap());
    }
    // The last one to come is read first, to its end.
    let mut bytes = Vec::new();
    let last = waiting.last_mut().unwrap();
    let read = within(last.reader.read_to_end(&mut bytes)).await;
    let error = read.err();
    // It is larger than a parcel may be, which is as good an end as any.
    assert!(
        matches!(error, Some(ReadStreamError::TooLong(_))),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_stream_longer_than_its_kind_allows_is_refused() {
    let cluster = Cluster::new();
    let (source, mut target, ..) = cluster.session(1).await;
    let body = Bytes::from(vec![0; DIGESTS_BYTES_MAX + 1]);
    tokio::spawn(async move { source.data.send_stream(StreamKind::Digests, body).await });
    let mut reader = within(target.data.next()).await.unwrap().reader;
    let error = within(reader.read_to_end(&mut Vec::new()))
        .await
        .unwrap_err();
    assert!(matches!(error, ReadStreamError::TooLong(_)), "{error}");
}

#[tokio::test]
async fn a_sender_that_gives_up_resets_its_stream() {
    let cluster = Cluster::new();
    let (source, mut target, ..) = cluster.session(1).await;
    let mut writer = source.data.open(StreamKind::ImageFile).await.unwrap();
    writer.write(Bytes::from_static(b"half a")).await.unwrap();
    let mut reader = within(target.data.next()).await.unwrap().reader;
    let mut half = [0; 6];
    within(reader.read_exact(&mut half)).await.unwrap();
    drop(writer);
    let error = within(reader.chunk()).await.unwrap_err();
    let aborted = super::super::endpoint::close_code(ErrorCode::Aborted);
    match error {
        ReadStreamError::Read(ReadError::Reset(code)) => assert_eq!(code, aborted),
        other => panic!("{other}"),
    }
    // And the session goes on.
    let body = Bytes::from_static(b"whole");
    source
        .data
        .send_stream(StreamKind::LiveSet, body.clone())
        .await
        .unwrap();
    assert_eq!(
        read_all(&mut target).await,
        (StreamKind::LiveSet, body.to_vec())
    );
}

#[tokio::test]
async fn a_reader_that_gives_up_stops_the_sender() {
    let cluster = Cluster::new();
    let (source, mut target, ..) = cluster.session(1).await;
    let data = source.data.clone();
    let endless = tokio::spawn(async move {
        let mut writer = data.open(StreamKind::ImageFile).await.unwrap();
        loop {
            writer.write(Bytes::from(vec![0; 1 << 20])).await?;
        }
        #[expect(unreachable_code, reason = "names the type of the block")]
        Ok::<(), crate::net::stream::SendStreamError>(())
    });
    let stream = within(target.data.next()).await.unwrap();
    stream.reader.refuse(ErrorCode::Capacity);
    within(endless).await.unwrap().unwrap_err();
}

#[tokio::test]
async fn a_stream_with_a_wrong_prefix_ends_the_session() {
    for prefix in [
        [0; StreamPrefix::BYTES],
        StreamPrefix {
            kind: StreamKind::Parcel,
            migration: MigrationId::new([1; 16]),
        }
        .encode(),
    ] {
        let cluster = Cluster::new();
        let (endpoint, mut listener) = cluster.pair();
        let connection = within(endpoint.dial(&node("b"))).await.unwrap();
        let (mut sender, mut receiver) = connection.inner.open_bi().await.unwrap();
        sender
            .write_all(&super::sessions::hello_frame(0, 1))
            .await
            .unwrap();
        within(receiver.read_chunk(1, true)).await.unwrap().unwrap();
        let target = within(listener.next()).await.unwrap();
        let mut stream = connection.inner.open_uni().await.unwrap();
        stream.write_all(&prefix).await.unwrap();
        assert_eq!(within(target.lanes.lost()).await, ErrorCode::Malformed);
    }
}
