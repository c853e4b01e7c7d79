//! Containers as people really run them, of runc or crun: what has files, users, limits, filters
//! and shared memory of its own moves there and back; what does not move is refused by its name,
//! and runs on.

use std::fs;
use std::os::unix::net::UnixListener;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::files::{DISK, Disk, make_disk, remove_disk};
use super::report::Report;
use super::session::Session;
use super::settings::{Settings, other};
use super::volumes;
use crate::app::user::Home;
use crate::app::{App, nginx as nginx_app, postgresql};
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::Lab;
use crate::lab::layer::LayerPlan;
use crate::lab::node::Node;
use crate::mover::pageferry::{Migration, Pageferry, SETTLE_TIME_MAX, wait_settled};
use crate::mover::{MoveOptions, Mover, Order};
use crate::workload::container::{self, Container, Plan, Runtime};
use crate::workload::{nginx, podman, redis};

/// All shapes, in containers of `runtime`; or only one of them.
pub fn run(
    settings: &Settings,
    (runtime, only): (Runtime, Option<&str>),
    report: &mut Report,
) -> Result<()> {
    let mut lab = settings.lab_with(&LAYER, 2)?;
    for node in &lab.nodes {
        make_disk(node, Disk::Own)?;
    }
    for (name, case) in CASES {
        if only.is_some_and(|only| only != name) {
            continue;
        }
        match case(&mut lab, runtime, report) {
            Ok(said) => println!("{name} ({}): {said}", runtime.name()),
            Err(error) => {
                report.fail(format!("{name}: {error:#}"));
                // Its workload may be left.
                return Ok(());
            }
        }
        wait_settled(&lab, SETTLE_TIME_MAX)?;
        for node in &lab.nodes {
            remove_disk(node)?;
            make_disk(node, Disk::Own)?;
        }
    }
    Ok(())
}

/// Whether a shape is called so.
pub fn has(name: &str) -> bool {
    CASES.iter().any(|(known, _)| *known == name)
}

type Case = fn(&mut Lab, Runtime, &mut Report) -> Result<String>;

const CASES: [(&str, Case); 6] = [
    ("hardened", hardened),
    ("nginx", nginx_workers),
    ("postgresql", postgres),
    ("refused", refused),
    ("volume", volumes::many),
    ("volume-killed", volumes::killed),
];

/// What nodes have for it.
const LAYER: LayerPlan = LayerPlan {
    name: "shapes",
    packages: &["conmon", "libcriu2", "netavark", "podman", "postgresql"],
    files: &[podman::SETTINGS],
    script: "rm -rf /var/lib/postgresql/*/main",
};

/// Redis of a user without rights, under the profile that engines give to all, with limits, and
/// with something in `/dev/shm`.
fn hardened(lab: &mut Lab, runtime: Runtime, report: &mut Report) -> Result<String> {
    let files = [SHELL, SUM, DD, container::SERVER, container::CLIENT];
    let shape = Plan {
        name: "hardened",
        programs: files.map(str::to_owned).to_vec(),
        changes: confine(lab.node("a")?)?,
        ..Plan::redis()
    };
    let held = container::start_with(lab, runtime, "a", &shape)?;
    held.wait_until_it_listens(lab, redis::PORT)?;
    let container = held.container.clone().context("a container")?;
    let exec = |node: &Node, script: &str| {
        let words = ["exec", &container.id, SHELL, "-c", script];
        container::ask(node, &container, &words)
    };
    let node = lab.node("a")?;
    let sum = format!("{SUM} {SHM_FILE}");
    let make = format!("{DD} if=/dev/urandom of={SHM_FILE} bs=1M count=4 status=none; {sum}");
    let written = exec(node, &make)?;
    let before = confined(node, &container, held.pid)?;
    for wanted in ["Seccomp: 2", "NoNewPrivs: 1", "CapEff: 0000000000000000"] {
        ensure!(before.contains(wanted), "it has not {wanted}: {before}");
    }
    let dataset = Dataset::first_row(BYTES);
    let load = LoadPlan::first_row();
    let mut session = Session::watch(lab, &Pageferry, "a", held, dataset, load)?;
    for _ in 0..MOVES {
        ensure!(session.move_on(lab, report)?, "it has not moved");
        let node = lab.node(&session.at)?;
        container::check_listed(node, &container, session.workload.pid)?;
        let after = confined(node, &container, session.workload.pid)?;
        ensure!(before == after, "it was\n{before}\nand is\n{after}");
        let read = exec(node, &sum)?;
        ensure!(
            read == written,
            "{SHM_FILE} was {written:?} and is {read:?}"
        );
    }
    session.finish(report)?.kill(lab)?;
    Ok(format!("{MOVES} moves; {}", before.replace('\n', ", ")))
}

