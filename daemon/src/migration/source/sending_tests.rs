use pageferry_proto::id::MemberIndex;
use tokio::sync::watch;

use super::*;
use crate::migration::source::images;
use crate::net::tests::{Cluster, within};

/// Its node answers every packet, as one does of which only the daemon's tasks are stuck; so the
/// connection lives, and what was sent fills all windows and stays there.
#[tokio::test]
async fn a_target_that_acknowledges_and_does_not_read_holds_up_nothing_that_is_cut() {
    let cluster = Cluster::new();
    let (source, target, ..) = cluster.session(2).await;
    let folder = tempfile::tempdir().unwrap();
    // Twice what two lanes take on both sides.
    std::fs::write(folder.path().join("pages-1.img"), vec![7; 64 << 20]).unwrap();
    let body = Bytes::from(vec![7; 64 << 20]);
    let (cut, cancelled) = watch::channel(false);
    let waits = Waits::new(cancelled);
    let sending = tokio::spawn({
        let (waits, data, path) = (waits.clone(), source.data.clone(), folder.path().to_owned());
        async move {
            let of = (MemberIndex::FIRST, &*path);
            let images = waits.on(Wait::Images, images::send(&data, Generation::FIRST, of));
            let live = waits.on(Wait::LiveSets, data.send_stream(StreamKind::LiveSet, body));
            let (images, live) = tokio::join!(images, live);
            (images.is_err(), live.is_err())
        }
    });
    while waits.list().len() < 2 {
        tokio::task::yield_now().await;
    }
    assert!(!sending.is_finished());
    cut.send_replace(true);
    assert_eq!(within(sending).await.unwrap(), (true, true));
    assert_eq!(waits.list(), []);
    drop(target);
}
