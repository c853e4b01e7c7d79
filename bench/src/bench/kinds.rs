//! The workloads, systems and links of the benchmark.

use super::subject::{Kind, Packing, What};
use crate::content::Content;
use crate::mover::Mover;
use crate::mover::criu_lazy::CriuLazy;
use crate::mover::criu_page_server::CriuPageServer;
use crate::mover::disk_tar::DiskTar;
use crate::mover::pageferry::Pageferry;
use crate::mover::stock_criu::StockCriu;
use crate::writer::options::Pattern;

/// One way to move a workload.
#[derive(Clone, Copy, Debug)]
pub struct System {
    pub name: &'static str,
    pub summary: &'static str,
    pub mover: &'static dyn Mover,
    pub packing: Packing,
    /// Whether the nodes need more than their image for it.
    pub needs_layer: bool,
    /// Whether it is in the quick set.
    pub quick: bool,
}

const fn system(
    name: &'static str,
    summary: &'static str,
    mover: &'static dyn Mover,
) -> System {
    System {
        name,
        summary,
        mover,
        packing: Packing::Bare,
        needs_layer: false,
        quick: true,
    }
}

pub static SYSTEMS: [System; 6] = [
    system(
        "pageferry",
        "pre-copy by pageferry, of a bare tree",
        &Pageferry,
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
        "stock CRIU: post-copy, by lazy-pages and the page server in the dump",
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
];

/// One workload, and whether it is in the quick set.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub kind: Kind,
    pub quick: bool,
}

pub static KINDS: [Entry; 2] = [
    Entry {
        kind: Kind {
            name: "redis-ycsb-a",
            summary: "Redis, 256 MiB of values of 1,000 bytes, YCSB-A: 8 clients, 4,000 requests/s, \
                      half of them updates, Zipf 0.99",
            content: Content::Random,
            what: What::Redis {
                bytes: 256 << 20,
                value_bytes: 1000,
                clients: 8,
                per_second: Some(4_000),
            },
        },
        quick: true,
    },
    Entry {
        kind: Kind {
            name: "writer",
            summary: "the self-checking writer, 256 MiB, 5,000 pages/s (20 MB/s) written in 64 MiB",
            content: Content::Text,
            what: What::Writer {
                memory: 256 << 20,
                hot: 64 << 20,
                rate: 5_000,
                pattern: Pattern::Uniform,
            },
        },
        quick: true,
    },
];

/// One link between the nodes and the switch.
#[derive(Clone, Copy, Debug)]
pub struct LinkKind {
    pub name: &'static str,
    pub summary: &'static str,
    pub quick: bool,
}

pub static LINKS: [LinkKind; 2] = [
    LinkKind {
        name: "unshaped",
        summary: "what this machine does between two namespaces",
        quick: true,
    },
    LinkKind {
        name: "1gbit",
        summary: "1 Gbit/s at each node",
        quick: true,
    },
];
