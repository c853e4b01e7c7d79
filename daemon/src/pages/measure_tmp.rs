use crate::pages::track::tests::{attach, start};
use crate::pages::{decode::*, digest, encode::*, recv::*, send::*, store::*};
use bytes::Bytes;
use pageferry_proto::id::{Round, SpaceId};
use pageferry_proto::page::{PageCount, PageIndex, PageRun};
use pageferry_proto::set::PageSet;
use std::sync::Arc;
use std::time::Instant;

const BASE: u64 = 0x2000_0000_0000;
struct Loop<'a>(&'a Receiver);
impl ParcelSink for Loop<'_> {
    type Error = ReceiveError;
    async fn send(&self, parcel: Bytes) -> Result<(), Self::Error> {
        self.0.receive(parcel).await.map(drop)
    }
}
struct Nothing;
impl ParcelSink for Nothing {
    type Error = std::io::Error;
    async fn send(&self, _p: Bytes) -> Result<(), Self::Error> {
        Ok(())
    }
}
fn rate(bytes: u64, since: Instant) -> f64 {
    bytes as f64 / 1e9 / since.elapsed().as_secs_f64()
}
fn ms(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1e3
}
fn memcpy() -> f64 {
    let a = vec![7u8; 256 << 20];
    let mut b = vec![1u8; 256 << 20];
    b.copy_from_slice(&a);
    let t = Instant::now();
    for _ in 0..4 {
        b.copy_from_slice(&a);
        std::hint::black_box(&mut b);
    }
    rate(1 << 30, t)
}

