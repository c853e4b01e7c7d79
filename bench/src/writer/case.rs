//! Cases: odd things programs do with memory and processes, each checking itself.

pub mod direct;
pub mod files;
pub mod flags;
pub mod locks;
pub mod mappings;
pub mod refused;
pub mod tree;

use anyhow::{Context, Result};

/// Something that happens beside the writer's own region.
pub trait Case {
    /// Called every millisecond, with the number of the call.
    ///
    /// # Errors
    /// Says what was found wrong.
    fn step(&mut self, tick: u64) -> Result<()>;

    /// Checks everything; how many pages.
    ///
    /// # Errors
    /// Says what was found wrong.
    fn verify(&mut self) -> Result<usize>;

    /// A word for the status: how far it got.
    fn progress(&self) -> String;
}

/// What a move of a workload with this case must come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Demand {
    MustMove,
    /// It moves, or is refused by one of these codes before any freeze.
    MayBeRefused(&'static [&'static str]),
}

/// A case by name.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub name: &'static str,
    pub demand: Demand,
    start: fn() -> Result<Box<dyn Case>>,
}

/// Every case.
pub const ALL: [Kind; 25] = [
    must("none", || Ok(Box::new(Nothing))),
    must("remap", mappings::Remap::start),
    must("brk", mappings::Heap::start_churning),
    must("heap-shrinks", mappings::Heap::start_shrinking),
    must("dontneed", mappings::DontNeed::start),
    must("fork", tree::Forks::start),
    must("exec", tree::Execs::start),
    must("shared-anonymous", tree::SharedMemory::start),
    must("memfd", mappings::MemoryFile::start),
    must("file-private", mappings::PrivateFile::start),
    must("prot-none", flags::Hidden::start),
    must("guard", flags::Guards::start),
    must("thp", flags::HugePages::start),
    must("mlock", flags::Toggle::start_lock),
    must("dontfork", flags::Toggle::start_dontfork),
    must("swapped", flags::SwappedOut::start),
    must("threads", tree::Threads::start),
    must("processes", tree::Processes::start),
    must("direct-io", direct::always),
    must("direct-io-late", direct::late),
    must("direct-io-threads", direct::among_threads),
    may_refuse("hugetlb", &["hugetlb"], refused::hugetlb),
    may_refuse("aio", &["direct-io"], refused::aio),
    may_refuse("io-uring", &["io-uring", "direct-io"], refused::io_uring),
    may_refuse("secretmem", &["secretmem"], refused::secretmem),
];

/// Also a case, but not in [`ALL`]'s order: its processes trace each other.
pub const TRACED: Kind = may_refuse("traced", &["traced"], tree::Traced::start);

/// Needs storage that the nodes share.
pub const LOCKS: Kind = must("locks", locks::Locks::start);

/// Need a folder that travels.
pub const FILES: Kind = must("files", files::Files::start_few);
pub const FILES_MANY: Kind = must("files-many", files::Files::start_many);

/// Only in the freeze it turns out that this one cannot move.
pub const LOST_PAGES: Kind = may_refuse("lost-pages", &["pages-unread"], refused::lost_pages);

const fn must(name: &'static str, start: fn() -> Result<Box<dyn Case>>) -> Kind {
    Kind {
        name,
        demand: Demand::MustMove,
        start,
    }
}

const fn may_refuse(
    name: &'static str,
    codes: &'static [&'static str],
    start: fn() -> Result<Box<dyn Case>>,
) -> Kind {
    Kind {
        name,
        demand: Demand::MayBeRefused(codes),
        start,
    }
}

/// Starts a case by its name.
pub fn start(name: &str) -> Result<Box<dyn Case>> {
    let all = ALL.iter();
    let mut all = all.chain([&TRACED, &LOCKS, &FILES, &FILES_MANY, &LOST_PAGES]);
    let kind = all.find(|kind| kind.name == name);
    let kind = kind.with_context(|| format!("no case is called {name:?}"))?;
    (kind.start)().with_context(|| format!("starting the case {name}"))
}

/// The first argument of a process that [`tree::Execs`] starts.
pub const EXEC_CHILD: &str = "exec-child";

struct Nothing;

impl Case for Nothing {
    fn step(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn verify(&mut self) -> Result<usize> {
        Ok(0)
    }

    fn progress(&self) -> String {
        "none".to_owned()
    }
}
