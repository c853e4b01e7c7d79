//! Who may use whom among the modules of the crates that have layers.

use std::collections::BTreeSet;
use std::path::Path;

use crate::crates::{CRATES, library};
use crate::{code_and_tests, sources, workspace};

/// Modules, and what each may use: modules of its crate by the name after `crate::`, crates of ours
/// by their own. `proto` and `criu-glue` may be used by all.
type Modules = &'static [(&'static str, &'static [&'static str])];

/// The crates that have modules with layers.
///
/// In the daemon `migration` is where control meets data, so it may use all of them, but only its
/// files `source*` and `target*` may: see [`CROSSROADS`]. In `pages` the source's half and the
/// target's meet in tests alone. In `pager` the client uses nothing of the process.
const MAY_USE: &[(&str, Modules)] = &[("daemon", DAEMON), ("pager", PAGER), ("pages", PAGES)];

const DAEMON: Modules = &[
    ("api", &["migration", "pageferry_api"]),
    ("args", &["config"]),
    (
        "cli",
        &[
            "config",
            "pageferry_api",
            "pageferry_containerd",
            "pageferry_oci",
            "telemetry",
        ],
    ),
    ("config", &["args", "net"]),
    ("lib", &[]),
    ("link", &["pageferry_sys"]),
    (
        "migration",
        &[
            "link",
            "net",
            "pageferry_cgroup",
            "pageferry_files",
            "pageferry_inject",
            "pageferry_ipam",
            "pageferry_pager",
            "pageferry_pages",
            "pageferry_sys",
            "runtime",
            "telemetry",
        ],
    ),
    ("net", &[]),
    (
        "node",
        &[
            "api",
            "config",
            "link",
            "migration",
            "net",
            "pageferry_cgroup",
            "pageferry_ipam",
            "pageferry_pages",
            "runtime",
        ],
    ),
    (
        "runtime",
        &[
            "pageferry_cgroup",
            "pageferry_containerd",
            "pageferry_files",
            "pageferry_inject",
            "pageferry_oci",
            "pageferry_sys",
        ],
    ),
    ("telemetry", &[]),
];

const PAGER: Modules = &[
    ("absent", &["space"]),
    ("ahead", &["message", "runtime"]),
    ("channel", &["message", "pageferry_sys"]),
    (
        "client",
        &["channel", "marks", "message", "pageferry_sys", "plan"],
    ),
    ("error", &["channel", "watcher"]),
    (
        "failure",
        &["message", "pageferry_cgroup", "plan", "serve", "watcher"],
    ),
    (
        "fault",
        &["absent", "pageferry_pages", "pageferry_sys", "space"],
    ),
    (
        "fill",
        &[
            "absent",
            "fault",
            "pageferry_pages",
            "pageferry_sys",
            "space",
        ],
    ),
    ("latency", &["message"]),
    ("lib", &[]),
    (
        "locks",
        &[
            "failure",
            "message",
            "pageferry_cgroup",
            "pageferry_inject",
            "pageferry_sys",
        ],
    ),
    ("main", &["pageferry_pager", "pageferry_sys"]),
    ("marks", &["message"]),
    ("message", &["pageferry_cgroup"]),
    ("plan", &["message", "pageferry_pages"]),
    (
        "process",
        &[
            "ahead",
            "channel",
            "error",
            "failure",
            "marks",
            "message",
            "pageferry_cgroup",
            "pageferry_sys",
            "plan",
            "restore",
            "serve",
            "shield",
            "signals",
            "start",
            "watcher",
        ],
    ),
    (
        "restore",
        &[
            "ahead",
            "failure",
            "locks",
            "message",
            "pageferry_cgroup",
            "pageferry_sys",
            "plan",
            "runtime",
            "serve",
            "start",
            "waits",
            "watcher",
        ],
    ),
    (
        "runtime",
        &[
            "failure",
            "message",
            "pageferry_cgroup",
            "pageferry_sys",
            "start",
        ],
    ),
    (
        "serve",
        &["latency", "pageferry_pages", "pageferry_sys", "worker"],
    ),
    ("shield", &["error"]),
    ("signals", &[]),
    ("space", &[]),
    ("start", &["ahead", "failure", "message", "runtime"]),
    ("waits", &["message"]),
    ("watcher", &["marks", "pageferry_cgroup", "pageferry_sys"]),
    (
        "worker",
        &[
            "absent",
            "fault",
            "fill",
            "pageferry_pages",
            "pageferry_sys",
            "serve",
            "space",
        ],
    ),
];

const PAGES: Modules = &[
    ("decode", &[]),
    ("digest", &["read"]),
    ("encode", &[]),
    ("lib", &[]),
    ("pace", &["encode"]),
    ("pool", &[]),
    ("read", &["pageferry_sys"]),
    ("recv", &["decode", "store"]),
    ("send", &["encode", "pace", "pool", "read"]),
    ("store", &["decode", "digest"]),
    ("track", &["pageferry_inject", "pageferry_sys", "read"]),
];

