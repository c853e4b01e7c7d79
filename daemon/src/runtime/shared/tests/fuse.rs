//! A file system in user space of one folder, whose server fails or hangs when told to.
//!
//! The kernel keeps what is written in its page cache (`FUSE_WRITEBACK_CACHE`), as it does for a
//! file system on a network, and writes it back when it likes.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

const ROOT: u64 = 1;
const MAX_WRITE: usize = 128 << 10;

/// What the server holds, and how it is to behave.
#[derive(Debug, Default)]
pub struct State {
    pub files: BTreeMap<String, (u64, Vec<u8>)>,
    pub writes: usize,
    pub fsyncs: usize,
    /// Writes are answered with EIO.
    pub failing: bool,
    /// Fsyncs are answered with EIO.
    pub forgetful: bool,
    /// Writes are not answered.
    pub hanging: bool,
    /// Nothing is answered.
    pub silent: bool,
    /// Reads are answered when [`Fuse::answer_reads`] says so.
    pub slow: bool,
    /// The kernel is to ask for attributes each time.
    pub uncached: bool,
    held: Vec<u64>,
    held_reads: Vec<Vec<u8>>,
    /// It keeps record locks itself, and the kernel none: by the mount.
    locking: bool,
    /// Who has the one there is.
    locked_by: Option<u64>,
    /// Root may not make files, as at a server that takes root for nobody.
    pub squashing: bool,
    next: u64,
}

/// A mounted file system; unmounted when dropped.
#[derive(Debug)]
pub struct Fuse {
    pub path: PathBuf,
    state: Arc<Mutex<State>>,
    device: File,
    server: Option<JoinHandle<()>>,
}

impl Fuse {
    pub fn mount(path: &Path) -> Self {
        let state = Arc::new(Mutex::new(State {
            next: ROOT + 1,
            ..State::default()
        }));
        Self::of(state, path)
    }

    /// One whose server keeps record locks.
    pub fn mount_locking(path: &Path) -> Self {
        let state = Arc::new(Mutex::new(State {
            next: ROOT + 1,
            locking: true,
            ..State::default()
        }));
        Self::of(state, path)
    }

    /// Mounts what this one's server holds a second time, as another kernel would: with caches of
    /// its own.
    pub fn elsewhere(&self, path: &Path) -> Self {
        Self::of(Arc::clone(&self.state), path)
    }

    fn of(state: Arc<Mutex<State>>, path: &Path) -> Self {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse");
        let device = device.expect("the kernel has FUSE");
        let options = format!(
            "fd={},rootmode=40777,user_id=0,group_id=0,allow_other",
            device.as_raw_fd()
        );
        let options = CString::new(options).expect("no zero");
        mount(
            Some("test"),
            path,
            Some("fuse"),
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some(options.as_c_str()),
        )
        .expect("root may mount");
        let (mut requests, served) = (device.try_clone().expect("dup"), Arc::clone(&state));
        let server = std::thread::spawn(move || {
            let mut buffer = vec![0; MAX_WRITE + 4096];
            // It ends with the mount: ENODEV.
            while let Ok(length) = requests.read(&mut buffer) {
                serve(&mut requests, &served, &buffer[..length]);
            }
        });
        Self {
            path: path.to_owned(),
            state,
            device,
            server: Some(server),
        }
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    pub fn content(&self, name: &str) -> Vec<u8> {
        self.state().files.get(name).expect("a file").1.clone()
    }

    /// How many reads wait for an answer.
    pub fn reads_held(&self) -> usize {
        self.state().held_reads.len()
    }

    /// Answers them, and is slow no more.
    pub fn answer_reads(&self) {
        let mut state = self.state();
        state.slow = false;
        for request in std::mem::take(&mut state.held_reads) {
            let data = read(&state, u64_at(&request, 16), &request[40..]);
            answer(&mut &self.device, u64_at(&request, 8), 0, &data);
        }
    }

    /// Answers what was held, with an error, and hangs no more.
    pub fn release(&self) {
        let mut state = self.state();
        (state.hanging, state.silent, state.slow) = (false, false, false);
        let mut held = std::mem::take(&mut state.held);
        held.extend(state.held_reads.drain(..).map(|read| u64_at(&read, 8)));
        for unique in held {
            answer(&mut &self.device, unique, libc::EIO, &[]);
        }
    }
}

/// A server that answers nothing, until this is dropped: before whatever is open there.
#[derive(Debug)]
pub struct Silent<'a>(&'a Fuse);

impl<'a> Silent<'a> {
    pub fn begin(fuse: &'a Fuse) -> Self {
        fuse.state().silent = true;
        Self(fuse)
    }
}

