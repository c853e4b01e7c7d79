//! The upper layer of an overlay travels, on real ones: whatever a program does between two
//! differences, another overlay over the same layers shows the same afterwards, entry by entry.
//! And a folder that is there already is taken over. Needs root.

#[path = "../travel/compare.rs"]
mod compare;
#[path = "../travel/mutate.rs"]
mod mutate;

use std::collections::HashSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use compare::{assert_same, describe};
use mutate::{Mutation, mutate, mutations};
use pageferry_files::{Error, ErrorKind, HIDDEN, Key, Report, Source, Staging, Suspects};
use proptest::test_runner::{Config, TestRunner};

/// Two overlays over one lower layer.
struct Overlays {
    root: tempfile::TempDir,
}

impl Overlays {
    /// `fill` makes what the lower layer has.
    fn over(parent: &str, fill: impl FnOnce(&Path)) -> Self {
        let root = tempfile::tempdir_in(parent).expect("a folder");
        for name in ["lower", "a-up", "a-work", "a", "b-up", "b-work", "b"] {
            fs::create_dir(root.path().join(name)).expect("a folder");
        }
        fill(&root.path().join("lower"));
        let overlays = Self { root };
        overlays.mount("a");
        overlays.mount("b");
        overlays
    }

    fn mount(&self, name: &str) {
        let at = |suffix: &str| self.root.path().join(format!("{name}{suffix}"));
        let options = format!(
            "lowerdir={},upperdir={},workdir={},index=off,metacopy=off,redirect_dir=off",
            self.root.path().join("lower").display(),
            at("-up").display(),
            at("-work").display()
        );
        let mut mount = Command::new("mount");
        mount.args(["-t", "overlay", "overlay", "-o", &options]);
        let status = mount.arg(at("")).status().expect("mount");
        assert!(status.success(), "needs root");
    }

    fn here(&self) -> PathBuf {
        self.root.path().join("a")
    }

    fn there(&self) -> PathBuf {
        self.root.path().join("b")
    }

    fn upper(&self) -> PathBuf {
        self.root.path().join("a-up")
    }

    fn source(&self) -> Source {
        Source::open_layer(&self.upper(), &self.here()).expect("a source")
    }

    fn staging(&self) -> Staging {
        Staging::open_overlay(&self.there()).expect("a staging")
    }
}

impl Drop for Overlays {
    fn drop(&mut self) {
        for path in [self.here(), self.there()] {
            drop(Command::new("umount").arg("--lazy").arg(path).status());
        }
    }
}

/// Sends one difference.
fn send(source: &mut Source, staging: &mut Staging) -> Result<Report, Error> {
    send_with(source, staging, &Suspects::default(), true)
}

fn send_with(
    source: &mut Source,
    staging: &mut Staging,
    suspects: &Suspects,
    frozen: bool,
) -> Result<Report, Error> {
    let mut frames = Vec::new();
    let report = source.difference(suspects, frozen, &mut |frame| {
        frames.push(frame);
        Ok(())
    })?;
    for frame in frames {
        let (header, operations) = frame.split_first_chunk().expect("a header");
        let (_, checksum) = Staging::frame(*header)?;
        staging.apply(operations, checksum)?;
    }
    assert_eq!(staging.proven(), Some(report.digest));
    Ok(report)
}

/// A file system that marks stores through mappings, and one that does not.
const FILE_SYSTEMS: [&str; 2] = [env!("CARGO_TARGET_TMPDIR"), "/dev/shm"];

#[test]
fn whatever_happens_to_one_overlay_the_other_shows_the_same() {
    let cases = std::env::var("PROPTEST_CASES")
        .ok()
        .and_then(|cases| cases.parse().ok());
    let config = Config {
        cases: cases.unwrap_or(25),
        failure_persistence: None,
        ..Config::default()
    };
    let rounds = (mutations(), proptest::collection::vec(mutations(), 1..5));
    for parent in FILE_SYSTEMS {
        TestRunner::new(config.clone())
            .run(&rounds, |(lower, rounds)| {
                moves(parent, &lower, &rounds);
                Ok(())
            })
            .expect("they are the same");
    }
}

