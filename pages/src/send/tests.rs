use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize};

use pageferry_proto::page::PageIndex;
use tokio::sync::Semaphore;

use super::*;
use crate::digest::Hashing;
use crate::recv::Receiver;
use crate::store::{Store, StoreLimits};
use crate::track::tests::{attach, start};

const SPACE: SpaceId = SpaceId(77);
const BASE: u64 = 0x2000_0000_0000;

fn receiver() -> Receiver {
    let limits = StoreLimits {
        data_pages_max: PageCount(1 << 20),
        spaces_max: 8,
    };
    let store = Store::new(limits);
    store.keep_digests();
    Receiver::new(Arc::new(store), 2)
}

/// Straight into the receiver; counts pages.
struct Loop<'a>(&'a Receiver, AtomicU64);

impl ParcelSink for Loop<'_> {
    type Error = crate::recv::ReceiveError;

    async fn send(&self, parcel: Bytes) -> Result<(), Self::Error> {
        let received = self.0.receive(parcel, |_| Ok(())).await?;
        self.1.fetch_add(received.pages.0, Ordering::Relaxed);
        Ok(())
    }
}

#[tokio::test]
async fn a_running_process_arrives_in_rounds() {
    let mut trial = start();
    let blocks = [
        ("random", 0),
        ("text", 4000),
        ("half-zero", 8000),
        ("0", 12000),
    ];
    for (contents, page) in blocks {
        trial.tell(&format!("map {:#x} 3000 rw", BASE + page * 4096));
        trial.tell(&format!("fill {:#x} 3000 {contents}", BASE + page * 4096));
    }
    let mut space = attach(&trial);
    let (sender, receiver) = (Sender::new(2), receiver());
    for number in 1..4 {
        let round = Round::new(number).unwrap();
        let scan = space.scan().unwrap();
        let sink = Loop(&receiver, AtomicU64::new(0));
        let read = (&space.reader(), Misses::GiveUp);
        let sent = sender.round(SPACE, read, &scan.dirty, round, &sink);
        let sent = sent.await.unwrap();
        assert_eq!(sent.pages, scan.dirty.len());
        assert_eq!(sink.1.load(Ordering::Relaxed), sent.pages.0);
        trial.tell(&format!(
            "fill {:#x} 5 random",
            BASE + 4096 * u64::from(number)
        ));
        trial.tell(&format!(
            "fill {:#x} 5 0",
            BASE + 4096 * u64::from(100 * number)
        ));
        trial.tell(&format!(
            "advise {:#x} 50 dontneed",
            BASE + 4096 * u64::from(500 * number)
        ));
    }
    trial.signal(libc::SIGSTOP);
    let stopped = || {
        let status = |tid| pageferry_sys::task::Status::read(tid).unwrap().state;
        let threads = pageferry_sys::task::threads(trial.pid()).unwrap();
        threads.into_iter().all(|tid| status(tid) == b'T')
    };
    while !stopped() {
        tokio::task::yield_now().await;
    }
    let last = space.final_scan().unwrap();
    let round = Round::new(4).unwrap();
    let sink = Loop(&receiver, AtomicU64::new(0));
    let read = (&space.reader(), Misses::GiveUp);
    let sent = sender.round(SPACE, read, &last.dirty, round, &sink);
    sent.await.unwrap();
    let store = receiver.store().space(SPACE).unwrap();
    let held = store.held().pages();
    assert_eq!(last.live.difference(&held), PageSet::new());
    store.punch(&held.difference(&last.live)).unwrap();
    let mut hashing = Hashing::begin([(SPACE, space.reader(), last.live.clone())], 2);
    let mut equal = PageSet::new();
    while let Some(made) = hashing.next().await {
        let made = made.unwrap();
        assert_eq!(store.first_difference(&made.pages, &made.digests), None);
        equal.union_with(&made.pages);
    }
    assert_eq!(equal, last.live);
    let (data, zero) = store.held_pages();
    assert_eq!(data.0 + zero.0, last.live.len().0);
    assert!(zero.0 >= 4000);
}