fn confine(node: &Node) -> Result<Vec<(&'static str, Value)>> {
    let none: [&str; 0] = [];
    Ok(vec![
        ("/process/user", json!({"uid": 1000, "gid": 1000})),
        ("/process/noNewPrivileges", true.into()),
        (
            "/process/capabilities",
            json!({
                "bounding": none, "effective": none, "permitted": none,
            }),
        ),
        (
            "/linux/resources",
            json!({
                "memory": {"limit": 512 << 20},
                "cpu": {"shares": 512, "quota": 150_000, "period": 100_000},
                "pids": {"limit": 64},
            }),
        ),
        ("/linux/seccomp", profile(node)?),
    ])
}

/// What confines a container: as the kernel has it of its root, as its cgroups say, and as its
/// runtime has written it down.
fn confined(node: &Node, container: &Container, pid: i32) -> Result<String> {
    let read = |path: &str| fs::read_to_string(node.path(path)).unwrap_or_default();
    let status = read(&format!("/proc/{pid}/status"));
    let wanted = |line: &&str| {
        let name = line.split(':').next().unwrap_or_default();
        name.starts_with("Cap") || ["Uid", "Gid", "NoNewPrivs", "Seccomp"].contains(&name)
    };
    let mut lines: Vec<String> = status
        .lines()
        .filter(wanted)
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    let (id, folders) = (&container.id, ["", "memory", "cpu", "pids"]);
    let mut limits = 0;
    for (file, folder) in LIMITS
        .iter()
        .flat_map(|file| folders.map(|folder| (file, folder)))
    {
        let said = read(&format!("/sys/fs/cgroup/{folder}/{id}/{file}"));
        if !said.is_empty() {
            lines.push(format!("{file} {}", said.trim_end()));
            limits += 1;
        }
    }
    ensure!(3 <= limits, "the cgroups of {id} do not say their limits");
    let state = read(&format!("/run/runc/{id}/state.json"));
    if let Ok(state) = serde_json::from_str::<Value>(&state) {
        let config = &state["config"];
        let limits = [
            "memory",
            "cpu_quota",
            "cpu_period",
            "cpu_shares",
            "pids_limit",
        ];
        let limits = limits.map(|name| format!("{name} {}", config["cgroups"][name]));
        lines.push(format!(
            "runc: {}, readonlyfs {}",
            limits.join(", "),
            config["readonlyfs"]
        ));
    }
    Ok(lines.join("\n"))
}

/// The profile of podman and others, as the specification of OCI has it: the rules that hold for a
/// container without capabilities.
fn profile(node: &Node) -> Result<Value> {
    let text = fs::read_to_string(node.path("/usr/share/containers/seccomp.json"));
    let profile: Value = serde_json::from_str(&text.context("the profile of containers")?)?;
    let has = |rule: &Value, place: &str, what: &str| {
        let all = rule.pointer(place).and_then(Value::as_array);
        all.is_some_and(|all| all.iter().any(|one| what.is_empty() || one == what))
    };
    let holds = |rule: &&Value| {
        let other = has(rule, "/includes/arches", "") && !has(rule, "/includes/arches", "amd64");
        !other && !has(rule, "/includes/caps", "") && !has(rule, "/excludes/arches", "amd64")
    };
    let rules = profile["syscalls"].as_array().context("rules")?;
    let mut kept: Vec<Value> = rules.iter().filter(holds).cloned().collect();
    for rule in &mut kept {
        let known = ["names", "action", "args", "errnoRet"];
        let rule = rule.as_object_mut().context("a rule")?;
        rule.retain(|name, value| known.contains(&name.as_str()) && !value.is_null());
    }
    Ok(json!({
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": kept,
    }))
}