fn moves(parent: &str, lower: &[Mutation], rounds: &[Vec<Mutation>]) {
    let overlays = Overlays::over(parent, |root| {
        // More than mutations alone make of nothing.
        for name in ["n0/n1/n2", "n3"] {
            fs::create_dir_all(root.join(name)).expect("a folder");
            fs::write(root.join(name).join("n4-0"), "below").expect("a file");
        }
        drop(mutate(root, lower));
        remove_whiteouts(root);
    });
    let (mut source, mut staging) = (overlays.source(), overlays.staging());
    for round in rounds {
        let mappings = mutate(&overlays.here(), round);
        send(&mut source, &mut staging).expect("a difference");
        assert_same(&overlays.here(), &overlays.there());
        drop(mappings);
    }
}

/// The lowest layer hides nothing, and an overlay is at odds with itself over one that does.
fn remove_whiteouts(folder: &Path) {
    for entry in fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let metadata = fs::symlink_metadata(&path).expect("an entry");
        if metadata.is_dir() {
            remove_whiteouts(&path);
        } else if metadata.file_type().is_char_device() {
            fs::remove_file(&path).expect("removed");
        }
    }
}

/// Has one overlay changed, and the other follow, after each of these steps.
fn follows(fill: impl FnOnce(&Path), steps: &[&dyn Fn(&Path)]) -> Overlays {
    let overlays = Overlays::over(FILE_SYSTEMS[0], fill);
    let (mut source, mut staging) = (overlays.source(), overlays.staging());
    for step in steps {
        step(&overlays.here());
        send(&mut source, &mut staging).expect("a difference");
        assert_same(&overlays.here(), &overlays.there());
    }
    overlays
}

fn image(root: &Path) {
    fs::create_dir_all(root.join("etc/inner/deep")).expect("folders");
    for name in ["file", "etc/conf", "etc/inner/one", "etc/inner/deep/two"] {
        fs::write(root.join(name), name).expect("a file");
    }
    symlink("file", root.join("link")).expect("a link");
}

#[test]
fn a_whiteout_comes_and_goes() {
    follows(
        image,
        &[
            &|root| fs::remove_file(root.join("etc/conf")).expect("removed"),
            // Something else in its place, and away again.
            &|root| fs::write(root.join("etc/conf"), "new").expect("a file"),
            &|root| fs::remove_file(root.join("etc/conf")).expect("removed"),
            &|root| fs::create_dir(root.join("etc/conf")).expect("a folder"),
            &|root| fs::remove_dir(root.join("etc/conf")).expect("removed"),
            // One that hid something goes with its folder, and that comes again.
            &|root| fs::remove_dir_all(root.join("etc")).expect("removed"),
            &|root| fs::create_dir(root.join("etc")).expect("a folder"),
            &|root| fs::write(root.join("etc/conf"), "another").expect("a file"),
        ],
    );
}

#[test]
fn a_folder_hides_what_is_below_it_from_one_moment_to_the_next() {
    let old = || std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(9);
    let age = |path: &Path| {
        let folder = fs::File::open(path).expect("a folder");
        folder.set_modified(old()).expect("a time");
    };
    let overlays = follows(
        image,
        &[
            &|root| fs::create_dir(root.join("new")).expect("a folder"),
            &|root| fs::rename(root.join("new"), root.join("newer")).expect("renamed"),
            // It is known, with what is below it, and some of that has been changed.
            &|root| fs::write(root.join("etc/inner/mine"), "mine").expect("a file"),
            &|root| fs::write(root.join("etc/inner/deep/two"), "changed").expect("a file"),
            // Then it is another, with a folder of the same name and the same times.
            &|root| {
                age(&root.join("etc/inner/deep"));
                fs::remove_dir_all(root.join("etc")).expect("removed");
                fs::create_dir_all(root.join("etc/inner/deep")).expect("folders");
                age(&root.join("etc/inner/deep"));
            },
            &|root| fs::write(root.join("etc/inner/one"), "new").expect("a file"),
        ],
    );
    // It is one of the upper layer alone, at both: it can be renamed.
    for root in [overlays.here(), overlays.there()] {
        fs::rename(root.join("etc"), root.join("moved")).expect("renamed");
    }
}

