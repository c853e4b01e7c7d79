//! What kind of file system a path is on: whether two kernels can share it, and what their caches
//! make of it.

use std::io;
use std::path::Path;

use nix::sys::statfs::statfs;

/// How a file system may be shared by two kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Made for one kernel: two that have it mounted see different things, or destroy it.
    Local,
    /// Its kernels tell each other of every page they change.
    Coherent,
    /// A kernel sees what another one wrote when it opens the file, or some time later. A page that
    /// is mapped is not asked for again. Everything that is not known is taken for this.
    OnOpen,
}

/// The kind of the file system at `path`, and its number.
pub fn of(path: &Path) -> io::Result<(Kind, u64)> {
    let found = statfs(path)?;
    // A signed long that the kernel fills with an unsigned magic number.
    #[allow(clippy::unnecessary_cast)]
    let number = found.filesystem_type().0 as i64;
    let number = u64::from(number.cast_unsigned() as u32);
    Ok((of_number(number), number))
}

/// The kind of a file system by its number in statfs(2).
pub fn of_number(number: u64) -> Kind {
    let is = |list: &[(u64, &str)]| list.iter().any(|(known, _)| *known == number);
    if is(LOCAL) {
        Kind::Local
    } else if is(COHERENT) {
        Kind::Coherent
    } else {
        Kind::OnOpen
    }
}

/// The name of a file system, or its number.
pub fn name(number: u64) -> String {
    let mut known = [LOCAL, COHERENT, ON_OPEN].into_iter().flatten();
    let known = known.find(|(found, _)| *found == number);
    known.map_or_else(
        || format!("file system {number:#x}"),
        |(_, name)| (*name).to_owned(),
    )
}

/// Whether syncfs(2) waits until what was written is with the file system. On FUSE it does not:
/// Linux 6.19, and stable kernels since, ask nobody to write back and wait for nothing
/// (`AS_NO_DATA_INTEGRITY`, later `SB_I_NO_DATA_INTEGRITY`), so that a server that hangs cannot
/// hang a suspend. There fsync(2) of each file does it.
pub const fn syncfs_waits(number: u64) -> bool {
    number != FUSE
}

/// Whether a server may keep locks that this kernel knows nothing of. All others that ask a server,
/// or each other, note down what they got.
pub const fn may_hide_locks(number: u64) -> bool {
    number == FUSE
}

const FUSE: u64 = 0x6573_5546;

/// By `include/uapi/linux/magic.h`, and for those that are not there by their own sources.
const LOCAL: &[(u64, &str)] = &[
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0x0102_1994, "tmpfs"),
    (0x8584_58f6, "ramfs"),
    (0x794c_7630, "overlay"),
    (0xf2f5_2010, "f2fs"),
    (0xca45_1a4e, "bcachefs"),
    (0x2fc1_2fc1, "zfs"),
    (0x3153_464a, "jfs"),
    (0x5265_4973, "reiserfs"),
    (0x3434, "nilfs2"),
    (0x4d44, "vfat"),
    (0x2011_bab0, "exfat"),
    (0x7366_746e, "ntfs"),
    (0x9584_58f6, "hugetlbfs"),
    (0x7371_7368, "squashfs"),
    (0xe0f5_e1e2, "erofs"),
    (0x9660, "isofs"),
];

/// Cluster file systems: a page is cached under a lock of the cluster, also one that is mapped
/// (`page_mkwrite` takes it, and a node that gives it up unmaps the page).
const COHERENT: &[(u64, &str)] = &[
    (0x0116_1970, "gfs2"),
    (0x7461_636f, "ocfs2"),
    (0x0bd0_0bd0, "lustre"),
    (0x4750_4653, "gpfs"),
];

/// nfs(5): close-to-open, mapped pages are not looked at again. CIFS and SMB: with a lease only.
/// 9p: by its option, none by default. FUSE: when a file is opened, and attributes for a time that
/// its server chooses. CephFS is coherent for read and write, but not for pages that are mapped:
/// says its own documentation ("Differences from POSIX").
const ON_OPEN: &[(u64, &str)] = &[
    (0x6969, "nfs"),
    (0xff53_4d42, "cifs"),
    (0xfe53_4d42, "smb"),
    (0x517b, "smb"),
    (0x0102_1997, "9p"),
    (FUSE, "fuse"),
    (0x00c3_6400, "ceph"),
    (0x5346_414f, "afs"),
    (0x6b41_4653, "afs"),
    (0x7375_7245, "coda"),
    (0x1983_0326, "beegfs"),
    (0x786f_4256, "vboxsf"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_not_taken_for_coherent() {
        assert_eq!(of_number(0xef53), Kind::Local);
        assert_eq!(of_number(0x0116_1970), Kind::Coherent);
        for number in [0x6969, FUSE, 0xff53_4d42, 0x00c3_6400, 0xdead_beef] {
            assert_eq!(of_number(number), Kind::OnOpen, "{}", name(number));
        }
        assert_eq!(name(0xdead_beef), "file system 0xdeadbeef");
    }

    #[test]
    fn the_kernel_tells_the_numbers_of_this_list() {
        let (kind, number) = of(Path::new("/dev/shm")).expect("a tmpfs");
        assert_eq!((kind, name(number)), (Kind::Local, "tmpfs".to_owned()));
    }
}
