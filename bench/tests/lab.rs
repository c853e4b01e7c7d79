//! The lab tests: each runs the `lab` binary, most of them one scenario, and reads its report.
//!
//! They need root, and one lab at a time: the tests take turns, and the lab's own lock makes sure.
//! Durations are never asserted.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pageferry_bench::bench::series::Series;
use pageferry_bench::scenario::report::Report;

static TURN: Mutex<()> = Mutex::new(());

/// One test at a time; a test that failed says nothing about the next one's turn.
fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn lab(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lab"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn text(output: &Output) -> String {
    let [printed, complaint] = [&output.stdout, &output.stderr].map(|t| String::from_utf8_lossy(t));
    format!("{printed}{complaint}")
}

/// Runs a scenario; its report, and what it printed.
fn run(arguments: &[&str]) -> (Report, String) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let json = folder.path().join("report.json");
    let mut command = lab(&["run", "--json", json.to_str().expect("a plain path")]);
    let output = command.args(arguments).output().expect("running lab");
    let printed = text(&output);
    let object = std::fs::read_to_string(&json).unwrap_or_else(|_| panic!("no report: {printed}"));
    (serde_json::from_str(&object).expect("a report"), printed)
}

/// Nothing lost, nothing broken, nothing changed.
fn check(arguments: &[&str], moves: usize) {
    let _turn = turn();
    let (report, printed) = run(arguments);
    assert_eq!(report.failures, Vec::<String>::new(), "{printed}");
    assert!(report.ok, "{printed}");
    assert_eq!(report.moves.len(), moves, "{printed}");
    assert_eq!(
        (report.lost_acks, report.broken_connections),
        (0, 0),
        "{printed}"
    );
    assert_ne!(report.digest_equal, Some(false), "{printed}");
    assert_clean();
}

/// Nothing of a lab is left on the machine but its logs.
fn assert_clean() {
    let subtrees = [
        "/sys/fs/cgroup/freezer",
        "/sys/fs/cgroup/unified",
        "/sys/fs/cgroup",
    ];
    for folder in subtrees.map(|mount| Path::new(mount).join("pageferry-lab")) {
        assert!(!folder.exists(), "{} is left", folder.display());
    }
    assert!(!Path::new(STATE).exists(), "{STATE} is left");
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("the mounts");
    assert!(!mounts.contains("pageferry-lab"), "{mounts}");
}

#[test]
fn clients_survive_a_move_by_stock_criu() {
    check(&["stop_and_copy"], 1);
}

#[test]
fn a_writer_survives_a_move_by_stock_criu() {
    check(&["baseline", "--only", "remap"], 1);
}

#[test]
fn clients_survive_a_move() {
    check(&["demo"], 1);
}

#[test]
fn nobody_answers_for_a_workload_from_the_wrong_side() {
    check(&["capture"], 5);
}

#[test]
fn workloads_cross() {
    check(&["cross"], 4);
}

#[test]
fn a_workload_with_all_namespaces_of_its_own_moves_back_and_forth() {
    check(&["memory", "--only", "own-pid-mnt"], 5);
}

#[test]
fn a_web_server_moves_while_clients_connect_and_no_request_fails() {
    check(&["nginx", "--only", "few"], 4);
}

/// TCP and datagrams, some of which wait unread, over IPv4 and IPv6.
#[test]
fn what_comes_in_a_freeze_reaches_a_workload_in_order_and_once() {
    check(&["parking", "--only", "few"], 8);
}

/// Redis as a bare tree, and in containers of runc, crun, podman and containerd, there and back
/// each.
#[test]
fn containers_move_there_and_back_as_their_runtimes_own() {
    check(&["containers", "--only", "few"], 10);
}

/// A pod of podman with three containers, two of which talk to each other over its loopback, and a
/// client outside.
#[test]
fn a_pod_of_podman_moves_there_and_back_as_one() {
    check(&["containers", "--only", "podman-pod"], 4);
}

/// Whoever moves one of its containers is killed: all of it runs at one node.
#[test]
#[ignore = "takes 7 minutes, and the gate of a CRIU that has to wait for others is easily missed"]
fn a_pod_of_podman_runs_at_one_node_whoever_is_killed() {
    check(&["containers", "--only", "podman-pod-faults"], 1);
}

/// A container writes to its root file system, and to files of its image, and is moved there and
/// back; and whoever takes part is killed.
#[test]
fn a_container_moves_with_what_it_has_written() {
    check(&["containers", "--only", "crun-files"], 4);
}

/// A sparse file in a root file system, and a target's disk that is full from the beginning, or
/// fills.
#[test]
fn a_container_moves_sparse_files_and_stays_where_the_other_disk_is_full() {
    check(&["containers", "--only", "disk"], 3);
}