/// nginx with a master of root, workers of another user, and its files on storage that nodes share.
fn nginx_workers(lab: &mut Lab, runtime: Runtime, report: &mut Report) -> Result<String> {
    let workload = nginx::start_as(lab, |lab, arguments| {
        let files = [nginx::PROGRAM, "/etc/passwd", "/etc/group"];
        let rights = [
            "CAP_SETUID",
            "CAP_SETGID",
            "CAP_NET_BIND_SERVICE",
            "CAP_CHOWN",
            "CAP_KILL",
            "CAP_DAC_OVERRIDE",
        ];
        let rights = json!({"bounding": rights, "effective": rights, "permitted": rights});
        let bodies = "/var/lib/nginx";
        let bodies = json!({"destination": bodies, "type": "tmpfs", "source": "tmpfs"});
        let shape = Plan {
            name: "nginx",
            arguments,
            programs: files.map(str::to_owned).to_vec(),
            mounts: vec![container::bind(nginx::FOLDER, nginx::FOLDER), bodies],
            changes: vec![("/process/capabilities", rights)],
            ..Plan::redis()
        };
        container::start_with(lab, runtime, "a", &shape)
    })?;
    let app = nginx_app::watch(lab, workload)?;
    let options = MoveOptions {
        shared: vec![nginx::FOLDER.to_owned()],
        ..MoveOptions::default()
    };
    there_and_back(lab, app, &options, report)
}

/// PostgreSQL of its own user, with its files in a folder that travels, and its shared memory in
/// `/dev/shm`.
fn postgres(lab: &mut Lab, runtime: Runtime, report: &mut Report) -> Result<String> {
    let home = Home::make(lab, "postgresql", "postgres")?;
    let data = format!("{DISK}/data");
    let make = format!("mkdir -p {data} && chown {}:{} {data}", home.uid, home.uid);
    lab.node("a")?.command("sh")?.args(["-ec", &make]).run()?;
    let settings = "dynamic_shared_memory_type = posix\njit = off\n";
    let app = postgresql::start_as(lab, home, (&data, settings), |lab, uid, program| {
        // Beside it there is a compiler, which is not needed.
        let library = program.replace("/bin/postgres", "/lib/plpgsql.so");
        let files = [&*program, &*library, "/usr/share/postgresql", "/etc/passwd"];
        let shape = Plan {
            name: "postgresql",
            arguments: [&*program, "-D", "/data"].map(str::to_owned).to_vec(),
            programs: files.map(str::to_owned).to_vec(),
            mounts: vec![container::bind(&data, "/data")],
            changes: vec![("/process/user", json!({"uid": uid, "gid": uid}))],
            ..Plan::redis()
        };
        container::start_with(lab, runtime, "a", &shape)
    })?;
    let options = MoveOptions {
        copied: vec![data.clone()],
        ..MoveOptions::default()
    };
    let said = there_and_back(lab, app, &options, report)?;
    let is_back = lab.node("a")?.path(&data).join("PG_VERSION").is_file();
    ensure!(
        is_back && !lab.node("b")?.path(&data).exists(),
        "its files are not where it is"
    );
    Ok(said)
}

