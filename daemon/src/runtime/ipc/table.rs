//! The kernel's tables of System V objects: `/proc/sysvipc`.

/// The kinds of System V objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Segments,
    Semaphores,
    Queues,
}

impl Kind {
    pub const ALL: [Self; 3] = [Self::Segments, Self::Semaphores, Self::Queues];

    pub const fn path(self) -> &'static str {
        match self {
            Self::Segments => "/proc/sysvipc/shm",
            Self::Semaphores => "/proc/sysvipc/sem",
            Self::Queues => "/proc/sysvipc/msg",
        }
    }
}

/// One of them. What its kind does not have is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Object {
    pub id: i32,
    /// Permissions, [`REMOVED`] and [`LOCKED`].
    pub mode: u32,
    /// User and group.
    pub owner: [u64; 2],
    pub creator: [u64; 2],
    /// Who made it, or was the last to do something to it.
    pub pids: [i32; 2],
    /// Bytes in use.
    pub bytes: u64,
    pub mappings: u64,
    /// Semaphores of a set.
    pub count: i32,
}

impl Object {
    /// Whether who made it has a right to it that is not the owner's. The superuser, who makes it
    /// anew at a target, needs none.
    pub fn is_given_away(&self) -> bool {
        let mut both = self.owner.iter().zip(&self.creator);
        both.any(|(owner, creator)| owner != creator && *creator != 0)
    }
}

/// The objects of a table; `None` when it is not of the known form.
pub fn parse(kind: Kind, table: &str) -> Option<Vec<Object>> {
    let mut lines = table.lines();
    let columns: Vec<&str> = lines.next()?.split_whitespace().collect();
    lines.map(|line| parse_line(kind, &columns, line)).collect()
}

fn parse_line(kind: Kind, columns: &[&str], line: &str) -> Option<Object> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let word = |name: &str| {
        let at = columns.iter().position(|column| *column == name)?;
        words.get(at).copied()
    };
    let number = |name: &str| word(name)?.parse::<u64>().ok();
    let small = |name: &str| word(name)?.parse::<i32>().ok();
    let object = Object {
        mode: u32::from_str_radix(word("perms")?, 8).ok()?,
        owner: [number("uid")?, number("gid")?],
        creator: [number("cuid")?, number("cgid")?],
        ..Object::default()
    };
    Some(match kind {
        Kind::Segments => Object {
            id: small("shmid")?,
            pids: [small("cpid")?, small("lpid")?],
            bytes: number("rss")? + number("swap")?,
            mappings: number("nattch")?,
            ..object
        },
        Kind::Semaphores => Object {
            id: small("semid")?,
            count: small("nsems")?,
            ..object
        },
        Kind::Queues => Object {
            id: small("msqid")?,
            pids: [small("lspid")?, small("lrpid")?],
            bytes: number("cbytes")?,
            ..object
        },
    })
}

/// A segment that goes with its last mapping (`SHM_DEST`).
pub const REMOVED: u32 = 0o1000;

/// A segment whose pages are not swapped (`SHM_LOCKED`).
pub const LOCKED: u32 = 0o2000;

/// A table of all objects that a namespace may have (32768), 200 bytes each.
pub const BYTES_MAX: usize = 8 << 20; // 8 MiB