/// Images, runtimes and names that a target does not have, or has.
#[test]
fn a_container_that_cannot_come_is_refused_by_one_clear_error() {
    check(&["containers", "--only", "containerd-errors"], 1);
}

/// A folder that is written, mapped, renamed, linked and stamped moves with its workload, there and
/// back, and what the target has no room for stays where it was.
#[test]
fn folders_travel_under_writers_and_a_full_disk_ends_a_move_cleanly() {
    check(&["files", "--only", "few,full"], 4);
}

/// nginx, memcached, Valkey, a JVM, numpy, PostgreSQL and MariaDB, there and back, each with a
/// proof of its own.
#[test]
fn applications_move_under_load_and_lose_nothing() {
    check(&["apps", "--only", "few"], 14);
}

#[test]
fn memory_that_is_remapped_while_it_is_copied_arrives_right() {
    check(&["memory", "--only", "remap"], 5);
}

/// Stopped children, processes of a dead session, locks on storage that both nodes have, and states
/// that pass: connections not yet accepted, unread messages, a vfork. And System V objects.
#[test]
fn workloads_that_criu_cannot_dump_as_they_are_move_or_are_refused_by_name() {
    check(&["cases"], 40);
}

/// One cell of the benchmark, moved once: everything is measured, and there is a report.
#[test]
fn a_benchmark_measures_a_move_and_draws_it() {
    let _turn = turn();
    let folder = tempfile::tempdir().expect("a temporary folder");
    let out = folder.path().to_str().expect("a plain path");
    let only = ["--only", "writer/unshaped/pageferry", "--repeats", "1"];
    let bench = [&["bench", "--out", out][..], &only].concat();
    let printed = done(&bench);
    let series = Series::read(&folder.path().join("series.json")).expect("a series");
    let cell = series.cell("writer", "unshaped", "pageferry");
    let [run] = &cell.expect("the cell").runs[..] else {
        panic!("{printed}")
    };
    assert_eq!(run.failure, None, "{printed}");
    assert!(run.verified && run.reconnects == 0, "{run:?}");
    let measured = [run.gap_ms, run.downtime_ms, run.total_ms, run.cpu_per_gib()];
    assert!(measured.iter().all(Option::is_some), "{run:?}");
    // All that is in memory must go, and compresses less than three times.
    assert!(
        run.memory_bytes < run.wire_bytes.map(|bytes| 3 * bytes),
        "{run:?}"
    );
    assert!(!run.timeline.is_empty() && run.calm.is_some(), "{run:?}");
    let page = std::fs::read_to_string(folder.path().join("report.html")).expect("a report");
    assert!(
        page.contains("<svg") && page.ends_with("</html>\n"),
        "{page}"
    );
    assert_clean();
}

#[test]
fn a_lab_stays_up_until_it_is_taken_down_and_is_the_only_one() {
    let _turn = turn();
    let up = lab(&["up", "--bare", "--nodes", "3", "--link", "200mbit"])
        .output()
        .expect("lab up");
    assert!(up.status.success(), "{}", text(&up));
    let second = lab(&["up", "--bare"]).output().expect("lab up");
    assert!(!second.status.success(), "{}", text(&second));
    assert!(text(&second).contains("lab down"), "{}", text(&second));

    let name = lab(&["exec", "c", "--", "hostname"])
        .output()
        .expect("lab exec");
    assert_eq!(
        String::from_utf8_lossy(&name.stdout),
        "node-c\n",
        "{}",
        text(&name)
    );
    let code = lab(&["exec", "a", "--", "sh", "-c", "exit 7"])
        .status()
        .expect("lab exec");
    assert_eq!(code.code(), Some(7));
    let started = lab(&["start", "b", "writer", "--", "memory=4M"])
        .output()
        .expect("lab start");
    assert!(
        text(&started).contains("process/10000"),
        "{}",
        text(&started)
    );
    let status = lab(&["status"]).output().expect("lab status");
    assert!(text(&status).contains("process/10000"), "{}", text(&status));

    let down = lab(&["down"]).output().expect("lab down");
    assert!(down.status.success(), "{}", text(&down));
    assert_clean();
}

/// Has the lab do what must succeed; what it printed.
fn done(arguments: &[&str]) -> String {
    let output = lab(arguments).output().expect("lab");
    assert!(output.status.success(), "{arguments:?}: {}", text(&output));
    text(&output)
}

/// A client at node a of a Redis, whose connection is asked for its id at the beginning and at the
/// end.
struct Client(Child);

impl Client {
    fn connect(address: &str) -> Self {
        let client = lab(&["exec", "a", "--", "redis-cli", "-h", address])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn();
        let mut client = Self(client.expect("a client"));
        client.ask();
        let list = ["redis-cli", "-h", address, "CLIENT", "LIST"];
        let list = [&["exec", "a", "--"], &list[..]].concat();
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done(&list).contains("cmd=client|id") {
            assert!(Instant::now() < deadline, "no client connects");
        }
        client
    }