/// Moves an application there and back, and has it proven.
fn there_and_back(
    lab: &Lab,
    mut app: Box<dyn App>,
    options: &MoveOptions,
    report: &mut Report,
) -> Result<String> {
    let mut at = "a";
    let mut seen = Vec::new();
    for _ in 0..MOVES {
        app.before_move(lab)?;
        let workload = app.workload().clone();
        let order = Order {
            workload: &workload,
            from: at,
            to: other(at),
            options,
        };
        let outcome = Pageferry.move_workload(lab, &order)?;
        let pid = outcome.pid_at_target().unwrap_or(workload.pid);
        app.workload().pid = pid;
        let Some(moved) = outcome.moved else {
            bail!("{} has not moved: {:?}", workload.name(), outcome.error);
        };
        at = other(at);
        let during = app.after_move()?;
        let container = workload.container.as_ref().context("a container")?;
        container::check_listed(lab.node(at)?, container, pid)?;
        container::check_gone(lab.node(other(at))?, container)?;
        let (downtime, wire) = (moved.downtime_ms, moved.wire_bytes >> 20);
        seen.push(format!(
            "{downtime:.0} ms, {wire} MiB, pause {:?}",
            during.pause
        ));
        report.push(moved);
    }
    let workload = app.workload().clone();
    let proof = app.prove(lab)?;
    workload.kill(lab)?;
    report.note_contents(proof.wrong.is_empty());
    ensure!(proof.wrong.is_empty(), "{}", proof.wrong.join("; "));
    Ok(format!("{}; {}", seen.join("; "), proof.text))
}

/// What does not move is refused by its name, and runs on.
fn refused(lab: &mut Lab, runtime: Runtime, _: &mut Report) -> Result<String> {
    let maps = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let kinds = ["pid", "network", "ipc", "uts", "mount", "user"];
    let kinds = kinds.map(|kind| json!({ "type": kind }));
    let source = format!("{DISK}/unnamed");
    lab.node("a")?
        .command("mkdir")?
        .args(["-p", &source])
        .run()?;
    let user = vec![
        ("/linux/namespaces", json!(kinds)),
        ("/linux/uidMappings", maps.clone()),
        ("/linux/gidMappings", maps),
    ];
    let cases = [
        (
            "terminal",
            Vec::new(),
            vec![("/process/terminal", true.into())],
            "terminal",
        ),
        ("user", Vec::new(), user, "user namespace"),
        (
            "unnamed",
            vec![container::bind(&source, "/data")],
            Vec::new(),
            "--copy",
        ),
    ];
    let mut said = Vec::new();
    for (name, mounts, changes, wanted) in cases {
        let shape = Plan {
            name,
            mounts,
            changes,
            ..Plan::redis()
        };
        let console = listen(lab.node("a")?)?;
        let held = container::start_with(lab, runtime, "a", &shape)
            .with_context(|| format!("a container with {name}"))?;
        held.wait_until_it_listens(lab, redis::PORT)?;
        let flags = MoveOptions::default();
        let outcome = Migration::start(lab.node("a")?, &held.name(), "b", &flags)?.finish()?;
        let (code, text) = outcome.error.context("it has moved")?;
        ensure!(text.contains(wanted), "{name}: {code}: {text}");
        let container = held.container.as_ref().context("a container")?;
        container::check_listed(lab.node("a")?, container, held.pid)?;
        held.wait_until_it_listens(lab, redis::PORT)?;
        held.kill(lab)?;
        drop(console);
        said.push(format!("{code}: {text}"));
    }
    Ok(said.join("; "))
}

/// Whoever gets the terminals of containers.
fn listen(node: &Node) -> Result<UnixListener> {
    let path = node.path(container::CONSOLE);
    drop(fs::remove_file(&path));
    UnixListener::bind(&path).with_context(|| format!("listening at {}", path.display()))
}

const SHELL: &str = "/usr/bin/dash";
const SUM: &str = "/usr/bin/sha256sum";
const DD: &str = "/usr/bin/dd";
const SHM_FILE: &str = "/dev/shm/kept";
/// Of both versions of cgroups.
const LIMITS: [&str; 8] = [
    "memory.max",
    "memory.limit_in_bytes",
    "cpu.max",
    "cpu.weight",
    "cpu.shares",
    "cpu.cfs_quota_us",
    "cpu.cfs_period_us",
    "pids.max",
];
const MOVES: usize = 2;
const BYTES: u64 = 64 << 20; // 64 MiB