impl Drop for Silent<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        self.release();
        // By force: whoever waits for an answer gets an error, and the server ends.
        let _ = umount2(&self.path, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH);
        if let Some(server) = self.server.take() {
            drop(server.join());
        }
    }
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn answer(device: &mut impl Write, unique: u64, errno: i32, body: &[u8]) {
    let length = u32::try_from(16 + body.len()).expect("short");
    let mut reply = length.to_le_bytes().to_vec();
    reply.extend((-errno).to_le_bytes());
    reply.extend(unique.to_le_bytes());
    reply.extend(body);
    // A request that was interrupted takes no answer.
    drop(device.write_all(&reply));
}

/// `struct fuse_attr`.
fn attributes(inode: u64, length: usize) -> Vec<u8> {
    let mode: u32 = if inode == ROOT { 0o040_777 } else { 0o100_666 };
    let mut bytes = Vec::new();
    for word in [inode, length as u64, length.div_ceil(512) as u64, 0, 0, 0] {
        bytes.extend(word.to_le_bytes());
    }
    for word in [0, 0, 0, mode, 1, OWNER, OWNER, 0, 4096, 0] {
        bytes.extend(u32::to_le_bytes(word));
    }
    bytes
}

/// Who owns everything.
pub const OWNER: u32 = 12_345;

/// `struct fuse_attr_out`: not to be asked again for so many seconds.
fn attributes_out(valid: u64, inode: u64, length: usize) -> Vec<u8> {
    let mut bytes = valid.to_le_bytes().to_vec();
    bytes.extend([0; 8]);
    bytes.extend(attributes(inode, length));
    bytes
}

/// `struct fuse_entry_out`.
fn entry(valid: u64, inode: u64, length: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    for word in [inode, 0, valid, valid] {
        bytes.extend(u64::to_le_bytes(word));
    }
    bytes.extend([0; 8]);
    bytes.extend(attributes(inode, length));
    bytes
}

fn name_of(body: &[u8]) -> String {
    let end = body
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(body.len());
    String::from_utf8_lossy(&body[..end]).into_owned()
}

/// Also of a test that has failed with it: were the server to end, closing a file would never.
fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

fn serve(device: &mut File, state: &Mutex<State>, request: &[u8]) {
    let mut state = lock(state);
    let (opcode, unique, node) = (u32_at(request, 4), u64_at(request, 8), u64_at(request, 16));
    let (uid, body) = (u32_at(request, 24), &request[40..]);
    // FORGET, INIT, INTERRUPT, BATCH_FORGET: nobody waits for these.
    if state.silent && ![2, 26, 36, 42].contains(&opcode) {
        state.held.push(unique);
        return;
    }
    let valid = u64::from(!state.uncached);
    let length = |state: &State| {
        let mut files = state.files.values();
        files
            .find(|(inode, _)| *inode == node)
            .map(|(_, data)| data.len())
    };
    let (errno, reply) = match opcode {
        // LOOKUP
        1 => match state.files.get(&name_of(body)) {
            Some((inode, data)) => (0, entry(valid, *inode, data.len())),
            None => (libc::ENOENT, Vec::new()),
        },
        // FORGET, INTERRUPT, BATCH_FORGET: no answer.
        2 | 36 | 42 => return,
        // GETATTR
        3 if node == ROOT => (0, attributes_out(valid, ROOT, 0)),
        3 => match length(&state) {
            Some(length) => (0, attributes_out(valid, node, length)),
            None => (libc::ENOENT, Vec::new()),
        },
        // SETATTR
        4 => {
            resize(&mut state, node, body);
            (0, attributes_out(valid, node, length(&state).unwrap_or(0)))
        }
        // UNLINK
        10 => match state.files.remove(&name_of(body)) {
            Some(_) => (0, Vec::new()),
            None => (libc::ENOENT, Vec::new()),
        },
        // OPEN, OPENDIR
        14 | 27 => (0, vec![0; 16]),
        // READ
        15 if state.slow => {
            state.held_reads.push(request.to_vec());
            return;
        }
        15 => (0, read(&state, node, body)),
        // WRITE
        16 if state.hanging => {
            state.held.push(unique);
            return;
        }
        16 if state.failing => (libc::EIO, Vec::new()),
        16 => (0, write(&mut state, node, body)),
        // STATFS
        17 => (0, vec![0; 80]),
        // FLUSH: `struct fuse_flush_in` names who closes the file, and has its locks no more.
        25 => {
            let owner = u64_at(body, 16);
            state.locked_by.take_if(|by| *by == owner);
            (0, Vec::new())
        }
        // RELEASE, RELEASEDIR, FSYNCDIR
        18 | 29 | 30 => (0, Vec::new()),
        // FSYNC
        20 if state.forgetful => (libc::EIO, Vec::new()),
        20 => {
            state.fsyncs += 1;
            (0, Vec::new())
        }
        // INIT
        26 => (0, init(state.locking)),
        // GETLK, SETLK, SETLKW
        31..=33 => lock_record(&mut state, opcode, body),
        // READDIR: whoever needs a name knows it.
        28 => (0, Vec::new()),
        // CREATE
        35 if state.squashing && uid == 0 => (libc::EACCES, Vec::new()),
        35 => (0, create(&mut state, valid, body)),
        _ => (libc::ENOSYS, Vec::new()),
    };
    drop(state);
    answer(device, unique, errno, &reply);
}