#[tokio::test]
async fn measure() {
    println!("memcpy warm {:.2} GB/s", memcpy());
    let pages: u64 = std::env::var("PAGES").map_or(262144, |p| p.parse().unwrap());
    let mut trial = start();
    trial.tell(&format!("map {BASE:#x} {pages} rw"));
    let t = Instant::now();
    trial.tell(&format!("fill {BASE:#x} {pages} random"));
    println!("fill fresh {:.1} ms", ms(t));
    let t = Instant::now();
    trial.tell(&format!("fill {BASE:#x} {pages} random"));
    println!("fill again {:.1} ms", ms(t));
    for _ in 0..3 {
        let t = Instant::now();
        let s = attach(&trial);
        println!(
            "attach {:.2} ms, stopped {:?} {} threads",
            ms(t),
            s.attached().stopped,
            s.attached().threads
        );
        let t = Instant::now();
        s.detach();
        println!("detach {:.2} ms", ms(t));
    }
    let mut space = attach(&trial);
    let t = Instant::now();
    let scan = space.scan().unwrap();
    println!("scan all dirty {:.2} ms: {} pages", ms(t), scan.dirty.len());
    for _ in 0..3 {
        let t = Instant::now();
        let scan = space.scan().unwrap();
        println!(
            "scan idle {:.2} ms: {} pages in {} runs",
            ms(t),
            scan.dirty.len(),
            scan.dirty.runs().len()
        );
    }
    let t = Instant::now();
    trial.tell(&format!("fill {BASE:#x} {pages} random"));
    println!("fill protected {:.1} ms", ms(t));
    let t = Instant::now();
    space.scan().unwrap();
    println!("scan all dirty again {:.2} ms", ms(t));
    for n in [1000, 18000, 60000] {
        let step = pages / n;
        let t = Instant::now();
        trial.tell(&format!("scatter {BASE:#x} {n} {step}"));
        println!("scatter {n} took {:.1} ms", ms(t));
        let t = Instant::now();
        let last = space.final_scan().unwrap();
        println!(
            "final scan {n} scattered {:.2} ms (own {:?}) dirty {} in {} runs live {}",
            ms(t),
            last.duration,
            last.dirty.len(),
            last.dirty.runs().len(),
            last.live.len()
        );
        let t = Instant::now();
        let scan = space.scan().unwrap();
        println!(
            "scan {n} scattered {:.2} ms: {} in {} runs",
            ms(t),
            scan.dirty.len(),
            scan.dirty.runs().len()
        );
        let dirty = scan.dirty.clone();
        let reader = space.reader();
        let mut buffer = vec![0u8; 4 << 20];
        let t = Instant::now();
        for part in dirty.partition(PageCount(1024)) {
            reader.read(&part, &mut buffer).unwrap();
        }
        println!("read scattered {:.2} GB/s", rate(dirty.len().bytes(), t));
    }
    let t = Instant::now();
    space.record_smaps().unwrap();
    println!("record smaps {:.2} ms", ms(t));
    for _ in 0..2 {
        let t = Instant::now();
        let last = space.final_scan().unwrap();
        println!(
            "final scan idle with record {:.2} ms rendered {}",
            ms(t),
            last.smaps_rendered
        );
    }
    let t = Instant::now();
    space.compare_smaps().unwrap();
    println!("compare smaps {:.2} ms", ms(t));
    let all = PageSet::from(PageRun::new(PageIndex(BASE >> 12), PageCount(pages)).unwrap());
    let reader = space.reader();
    let mut buffer = vec![0u8; 4 << 20];
    for _ in 0..2 {
        let t = Instant::now();
        for part in all.partition(PageCount(1024)) {
            reader.read(&part, &mut buffer).unwrap();
        }
        println!("read 1 thread {:.2} GB/s", rate(all.len().bytes(), t));
    }
    println!("memcpy warm {:.2} GB/s", memcpy());
    for kind in ["random", "text", "half-zero", "3", "0"] {
        trial.tell(&format!("fill {BASE:#x} 32768 {kind}"));
        let mut encoder = Encoder::new();
        let mut parcels = Vec::new();
        let part_set =
            PageSet::from(PageRun::new(PageIndex(BASE >> 12), PageCount(32768)).unwrap());
        let parts = part_set.partition(PageCount(1024));
        let mut spent = 0.0;
        for part in &parts {
            buffer.resize(4 << 20, 0);
            reader.read(part, &mut buffer).unwrap();
            let mut parcel = Vec::with_capacity(5 << 20);
            parcel.resize(5 << 20, 1);
            let t = Instant::now();
            encoder.encode(SpaceId(1), Round::FIRST, part, &mut buffer, &mut parcel);
            spent += t.elapsed().as_secs_f64();
            parcels.push(parcel);
        }
        let wire: usize = parcels.iter().map(Vec::len).sum();
        let raw = 32768.0 * 4096.0;
        print!(
            "{kind}: encode {:.2} GB/s wire {:.3};",
            raw / 1e9 / spent,
            wire as f64 / raw
        );
        let store = Store::new(StoreLimits {
            data_pages_max: PageCount(1 << 30),
            spaces_max: 4,
        });
        let mut decoder = Decoder::new();
        for _ in 0..3 {
            let t = Instant::now();
            for parcel in &parcels {
                store
                    .take(&mut decoder, &Parcel::parse(parcel).unwrap())
                    .unwrap();
            }
            print!(
                " decode {:.2} GB/s",
                32768.0 * 4096.0 / 1e9 / t.elapsed().as_secs_f64()
            );
        }
        println!();
    }
    for kind in ["random", "text", "half-zero"] {
        trial.tell(&format!("fill {BASE:#x} {pages} {kind}"));
        for threads in [1, 2] {
            let sender = Sender::new(threads);
            let sent = sender
                .round(SpaceId(1), &reader, &all, Round::FIRST, &Nothing)
                .await
                .unwrap();
            println!(
                "{kind}: pipeline to nowhere, {threads} threads {:.2} GB/s",
                sent.raw_bytes as f64 / 1e9 / sent.duration.as_secs_f64()
            );
            let receiver = Receiver::new(
                Arc::new(Store::new(StoreLimits {
                    data_pages_max: PageCount(1 << 30),
                    spaces_max: 4,
                })),
                threads,
            );
            for _ in 0..2 {
                let sent = sender
                    .round(SpaceId(1), &reader, &all, Round::FIRST, &Loop(&receiver))
                    .await
                    .unwrap();
                println!(
                    "{kind}: pipeline to store {:.2} GB/s",
                    sent.raw_bytes as f64 / 1e9 / sent.duration.as_secs_f64()
                );
            }
            if threads == 2 {
                let space = receiver.store().space(SpaceId(1)).unwrap();
                let t = Instant::now();
                let a = space.digests(&all).unwrap();
                println!("digest store {:.2} GB/s", rate(all.len().bytes(), t));
                let t = Instant::now();
                let b = digest::of_process(&reader, &all).unwrap();
                println!("digest process {:.2} GB/s", rate(all.len().bytes(), t));
                assert_eq!(a, b.digests);
            }
        }
    }
    println!("memcpy warm {:.2} GB/s", memcpy());
    trial.tell("threads 200");
    for _ in 0..5 {
        let s = {
            drop(space);
            attach(&trial)
        };
        println!(
            "200 threads: stopped {:?} {}",
            s.attached().stopped,
            s.attached().threads
        );
        space = s;
    }
}
