//! Namespaces as they come about, in lines of mountinfo(5).

use super::*;
use crate::runtime::shared::tests::fuse::{Fuse, Silent};

fn seen(text: &str) -> Vec<Seen> {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines
        .map(|line| {
            MountInfo::from_line(line)
                .expect("a line of mountinfo")
                .into()
        })
        .collect()
}

fn classify(workload: &str) -> Result<Mounts, Failure> {
    Mounts::classify(&seen(workload), &seen(NODE), &[])
}

/// Mounts are read anew in the freeze.
#[test]
fn a_server_that_does_not_answer_does_not_hold_who_reads_the_mounts() {
    let folder = tempfile::tempdir().expect("a folder");
    let fuse = Fuse::mount(folder.path());
    let place = fuse.path.display();
    let node = format!("{NODE} 29 20 0:99 / {place} rw shared:9 - fuse test rw");
    let workload = format!("{CLONED} 49 40 0:99 / {place} rw - fuse test rw");
    let silent = Silent::begin(&fuse);
    let (tell, told) = std::sync::mpsc::channel();
    let reading = std::thread::spawn(move || {
        let mounts = Mounts::classify(&seen(&workload), &seen(&node), &[]);
        tell.send(mounts.map(|mounts| mounts.mounts.len()))
            .expect("somebody waits");
    });
    let read = told.recv_timeout(std::time::Duration::from_secs(20));
    drop(silent);
    reading.join().expect("no panic");
    read.expect("nobody was asked").expect("it moves");
}

fn refusal(workload: &str) -> String {
    let failure = classify(workload).expect_err("it is refused");
    assert_eq!(failure.code(), ErrorCode::UnsupportedWorkload);
    failure.text().to_owned()
}

fn paths(mounts: &Mounts) -> Vec<(String, String)> {
    let described = mounts.describe().expect("names are UTF-8");
    described
        .into_iter()
        .map(|mount| (mount.path, mount.node_path))
        .collect()
}

fn pairs(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs
        .iter()
        .map(|(path, node)| ((*path).to_owned(), (*node).to_owned()))
        .collect()
}

/// A node with a disk, a data disk with a blank in its name, and a folder that is bound elsewhere.
const NODE: &str = r"
    20 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
    21 20 0:20 / /proc rw shared:2 - proc proc rw
    22 20 0:21 / /sys rw shared:3 - sysfs sysfs rw
    23 20 0:22 / /run rw shared:4 - tmpfs tmpfs rw
    24 20 0:6 / /dev rw shared:5 - devtmpfs udev rw
    25 24 0:23 / /dev/pts rw shared:6 - devpts devpts rw
    26 20 8:17 / /srv/big\040disk rw shared:7 - ext4 /dev/sdb1 rw
    27 20 8:1 /var/covered /covered rw shared:8 - ext4 /dev/sda1 rw
    28 27 0:24 / /covered rw shared:9 - tmpfs tmpfs rw
";

/// What `unshare --mount --pid --fork --mount-proc` leaves of it.
const CLONED: &str = r"
    40 30 8:1 / / rw,relatime - ext4 /dev/sda1 rw
    41 40 0:20 / /proc rw - proc proc rw
    42 40 0:21 / /sys rw - sysfs sysfs rw
    43 40 0:22 / /run rw - tmpfs tmpfs rw
    44 40 0:6 / /dev rw - devtmpfs udev rw
    45 44 0:23 / /dev/pts rw - devpts devpts rw
    46 41 0:40 / /proc rw - proc proc rw
";

#[test]
fn a_cloned_namespace_is_the_nodes_but_for_its_proc() {
    let mounts = classify(CLONED).expect("it moves");
    let same = ["/", "/sys", "/run", "/dev", "/dev/pts"].map(|path| (path, path));
    assert_eq!(paths(&mounts), pairs(&same));
    assert_eq!(mounts.node_path(Path::new("/proc/1/maps")), None);
    let file = Path::new("/usr/bin/redis-server");
    assert_eq!(mounts.node_path(file).as_deref(), Some(file));
}

#[test]
fn a_root_of_its_own_is_found_at_the_node() {
    let mounts = classify(
        r"
        50 30 8:1 /srv/w / rw - ext4 /dev/sda1 rw
        51 50 0:40 / /proc rw - proc proc rw
        52 50 0:41 / /tmp rw - tmpfs tmpfs rw
        53 50 8:17 /redis\040data /data rw - ext4 /dev/sdb1 rw
        54 50 0:6 /null /dev/null rw - devtmpfs udev rw
        55 51 0:40 /sys /proc/sys ro - proc proc rw
        ",
    )
    .expect("it moves");
    let expected = pairs(&[
        ("/", "/srv/w"),
        ("/data", "/srv/big disk/redis data"),
        ("/dev/null", "/dev/null"),
    ]);
    assert_eq!(paths(&mounts), expected);
    assert_eq!(
        mounts.node_path(Path::new("/data/dump.rdb")),
        Some(PathBuf::from("/srv/big disk/redis data/dump.rdb"))
    );
    assert_eq!(mounts.node_path(Path::new("/tmp/x")), None);
    assert_eq!(
        mounts.node_path(Path::new("/etc/passwd")),
        Some(PathBuf::from("/srv/w/etc/passwd"))
    );
}