#[tokio::test]
async fn a_page_that_no_round_has_sent_is_found() {
    let (mut trial, reader, dirty) = big(20_000);
    let (sender, receiver) = (Sender::new(2), receiver());
    let round = Round::FIRST;
    let sink = Loop(&receiver, AtomicU64::new(0));
    let sent = sender
        .round(SPACE, (&reader, Misses::GiveUp), &dirty, round, &sink)
        .await;
    sent.unwrap();
    // As if a scan had missed it.
    let lost = PageIndex::containing(BASE + 12_345 * 4096);
    trial.tell(&format!("fill {:#x} 1 9", lost.address()));
    let store = receiver.store().space(SPACE).unwrap();
    let mut hashing = Hashing::begin([(SPACE, reader, dirty)], 2);
    let mut found = Vec::new();
    while let Some(made) = hashing.next().await {
        let made = made.unwrap();
        found.extend(store.first_difference(&made.pages, &made.digests));
    }
    assert!(found.contains(&lost), "{found:?}");
}

/// Takes parcels only when it is told to, and keeps them.
#[derive(Default)]
struct Slow {
    kept: Mutex<Vec<Bytes>>,
    most: AtomicUsize,
}

impl ParcelSink for Slow {
    type Error = io::Error;

    async fn send(&self, parcel: Bytes) -> Result<(), Self::Error> {
        let kept = || self.kept.lock().unwrap();
        kept().push(parcel);
        self.most.fetch_max(kept().len(), Ordering::Relaxed);
        // Until as many are kept as there can be, or nothing comes any more.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        kept().pop();
        Ok(())
    }
}

fn big(pages: u64) -> (pageferry_trial::Trial, Arc<Reader>, PageSet) {
    let mut trial = start();
    trial.tell(&format!("map {BASE:#x} {pages} rw"));
    trial.tell(&format!("fill {BASE:#x} {pages} 3"));
    let mut space = attach(&trial);
    let dirty = space.scan().unwrap().dirty;
    (trial, space.reader(), dirty)
}

#[tokio::test]
async fn a_slow_network_bounds_the_parcels_in_memory() {
    let (_trial, reader, dirty) = big(40_000);
    let sink = Slow::default();
    let sender = Sender::new(2);
    let sent = sender
        .round(
            SPACE,
            (&reader, Misses::GiveUp),
            &dirty,
            Round::FIRST,
            &sink,
        )
        .await
        .unwrap();
    assert_eq!(sent.pages, dirty.len());
    assert!(sink.most.load(Ordering::Relaxed) <= SENDS_MAX);
}

/// Fails after some parcels.
struct Broken(Semaphore);

impl ParcelSink for Broken {
    type Error = io::Error;

    async fn send(&self, _: Bytes) -> Result<(), Self::Error> {
        match self.0.try_acquire() {
            Ok(permit) => {
                permit.forget();
                Ok(())
            }
            Err(_) => Err(io::Error::other("broken")),
        }
    }
}

#[tokio::test]
async fn a_broken_network_ends_the_round_and_the_sender_lives() {
    let (_trial, reader, dirty) = big(40_000);
    let sender = Sender::new(2);
    let sink = Broken(Semaphore::new(3));
    let sent = sender
        .round(
            SPACE,
            (&reader, Misses::GiveUp),
            &dirty,
            Round::FIRST,
            &sink,
        )
        .await;
    assert!(matches!(sent, Err(SendError::Send { .. })));
    let sink = Slow::default();
    sender
        .round(
            SPACE,
            (&reader, Misses::GiveUp),
            &dirty,
            Round::FIRST,
            &sink,
        )
        .await
        .unwrap();
}

#[tokio::test]
async fn the_end_of_the_process_ends_the_round() {
    let (trial, reader, dirty) = big(10);
    drop(trial);
    let sender = Sender::new(2);
    let sent = sender
        .round(
            SPACE,
            (&reader, Misses::GiveUp),
            &dirty,
            Round::FIRST,
            &Slow::default(),
        )
        .await;
    assert!(matches!(sent, Err(SendError::Read { .. })));
}