#[test]
fn what_the_image_has_becomes_something_else() {
    follows(
        image,
        &[
            &|root| {
                fs::remove_dir_all(root.join("etc/inner")).expect("removed");
                fs::write(root.join("etc/inner"), "a file").expect("a file");
                fs::remove_file(root.join("file")).expect("removed");
                fs::create_dir(root.join("file")).expect("a folder");
                fs::write(root.join("file/in"), "it").expect("a file");
            },
            &|root| {
                // Names of one file, of which one was the image's.
                fs::hard_link(root.join("etc/conf"), root.join("file/conf")).expect("a link");
                fs::write(root.join("etc/conf"), "both").expect("a file");
            },
            &|root| fs::rename(root.join("etc/conf"), root.join("link")).expect("renamed"),
            &|root| {
                let mode = fs::Permissions::from_mode(0o1770);
                fs::set_permissions(root.join("etc"), mode).expect("a mode");
                fs::remove_file(root.join("etc/inner")).expect("removed");
            },
        ],
    );
}

#[test]
fn what_a_runtime_has_made_there_is_taken_over() {
    let overlays = Overlays::over(FILE_SYSTEMS[0], image);
    for root in [overlays.here(), overlays.there()] {
        fs::create_dir_all(root.join("run/proc")).expect("folders");
        fs::write(root.join("run/hosts"), "").expect("a file");
        fs::create_dir(root.join("dev")).expect("a folder");
    }
    fs::write(overlays.here().join("run/hosts"), "of the container").expect("a file");
    fs::remove_dir(overlays.here().join("dev")).expect("removed");
    fs::write(overlays.here().join("dev"), "none").expect("a file");
    let (mut source, mut staging) = (overlays.source(), overlays.staging());
    // Through the place between two names, which must not be seen.
    fs::write(overlays.here().join("one"), "one").expect("a file");
    send(&mut source, &mut staging).expect("a difference");
    fs::rename(overlays.here().join("one"), overlays.here().join("two")).expect("renamed");
    send(&mut source, &mut staging).expect("a difference");
    assert_same(&overlays.here(), &overlays.there());
    assert!(!overlays.root.path().join("b-up").join(HIDDEN).exists());
}

#[test]
fn a_store_is_found_by_what_processes_see_of_a_file() {
    let overlays = Overlays::over(FILE_SYSTEMS[0], image);
    let path = overlays.here().join("file");
    fs::write(&path, vec![1; 100_000]).expect("a file");
    let file = fs::File::options().read(true).write(true).open(&path);
    let file = file.expect("a file");
    let metadata = file.metadata().expect("a file");
    let key = Key {
        device: (
            rustix::fs::major(metadata.dev()),
            rustix::fs::minor(metadata.dev()),
        ),
        inode: metadata.ino(),
    };
    std::thread::sleep(std::time::Duration::from_millis(150));
    let (mut source, mut staging) = (overlays.source(), overlays.staging());
    let first = send(&mut source, &mut staging).expect("a difference");
    assert!(source.files().contains(&key), "{key:?}");
    let suspects = Suspects::look(|| Some(HashSet::from([key])));
    let again = send_with(&mut source, &mut staging, &suspects, true).expect("a difference");
    assert_eq!((first.compared, again.compared), (1, 1));
    // After the look it is not passed over once more.
    let none = Suspects::default();
    let third = send_with(&mut source, &mut staging, &none, false).expect("a difference");
    assert_eq!(third.compared, 1);
    source.doubt(&suspects);
    let fourth = send_with(&mut source, &mut staging, &none, false).expect("a difference");
    let fifth = send_with(&mut source, &mut staging, &none, false).expect("a difference");
    assert_eq!((fourth.compared, fifth.compared), (1, 0));
}

#[test]
fn a_layer_that_does_not_say_all_is_refused() {
    let overlays = Overlays::over(FILE_SYSTEMS[0], image);
    let upper = overlays.upper();
    let refused = || {
        let mut source = overlays.source();
        let sent = source.difference(&Suspects::default(), true, &mut |_| Ok(()));
        let refused = sent.expect_err("refused");
        assert_eq!(refused.kind(), ErrorKind::Unfit);
        refused.to_string()
    };
    fs::write(overlays.here().join("etc/conf"), "new").expect("a file");
    let set = |name: &str, value: &[u8]| {
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::lsetxattr(upper.join("etc"), name, value, flags).expect("an attribute");
    };
    for name in ["redirect", "metacopy", "verity"] {
        let name = format!("trusted.overlay.{name}");
        set(&name, b"/elsewhere");
        let text = refused();
        assert!(text.contains(&name), "{text}");
        rustix::fs::lremovexattr(upper.join("etc"), &*name).expect("removed");
    }
    // What an index has.
    fs::hard_link(upper.join("etc/conf"), overlays.root.path().join("index")).expect("a link");
    assert!(refused().contains("has a name outside"));
    fs::remove_file(overlays.root.path().join("index")).expect("removed");
    assert!(Staging::open_overlay(overlays.root.path()).is_err());
}