#[test]
fn what_the_node_has_twice_is_called_as_its_operator_calls_it() {
    let node = format!("{NODE}    29 20 8:17 / /d rw,relatime - ext4 /dev/sdb1 rw\n");
    let workload = format!("{CLONED}    47 40 8:17 /redis /data rw - ext4 /dev/sdb1 rw\n");
    let place = |named: &[&str]| {
        let named: Vec<PathBuf> = named.iter().map(PathBuf::from).collect();
        let mounts = Mounts::classify(&seen(&workload), &seen(&node), &named).expect("it moves");
        assert!(mounts.bound().any(|path| path == Path::new("/data")));
        mounts.node_path(Path::new("/data/x"))
    };
    assert_eq!(place(&[]), Some(PathBuf::from("/d/redis/x")));
    let named = place(&["/srv/big disk/redis"]);
    assert_eq!(named, Some(PathBuf::from("/srv/big disk/redis/x")));
}

#[test]
fn keys_of_a_dump_are_those_of_its_restore() {
    let mounts = classify(CLONED).expect("it moves");
    let described = mounts.describe().expect("names are UTF-8");
    let (dump, restore) = (
        external_at_dump(&described),
        external_at_restore(&described),
    );
    assert_eq!(dump.len(), 4);
    assert_eq!(dump[0], "mnt[/sys]:pageferry-1");
    assert_eq!(restore[0], "mnt[pageferry-1]:/sys");
    assert_eq!(dump[3], "mnt[/dev/pts]:pageferry-4");
}

#[test]
fn a_file_system_the_node_has_not_is_refused_by_its_path() {
    let text = refusal(&format!(
        "{CLONED} 47 40 0:50 / /mnt/box rw - overlay overlay rw"
    ));
    assert!(
        text.contains("/mnt/box") && text.contains("overlay"),
        "{text}"
    );
}

#[test]
fn what_is_mounted_over_at_the_node_cannot_be_reached_there() {
    let text = refusal(&format!(
        "{CLONED} 47 40 8:99 / /data rw - ext4 /dev/sdz rw"
    ));
    assert!(text.contains("/data"), "{text}");
    // The folder below the node's tmpfs can be reached by the disk it is on.
    let mounts = classify(&format!(
        "{CLONED} 47 40 8:1 /var/covered /c rw - ext4 /dev/sda1 rw"
    ));
    let last = paths(&mounts.expect("it moves")).pop();
    assert_eq!(last, Some(("/c".to_owned(), "/var/covered".to_owned())));
}

#[test]
fn a_tmpfs_over_a_mount_of_the_node_is_refused() {
    let text = refusal(&format!("{CLONED} 47 43 0:51 / /run rw - tmpfs tmpfs rw"));
    assert!(text.contains("over /run"), "{text}");
}

#[test]
fn a_mount_that_propagates_is_refused() {
    let slave = CLONED.replace("/run rw -", "/run rw master:4 -");
    // A container's runtime makes it so again.
    let received = classify(&slave).unwrap().check_receives_nothing();
    assert!(received.unwrap_err().text().contains("/run"));
    classify(CLONED).unwrap().check_receives_nothing().unwrap();
    let peer = CLONED.replace("/run rw -", "/run rw shared:4 -");
    assert!(refusal(&peer).contains("/run"));
    let within = CLONED.replace("/run rw -", "/run rw shared:400 -");
    assert!(classify(&within).is_ok());
}

#[test]
fn a_folder_that_was_deleted_is_refused() {
    let text = refusal(&format!(
        "{CLONED} 47 40 0:52 / /a rw - tmpfs tmpfs rw\n \
         48 40 0:52 /x//deleted /b rw - tmpfs tmpfs rw"
    ));
    assert!(text.contains("/b"), "{text}");
}

#[test]
fn a_root_that_is_a_tmpfs_of_its_own_is_refused() {
    let text = refusal("50 30 0:60 / / rw - tmpfs tmpfs rw");
    assert!(text.contains("root"), "{text}");
}

#[test]
fn this_programs_own_mounts_are_all_the_nodes() {
    let pid = i32::try_from(std::process::id()).expect("a pid");
    // Where tests run in a container, its mounts may propagate: then they are refused, by name.
    match Mounts::read(pid, &[]) {
        Ok(mounts) => {
            let described = mounts.describe().expect("names are UTF-8");
            check(&described).expect("they are here");
            mounts.check_contents(pid).expect("nothing is carried");
        }
        Err(failure) => assert!(failure.text().contains("mount"), "{failure}"),
    }
}
