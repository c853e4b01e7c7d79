//! The workloads, systems and links of the benchmark.

use super::published::{KUBESPT_1, KUBESPT_2, SWIFTBATON};
use super::subject::{Kind, Packing, What};
use crate::content::Content;
use crate::mover::Mover;
use crate::mover::criu_lazy::CriuLazy;
use crate::mover::criu_page_server::CriuPageServer;
use crate::mover::disk_tar::DiskTar;
use crate::mover::pageferry::Pageferry;
use crate::mover::redis_aof::RedisAof;
use crate::mover::redis_replica::RedisReplica;
use crate::mover::runc_checkpoint::RuncCheckpoint;
use crate::mover::stock_criu::StockCriu;
use crate::workload::contained::Runtime;
use crate::workload::whose::Whose;
use crate::writer::options::Pattern;

/// One way to move a workload.
#[derive(Clone, Copy, Debug)]
pub struct System {
    pub name: &'static str,
    pub summary: &'static str,
    pub mover: &'static dyn Mover,
    pub packing: Packing,
    /// Redis moves itself: nothing else can be moved like that.
    pub only_redis: bool,
    /// Whether the nodes need more than their image for it.
    pub needs_layer: bool,
    /// How many times its memory a workload takes on this machine while it is moved.
    pub copies: u64,
    /// Whether it is in the quick set.
    pub quick: bool,
}

const fn system(name: &'static str, summary: &'static str, mover: &'static dyn Mover) -> System {
    System {
        name,
        summary,
        mover,
        packing: Packing::Bare,
        only_redis: false,
        needs_layer: false,
        // Itself, the images at both nodes, and what is restored.
        copies: 4,
        quick: true,
    }
}

const fn container(name: &'static str, summary: &'static str, runtime: Runtime) -> System {
    System {
        packing: Packing::Container(Whose::Runtime(runtime)),
        needs_layer: true,
        copies: 3,
        quick: false,
        ..system(name, summary, &Pageferry)
    }
}

const fn of_redis(
    name: &'static str,
    summary: &'static str,
    mover: &'static dyn Mover,
    packing: Packing,
) -> System {
    System {
        packing,
        only_redis: true,
        ..system(name, summary, mover)
    }
}

pub static SYSTEMS: [System; 12] = [
    System {
        copies: 3,
        ..system(
            "pageferry",
            "pre-copy by pageferry, of a bare tree",
            &Pageferry,
        )
    },
    container(
        "pageferry-runc",
        "pre-copy by pageferry, of a container of runc",
        Runtime::Runc,
    ),
    container(
        "pageferry-crun",
        "pre-copy by pageferry, of a container of crun",
        Runtime::Crun,
    ),
    container(
        "pageferry-podman",
        "pre-copy by pageferry, of a container of podman",
        Runtime::Podman,
    ),
    system(
        "criu-stop-copy",
        "stock CRIU: dump, copy, restore",
        &StockCriu,
    ),
    system(
        "criu-page-server",
        "stock CRIU: pages go from the dump to its page server at the target",
        &CriuPageServer { pre_dumps: 0 },
    ),
    system(
        "criu-pre-copy",
        "stock CRIU: two rounds of pre-dump to its page server, then the dump",
        &CriuPageServer { pre_dumps: 2 },
    ),
    system(
        "criu-lazy",
        "stock CRIU: post-copy, by lazy-pages and the page server in the dump, with \
         fs.pipe-max-size=4194304",
        &CriuLazy,
    ),
    System {
        needs_layer: true,
        ..system(
            "disk-tar-zstd-tls",
            "as by a disk: dump, tar, zstd -1, TLS, tar, restore",
            &DiskTar,
        )
    },
    System {
        packing: Packing::RuncJoined,
        quick: false,
        ..system(
            "runc-checkpoint",
            "runc checkpoint, copy, runc restore",
            &RuncCheckpoint,
        )
    },
    of_redis(
        "redis-aof",
        "drain and redeploy: Redis ends, and starts at the target from its append-only file on \
         storage of both nodes, which is in memory here",
        &RedisAof,
        Packing::AppendOnly,
    ),
    of_redis(
        "redis-replica",
        "Redis' own: a replica at the target, FAILOVER, and the address goes there",
        &RedisReplica,
        Packing::Bare,
    ),
];

/// One workload, and whether it is in the quick set.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub kind: Kind,
    pub quick: bool,
}

const fn entry(name: &'static str, summary: &'static str, content: Content, what: What) -> Entry {
    Entry {
        kind: Kind {
            name,
            summary,
            content,
            what,
        },
        quick: false,
    }
}

const fn quick(entry: Entry) -> Entry {
    Entry {
        quick: true,
        ..entry
    }
}

/// As in demonstrations of stateful pods: memory that is there, and a counter.
const fn counter(
    name: &'static str,
    summary: &'static str,
    content: Content,
    memory: usize,
) -> Entry {
    let what = What::Writer {
        memory,
        hot: 4096,
        rate: 10,
        pattern: Pattern::Uniform,
    };
    entry(name, summary, content, what)
}

