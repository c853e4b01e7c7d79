use std::cell::Cell;
use std::process::Command;

use pageferry_proto::wire::code::ErrorCode;
use pageferry_trial::Trial;

use super::*;

#[test]
fn trial() {
    pageferry_trial::obey();
}

fn start() -> Trial {
    Trial::start("runtime::ipc::tests::trial")
}

/// A process, and its thread in an IPC namespace of its own, in which it obeys.
fn alone() -> (Trial, i32) {
    let mut trial = start();
    let thread = trial.tell("ipc own");
    (trial, thread.parse().expect("an id"))
}

/// Nothing that is to be undone.
fn nothing(_: i32) -> Option<bool> {
    Some(false)
}

fn code(ipc: &Ipc, pids: &[i32]) -> Option<ErrorCode> {
    ipc.look(|| Ok(pids.to_vec()), nothing)
        .err()
        .map(|failure| failure.code())
}

fn of(thread: i32, accepts_loss: bool) -> Ipc {
    Ipc::of(thread, accepts_loss).expect("a namespace of its own")
}

/// Makes an object that nobody has used.
fn make_unused(thread: i32, option: &[&str]) {
    let pid = thread.to_string();
    let mut command = Command::new("nsenter");
    let command = command.args(["--target", &pid, "--ipc", "--", "ipcmk"]);
    let made = command.args(option).output().expect("running ipcmk");
    assert!(made.status.success(), "{made:?}");
}

#[test]
fn objects_that_are_carried_are_no_reason_to_refuse() {
    let (mut trial, thread) = alone();
    let pids = [trial.pid()];
    let ipc = of(thread, false);
    assert_eq!(code(&ipc, &pids), None);
    trial.tell("ipc segment");
    make_unused(thread, &["-S", "3"]);
    make_unused(thread, &["-Q"]);
    assert_eq!(code(&ipc, &pids), None);
    assert_eq!(ipc.unmapped().expect("the table"), []);
    let id = trial.tell("ipc unmapped").parse().expect("an id");
    let bytes = 4096;
    assert_eq!(ipc.unmapped().expect("the table"), [Segment { id, bytes }]);
    assert_eq!(ipc.unmapped_bytes().expect("the table"), bytes);
    assert_eq!(code(&ipc, &pids), None);
}

#[test]
fn what_would_be_lost_is_refused_unless_that_is_accepted() {
    let (mut trial, thread) = alone();
    let pids = [trial.pid()];
    let codes = |undoes| {
        [false, true].map(|accepts_loss| {
            let looked = of(thread, accepts_loss).look(|| Ok(pids.to_vec()), |_| undoes);
            looked.err().map(|failure| failure.code())
        })
    };
    // Without semaphores nothing is to be undone.
    assert_eq!(codes(None), [None, None]);
    trial.tell("ipc undo");
    assert_eq!(codes(Some(false)), [None, None]);
    for undoes in [None, Some(true)] {
        assert_eq!(
            codes(undoes),
            [Some(ErrorCode::IpcLost), None],
            "{undoes:?}"
        );
    }
    trial.tell("ipc removed");
    assert_eq!(codes(Some(false)), [Some(ErrorCode::IpcLost), None]);
}

#[test]
fn a_posix_queue_is_refused_whatever_is_accepted() {
    let (mut trial, thread) = alone();
    trial.tell("ipc posix");
    let pids = [trial.pid()];
    for accepts_loss in [false, true] {
        assert_eq!(
            code(&of(thread, accepts_loss), &pids),
            Some(ErrorCode::IpcUnfit)
        );
    }
}

#[test]
fn a_segment_that_somebody_else_maps_is_refused() {
    let (mut trial, thread) = alone();
    trial.tell("ipc segment");
    let ipc = of(thread, true);
    assert_eq!(code(&ipc, &[trial.pid()]), None);
    let child: i32 = trial.tell("fork").parse().expect("an id");
    assert_eq!(code(&ipc, &[trial.pid(), child]), None);
    let looked = ipc.look(|| Ok(vec![trial.pid()]), nothing);
    let failure = looked.expect_err("the child maps it, too");
    let told = format!("also mapped by process {child}");
    assert!(failure.text().contains(&told), "{failure}");
    // One that was not there when it was first asked for, or is not there any more.
    let asked = Cell::new(0);
    let members = || {
        asked.set(asked.get() + 1);
        let all = [trial.pid(), child];
        Ok(all[..asked.get().min(2)].to_vec())
    };
    assert!(ipc.look(members, nothing).is_ok());
    assert_eq!(asked.get(), 2);
    pageferry_trial::kill(child);
}

#[test]
fn objects_of_the_node_are_refused_to_who_uses_them() {
    let other = start();
    for (what, option) in [("segment", "-m"), ("undo", "-s")] {
        let mut trial = start();
        let ipc = Ipc::of(trial.pid(), true).expect("nothing is opened");
        assert_eq!(code(&ipc, &[trial.pid()]), None, "{what}");
        let id = trial.tell(&format!("ipc {what}"));
        let unfit = Some(ErrorCode::IpcUnfit);
        assert_eq!(code(&ipc, &[trial.pid()]), unfit, "{what}");
        assert_eq!(code(&ipc, &[other.pid()]), None, "{what}");
        let removed = Command::new("ipcrm").args([option, &id]).status();
        assert!(removed.expect("running ipcrm").success());
    }
}

#[test]
fn who_made_an_object_loses_it_unless_that_is_its_owner_or_the_superuser() {
    let given_away = |owner, creator| {
        let object = Object {
            owner,
            creator,
            ..Object::default()
        };
        object.is_given_away()
    };
    assert!(!given_away([103, 104], [103, 104]));
    assert!(!given_away([103, 104], [0, 0]));
    assert!(given_away([103, 104], [103, 7]));
    assert!(given_away([0, 0], [103, 0]));
}

#[test]
fn tables_of_the_kernel_are_read_by_the_names_of_their_columns() {
    let head = "       key      shmid perms                  size  cpid  lpid nattch   uid   gid  \
                cuid  cgid      atime      dtime      ctime                   rss                  \
                swap\n";
    let line = "1885732865      32769  3600               1048576    41    42      3  1000  1001  \
                1000  1001 1795916139          0 1795916139                 20480                 \
                4096\n";
    let expected = Object {
        id: 32769,
        mode: 0o3600,
        owner: [1000, 1001],
        creator: [1000, 1001],
        pids: [41, 42],
        bytes: 24576,
        mappings: 3,
        count: 0,
    };
    let table = format!("{head}{line}");
    assert_eq!(table::parse(Kind::Segments, &table), Some(vec![expected]));
    assert_eq!(table::parse(Kind::Segments, head), Some(Vec::new()));
    assert_eq!(table::parse(Kind::Semaphores, &table), None);
    assert_eq!(table::parse(Kind::Segments, ""), None);
}