#[test]
fn a_whiteout_that_goes_by_itself_is_noticed() {
    let root = tempfile::tempdir_in(FILE_SYSTEMS[0]).expect("a folder");
    let (upper, shown) = (root.path().join("upper"), root.path().join("shown"));
    for path in [upper.join("etc"), shown.join("etc")] {
        fs::create_dir_all(path).expect("a folder");
    }
    let hide = |name: &str| {
        let (kind, mode) = (
            rustix::fs::FileType::CharacterDevice,
            rustix::fs::Mode::empty(),
        );
        rustix::fs::mknodat(rustix::fs::CWD, upper.join(name), kind, mode, 0).expect("needs root");
    };
    let mut source = Source::open_layer(&upper, &shown).expect("a source");
    let mut difference = |frozen| {
        let sent = source.difference(&Suspects::default(), frozen, &mut |_| Ok(()));
        sent.map(drop).map_err(|error| error.to_string())
    };
    hide("etc/conf");
    difference(false).expect("a difference");
    fs::remove_file(upper.join("etc/conf")).expect("removed");
    difference(false).expect("a difference");
    difference(true).expect("nothing is shown");
    fs::write(shown.join("etc/conf"), "").expect("a file");
    let refused = difference(true).expect_err("refused");
    assert!(refused.contains("etc/conf is shown again"), "{refused}");
    hide("etc/conf");
    difference(true).expect("it is hidden again");
}

#[test]
fn a_root_that_is_there_is_taken_over_and_what_nothing_came_for_goes() {
    for parent in FILE_SYSTEMS {
        let root = tempfile::tempdir_in(parent).expect("a folder");
        let (here, there) = (root.path().join("a"), root.path().join("b"));
        for path in [&here, &there] {
            fs::create_dir_all(path.join("proc")).expect("a folder");
        }
        fs::write(here.join("file"), "bytes").expect("a file");
        fs::create_dir(here.join("hosts")).expect("a folder");
        // Made by a runtime, and needed by nobody; and of another kind.
        fs::create_dir_all(there.join("only/here")).expect("folders");
        fs::write(there.join("proc/left"), "").expect("a file");
        fs::write(there.join("hosts"), "").expect("a file");
        let inode = fs::metadata(there.join("proc")).expect("it is there").ino();
        let mut source = Source::open(&here, None).expect("a source");
        let mut staging = Staging::open_root(&there, None).expect("a staging");
        send(&mut source, &mut staging).expect("a difference");
        assert_same(&here, &there);
        let same = fs::metadata(there.join("proc")).expect("it is there").ino();
        assert_eq!(same, inode);
        fs::rename(here.join("file"), here.join("proc/file")).expect("renamed");
        let report = send(&mut source, &mut staging).expect("a difference");
        assert_same(&here, &there);
        assert!(!describe(&there).contains_key(Path::new(HIDDEN)));
        // It is what a later one builds on, if it is that.
        drop(staging);
        Staging::open_root(&there, Some(report.digest)).expect("a staging");
        fs::write(there.join("proc/file"), "other").expect("a file");
        let other = Staging::open_root(&there, Some(report.digest)).map(drop);
        assert_eq!(other.map_err(|error| error.kind()), Err(ErrorKind::Differs));
    }
}

#[test]
fn nothing_is_removed_through_a_mount() {
    let root = tempfile::tempdir_in(FILE_SYSTEMS[0]).expect("a folder");
    let (files, there) = (root.path().join("files"), root.path().join("there"));
    fs::create_dir_all(there.join("in/bound")).expect("folders");
    fs::create_dir(&files).expect("a folder");
    fs::write(files.join("kept"), "").expect("a file");
    let bound = there.join("in/bound");
    let mut mount = Command::new("mount");
    let status = mount.arg("--bind").arg(&files).arg(&bound).status();
    assert!(status.expect("mount").success(), "needs root");
    let removed = pageferry_files::remove_all(&there);
    drop(Command::new("umount").arg(&bound).status());
    assert_eq!(removed.map_err(|error| error.kind()), Err(ErrorKind::Io));
    assert!(files.join("kept").exists());
    pageferry_files::remove_all(&there).expect("removed");
    assert!(!there.exists());
}