/// Of values of 1,000 bytes, under 4,000 requests per second.
const fn redis(bytes: u64, clients: u32) -> What {
    What::Redis {
        bytes,
        value_bytes: 1000,
        clients,
        per_second: Some(4_000),
    }
}

pub static KINDS: [Entry; 16] = [
    quick(entry(
        "redis-ycsb-a",
        "Redis, 256 MiB of values of 1,000 bytes, YCSB-A: 8 clients, 4,000 requests/s, half of \
         them updates, Zipf 0.99",
        Content::Random,
        redis(256 << 20, 8),
    )),
    quick(entry(
        "writer",
        "the self-checking writer, 256 MiB, 5,000 pages/s (20 MB/s) written in 64 MiB, 2,000 \
         pings/s",
        Content::Text,
        What::Writer {
            memory: 256 << 20,
            hot: 64 << 20,
            rate: 5_000,
            pattern: Pattern::Uniform,
        },
    )),
    entry(
        "rewriter",
        "as a transcoder: 512 MiB, of which 400 are rewritten over and over, 100 MB/s",
        Content::Text,
        What::Writer {
            memory: 512 << 20,
            hot: 400 << 20,
            rate: 25_000,
            pattern: Pattern::Sequential,
        },
    ),
    entry(
        "redis-1g",
        "Redis, 1 GiB of values of 1,000 bytes, YCSB-A: 8 clients, 4,000 requests/s",
        Content::Random,
        redis(1 << 30, 8),
    ),
    entry(
        "stream",
        "64 MiB that send a frame of 512 bytes to each of 4 viewers 30 times a second; a stall is \
         a time without any frame of 100 ms",
        Content::Text,
        What::Stream {
            viewers: 4,
            frames_per_second: 30,
        },
    ),
    entry(
        "memcached",
        "memcached, 128 MiB of values of 4 KiB, 4 clients that set 2,000/s",
        Content::Random,
        What::Memcached {
            clients: 4,
            keys: 8192,
            per_second: 2_000,
        },
    ),
    entry(
        "http",
        "nginx with two workers, 8 clients, 400 connections/s with one request each",
        Content::Text,
        What::Nginx {
            clients: 8,
            per_second: 400,
        },
    ),
    entry(
        "numpy",
        "a Python loop that changes 64 MiB of arrays, asked for its steps 500 times a second",
        Content::Random,
        What::Numpy,
    ),
    counter(
        "counter-50m",
        "a counter and 50 MiB",
        Content::Text,
        50 << 20,
    ),
    counter(
        "counter-50m-random",
        "the same, incompressible",
        Content::Random,
        50 << 20,
    ),
    counter("counter-1g", "a counter and 1 GiB", Content::Text, 1 << 30),
    counter(
        "counter-1g-random",
        "the same, incompressible",
        Content::Random,
        1 << 30,
    ),
    counter("counter-8g", "a counter and 8 GiB", Content::Text, 8 << 30),
    entry(
        SWIFTBATON,
        "Redis, 100,000 values of 10,240 bytes, YCSB-A: 16 clients as fast as they are answered",
        Content::Random,
        What::Redis {
            bytes: 100_000 * 10_240,
            value_bytes: 10_240,
            clients: 16,
            per_second: None,
        },
    ),
    entry(
        KUBESPT_1,
        "Redis, 1 GB of values of 1,000 bytes, 20 clients, 4,000 requests/s",
        Content::Random,
        redis(1_000_000_000, 20),
    ),
    entry(
        KUBESPT_2,
        "Redis, 2 GB of values of 1,000 bytes, 20 clients, 4,000 requests/s",
        Content::Random,
        redis(2_000_000_000, 20),
    ),
];

/// One link between the nodes and the switch.
#[derive(Clone, Copy, Debug)]
pub struct LinkKind {
    /// As [`crate::lab::network::Link`] parses it.
    pub name: &'static str,
    pub summary: &'static str,
    pub quick: bool,
}

const fn link(name: &'static str, summary: &'static str) -> LinkKind {
    LinkKind {
        name,
        summary,
        quick: false,
    }
}

pub static LINKS: [LinkKind; 8] = [
    LinkKind {
        quick: true,
        ..link("unshaped", "what this machine does between two namespaces")
    },
    link("10gbit", "10 Gbit/s at each node"),
    link("3gbit", "3 Gbit/s at each node"),
    LinkKind {
        quick: true,
        ..link("1gbit", "1 Gbit/s at each node")
    },
    link("100mbit", "0.1 Gbit/s at each node"),
    link("wifi", "as Wi-Fi: 800 Mbit/s, 5 ms, 0.00001 % lost"),
    link("lte", "as LTE: 50 Mbit/s, 40 ms, 0.08 % lost"),
    link("satellite", "as a satellite: 100 Mbit/s, 45 ms, 1 % lost"),
];