    fn ask(&mut self) {
        let input = self.0.stdin.as_mut().expect("its input");
        input.write_all(b"CLIENT ID\n").expect("asking");
    }

    /// One that had to connect again has another id.
    fn assert_connected(mut self) {
        self.ask();
        let told = self.0.wait_with_output().expect("a client");
        let told = String::from_utf8_lossy(&told.stdout).into_owned();
        let ids: Vec<&str> = told.split_whitespace().collect();
        assert!(
            matches!(ids[..], [one, other] if one == other),
            "ids {told}"
        );
    }
}

/// And whoever asks twice under one id moves it once.
#[test]
fn a_workload_joins_a_network_that_is_there_already() {
    let _turn = turn();
    done(&["up"]);
    let started = done(&["start", "a", "redis"]);
    let (workload, address) = ("process/10000", "10.90.0.101");
    assert!(
        started.contains(workload) && started.contains(address),
        "{started}"
    );
    done(&["exec", "b", "--", "sh", "-ec", NETWORK]);
    let client = Client::connect(address);
    let id = "00000000000000000000000000000007";
    let there = [
        &["exec", "a", "--", "pageferry", "migrate", workload, "--to"],
        &["b", "--join-network", "web", "--id", id][..],
    ]
    .concat();
    let first = done(&there);
    client.assert_connected();
    let inside = done(&["exec", "b", "--", "sh", "-c", INODES]);
    let inodes: Vec<&str> = inside.split_whitespace().collect();
    assert!(
        matches!(inodes[..], [one, other] if one == other),
        "{inside}"
    );
    // Its process is not here any more, and that is nothing to a call that was made before.
    let again = done(&there);
    assert!(first.contains(id) && again.contains(id), "{first}{again}");
    let other = [&there[..], &["--verify"]].concat();
    let refused = lab(&other).output().expect("lab");
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    assert!(text(&refused).contains("id-taken"), "{}", text(&refused));
    // Back into one that is made; the other one stays, without links.
    done(&[
        "exec",
        "b",
        "--",
        "pageferry",
        "migrate",
        workload,
        "--to",
        "a",
    ]);
    Client::connect(address).assert_connected();
    let links = done(&["exec", "b", "--", "ip", "-n", "web", "-o", "link"]);
    assert!(!links.contains("eth0"), "{links}");
    done(&["down"]);
    assert_clean();
}

/// As README has it, for the first workload of a lab.
const NETWORK: &str = "
ip netns add web
ip link add vweb type veth peer name eth0 netns web
ip -n web addr add 10.90.0.101/24 dev eth0
ip -n web link set lo up
ip -n web link set eth0 up
ip link set vweb up
ip -n web route add default via 10.90.0.1";

/// The network namespace of the workload, and the one that was made.
const INODES: &str = "stat -L -c %i /proc/10000/ns/net /run/netns/web";

/// It is built from source, which takes twenty minutes of processor time.
#[test]
#[ignore = "builds Kubernetes, if the cache does not have it"]
fn a_cluster_of_kubernetes_comes_up_serves_and_leaves_nothing() {
    check(&["kubernetes"], 0);
    check(&["kubernetes", "--only", "annotated"], 0);
    check(&["kubernetes", "--only", "drain"], 0);
    check(&["kubernetes", "--only", "twenty=2"], 2);
    check(&["kubernetes", "--only", "emptydir"], 4);
    check(&["kubernetes", "--only", "install"], 0);
    check(&["kubernetes", "--only", "kills=3"], 0);
    let _turn = turn();
    done(&["up", "--kubernetes", "--bare", "--nodes", "3"]);
    let nodes = done(&["kubectl", "get", "nodes", "--output", "name"]);
    assert_eq!(nodes, "node/node-a\nnode/node-b\nnode/node-c\n");
    let status = done(&["status"]);
    assert_eq!(status.matches(" Ready ").count(), 3, "{status}");
    done(&["down"]);
    assert_clean();
}

#[test]
fn what_a_killed_lab_left_is_cleaned_up() {
    let _turn = turn();
    let mut child = lab(&["run", "stop_and_copy"])
        .stdout(Stdio::null())
        .spawn()
        .expect("lab run");
    let deadline = Instant::now() + Duration::from_secs(60);
    // Its workload is there: nodes, links and namespaces are.
    while !std::fs::read_to_string(STATE).is_ok_and(|state| state.contains("\"workloads\": 1")) {
        assert!(Instant::now() < deadline, "no lab comes up");
        std::thread::sleep(Duration::from_millis(10));
    }
    child.kill().expect("killing lab");
    child.wait().expect("waiting for lab");
    let down = lab(&["down"]).output().expect("lab down");
    assert!(down.status.success(), "{}", text(&down));
    assert_clean();
}

const STATE: &str = "/run/pageferry-lab/state.json";