/// CREATE.
fn create(state: &mut State, valid: u64, body: &[u8]) -> Vec<u8> {
    let inode = state.next;
    state.next += 1;
    let name = name_of(&body[16..]);
    state.files.insert(name, (inode, Vec::new()));
    [entry(valid, inode, 0), vec![0; 16]].concat()
}

/// SETATTR: of the attributes only the size.
fn resize(state: &mut State, node: u64, body: &[u8]) {
    const SIZE: u32 = 1 << 3;
    let (valid, size) = (u32_at(body, 0), u64_at(body, 16));
    let file = state.files.values_mut().find(|(inode, _)| *inode == node);
    if valid & SIZE != 0
        && let Some((_, data)) = file
    {
        data.resize(usize::try_from(size).expect("small"), 0);
    }
}

fn read(state: &State, node: u64, body: &[u8]) -> Vec<u8> {
    let (offset, size) = piece(body);
    let file = state.files.values().find(|(inode, _)| *inode == node);
    let data = file.map_or(&[][..], |(_, data)| data);
    let end = data.len().min(offset + size);
    data.get(offset..end).unwrap_or_default().to_vec()
}

/// `struct fuse_write_out` is what it answers.
fn write(state: &mut State, node: u64, body: &[u8]) -> Vec<u8> {
    state.writes += 1;
    let (offset, size) = piece(body);
    let written = &body[40..40 + size];
    if let Some((_, data)) = state.files.values_mut().find(|(inode, _)| *inode == node) {
        data.resize(data.len().max(offset + size), 0);
        data[offset..offset + size].copy_from_slice(written);
    }
    [u32_at(body, 16).to_le_bytes(), [0; 4]].concat()
}

/// Offset and size of what is read or written.
fn piece(body: &[u8]) -> (usize, usize) {
    let offset = usize::try_from(u64_at(body, 8)).expect("small");
    (offset, u32_at(body, 16) as usize)
}

/// `struct fuse_lk_in`: handle, owner, first and last byte, kind. Of any file there is one lock.
fn lock_record(state: &mut State, opcode: u32, body: &[u8]) -> (i32, Vec<u8>) {
    let (owner, kind) = (u64_at(body, 8), u32_at(body, 32));
    let free = state.locked_by.is_none_or(|by| by == owner);
    let unlocks = kind == u32::try_from(libc::F_UNLCK).expect("small");
    match opcode {
        // GETLK: `struct fuse_lk_out`.
        31 => {
            let kind = if free { libc::F_UNLCK } else { libc::F_WRLCK };
            let last = i64::MAX.to_le_bytes();
            (
                0,
                [
                    vec![0; 8],
                    last.to_vec(),
                    kind.to_le_bytes().to_vec(),
                    vec![0; 4],
                ]
                .concat(),
            )
        }
        _ if !free => (libc::EAGAIN, Vec::new()),
        _ => {
            state.locked_by = (!unlocks).then_some(owner);
            (0, Vec::new())
        }
    }
}

/// `struct fuse_init_out`.
fn init(locking: bool) -> Vec<u8> {
    const POSIX_LOCKS: u32 = 1 << 1;
    const WRITEBACK_CACHE: u32 = 1 << 16;
    const BIG_WRITES: u32 = 1 << 5;
    let mut bytes = Vec::new();
    for word in [
        7,
        31,
        128 << 10,
        WRITEBACK_CACHE | BIG_WRITES | if locking { POSIX_LOCKS } else { 0 },
        0,
        MAX_WRITE as u32,
    ] {
        bytes.extend(u32::to_le_bytes(word));
    }
    bytes.extend([0; 40]);
    bytes
}