/// What tests may use besides.
const TESTS_MAY_USE: &[(&str, Modules)] = &[
    (
        "daemon",
        &[
            // That certificates are taken that were issued here.
            ("cli", &["net"]),
            // How an error reads with its causes.
            ("config", &["telemetry"]),
            // The certificates that nodes are given.
            ("net", &["cli"]),
        ],
    ),
    ("pager", &[]),
    (
        "pages",
        &[
            // Both halves of a parcel.
            ("codec", &["encode"]),
            // A process to track.
            ("digest", &["track"]),
            ("read", &["track"]),
            // All the way from a process to a store.
            (
                "send",
                &["digest", "pageferry_sys", "recv", "store", "track"],
            ),
            ("store", &["encode"]),
        ],
    ),
];

/// Modules and crates that only the drivers of the two roles may bring together with pages.
const CROSSROADS: &[&str] = &[
    "link",
    "net",
    "pageferry_cgroup",
    "pageferry_pager",
    "runtime",
];

/// The modules of its own crate that code names, and the crates of ours but for those that all may.
fn uses(code: &str) -> BTreeSet<String> {
    let name = |rest: &str| {
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_');
        rest[..end.unwrap_or(rest.len())].to_owned()
    };
    let modules = code.split("crate::").skip(1).map(name);
    let crates = code.split("pageferry_").skip(1);
    let crates = crates.map(|rest| format!("pageferry_{}", name(rest)));
    let layered = |named: &String| {
        let everybodys = ["pageferry_proto", "pageferry_trial"];
        !everybodys.contains(&named.as_str())
            && CRATES.iter().any(|each| library(each.package) == *named)
    };
    let named: BTreeSet<String> = modules.chain(crates.filter(layered)).collect();
    named.into_iter().filter(|name| !name.is_empty()).collect()
}

fn row<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    let row = table.iter().find(|(known, _)| *known == name);
    row.map(|(_, row)| *row)
}

/// The module that a file belongs to.
fn module_of(inside: &Path) -> String {
    let first = inside.iter().next().map(Path::new);
    let stem = first
        .and_then(Path::file_stem)
        .and_then(|stem| stem.to_str());
    let stem = stem.expect("a name");
    stem.strip_suffix("_tests").unwrap_or(stem).to_owned()
}

#[test]
fn modules_use_exactly_the_modules_they_may() {
    let mut wrong = Vec::new();
    for (folder, table) in MAY_USE {
        let root = workspace().join(folder).join("src");
        let of_tests = row(TESTS_MAY_USE, folder).expect("a table of tests");
        let (mut seen, mut seen_in_tests) = (BTreeSet::new(), BTreeSet::new());
        for path in sources(&root) {
            let inside = path.strip_prefix(&root).expect("below the root");
            let module = module_of(inside);
            if module == "bin" {
                continue;
            }
            let usual = row(table, &module);
            let more = row(of_tests, &module);
            let name = format!("{folder}/src/{}", inside.display());
            if usual.is_none() && more.is_none() {
                wrong.push(format!("{name}: module {module} is not in the table"));
            }
            let (usual, more) = (usual.unwrap_or_default(), more.unwrap_or_default());
            let (code, tests) = code_and_tests(&path);
            for used in uses(&code) {
                if used != module && !usual.contains(&used.as_str()) {
                    wrong.push(format!("{name}: {module} may not use {used}"));
                }
                seen.insert((module.clone(), used));
            }
            for used in uses(&tests) {
                let known = usual.contains(&used.as_str()) || more.contains(&used.as_str());
                if used != module && !known {
                    wrong.push(format!("{name}: tests of {module} may not use {used}"));
                }
                seen_in_tests.insert((module.clone(), used));
            }
            // There `super` is the crate, and would be an edge that is not seen.
            let at_root = inside.components().count() == 1 || inside.ends_with("mod.rs");
            let above = code.lines().any(|line| line.starts_with("use super::"));
            if at_root && inside.components().count() <= 2 && above {
                wrong.push(format!("{name}: says super:: for crate::"));
            }
        }
        for (table, seen) in [(*table, seen), (of_tests, seen_in_tests)] {
            for (module, allowed) in table {
                for used in *allowed {
                    if !seen.contains(&((*module).to_owned(), (*used).to_owned())) {
                        wrong.push(format!(
                            "{folder}: {module} does not use {used}: take it from the table"
                        ));
                    }
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn only_the_drivers_of_the_roles_bring_data_and_control_together() {
    let root = workspace().join("daemon/src/migration");
    let mut wrong = Vec::new();
    for path in sources(&root) {
        let inside = path.strip_prefix(&root).expect("below the root");
        let first = inside.iter().next().and_then(|name| name.to_str());
        let first = first.expect("a name");
        if first.starts_with("source") || first.starts_with("target") {
            continue;
        }
        let (code, _) = code_and_tests(&path);
        let used = uses(&code);
        let met: Vec<&String> = used
            .iter()
            .filter(|used| CROSSROADS.contains(&used.as_str()))
            .collect();
        if used.contains("pageferry_pages") && !met.is_empty() {
            wrong.push(format!("{}: uses pages and {met:?}", inside.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
