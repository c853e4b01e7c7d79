//! What no compiler checks: who may use whom, where unsafe may stand, and how long a file may be.
//!
//! The rules are those of `ARCHITECTURE.md`; a new edge between modules is a decision, made here.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Lines after which a file is split along its ideas.
const FILE_LINES_MAX: usize = 600;

/// Columns of a line of code or comment.
const LINE_COLUMNS_MAX: usize = 100;

/// Each module of the daemon and the modules it may name after `crate::`. An edge that nothing
/// uses any more must go.
///
/// `migration` is where control meets data, so it may use all four of them, but only its files
/// `source*` and `target*` may: see [`CROSSROADS`]. `pager` shares `runtime` for the cgroup alone.
const MAY_USE: &[(&str, &[&str])] = &[
    ("api", &["migration"]),
    ("args", &["config"]),
    ("cli", &["api", "config", "net", "telemetry"]),
    ("config", &["args", "net"]),
    ("lib", &[]),
    ("link", &["sys"]),
    (
        "migration",
        &[
            "link",
            "net",
            "pager",
            "pages",
            "runtime",
            "sys",
            "telemetry",
        ],
    ),
    ("net", &[]),
    (
        "node",
        &["api", "config", "migration", "net", "pages", "runtime"],
    ),
    ("pager", &["runtime", "sys"]),
    ("pages", &["sys"]),
    ("runtime", &["sys"]),
    ("sys", &[]),
    ("telemetry", &[]),
];

/// What tests in files of their own may use besides.
const TESTS_MAY_USE: &[(&str, &[&str])] = &[
    // How an error reads with its causes.
    ("config", &["telemetry"]),
    // The certificates that nodes are given.
    ("net", &["cli"]),
];

/// Modules that only the drivers of the two roles may bring together.
const CROSSROADS: &[&str] = &["link", "net", "pager", "pages", "runtime"];

fn sources(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)
            .expect("a folder of the workspace")
            .flatten()
        {
            let path = entry.path();
            if path.is_dir() {
                // Only cargo's own: a role of a migration has folders of that name too.
                if path != workspace().join("target") && !path.ends_with(".git") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("a workspace")
        .to_owned()
}

fn uses(text: &str) -> impl Iterator<Item = &str> {
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(|line| line.split("crate::").skip(1))
        .map(|rest| {
            rest.split(|c: char| !c.is_alphanumeric() && c != '_')
                .next()
                .unwrap_or("")
        })
        .filter(|name| !name.is_empty())
}

fn allowed(table: &'static [(&str, &[&str])], module: &str) -> Option<&'static [&'static str]> {
    let row = table.iter().find(|(name, _)| *name == module);
    row.map(|(_, allowed)| *allowed)
}

#[test]
fn modules_use_exactly_the_modules_they_may() {
    let root = workspace().join("daemon/src");
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for path in sources(&root) {
        let inside = path.strip_prefix(&root).expect("below the root");
        let module = inside
            .iter()
            .next()
            .and_then(|name| Path::new(name).file_stem());
        let module = module.and_then(|name| name.to_str()).expect("a name");
        if module == "bin" {
            continue;
        }
        let usual =
            allowed(MAY_USE, module).unwrap_or_else(|| panic!("module {module} is not in MAY_USE"));
        let is_test = inside
            .iter()
            .any(|part| part == "tests" || part == "tests.rs");
        let more = if is_test { TESTS_MAY_USE } else { &[] };
        let more = allowed(more, module).unwrap_or_default();
        let text = fs::read_to_string(&path).expect("a source file");
        for used in uses(&text) {
            seen.insert((module.to_owned(), used.to_owned()));
            if used != module && !usual.contains(&used) && !more.contains(&used) {
                wrong.push(format!("{}: {module} may not use {used}", inside.display()));
            }
        }
    }
    for (module, allowed) in MAY_USE.iter().chain(TESTS_MAY_USE) {
        for used in *allowed {
            if !seen.contains(&((*module).to_owned(), (*used).to_owned())) {
                wrong.push(format!(
                    "{module} does not use {used}: take it from the table"
                ));
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
        let first = inside
            .iter()
            .next()
            .and_then(|name| name.to_str())
            .expect("a name");
        if first.starts_with("source") || first.starts_with("target") {
            continue;
        }
        let text = fs::read_to_string(&path).expect("a source file");
        let met: Vec<&str> = uses(&text)
            .filter(|used| CROSSROADS.contains(used))
            .collect();
        if met.contains(&"pages") && met.len() > 1 {
            wrong.push(format!("{}: uses {met:?}", inside.display()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn unsafe_stands_in_sys_the_tracer_and_the_view_only() {
    let root = workspace();
    let mut wrong = Vec::new();
    for path in sources(&root) {
        let name = path
            .strip_prefix(&root)
            .expect("below the root")
            .display()
            .to_string();
        let allowed = name.contains("/sys/")
            || name.ends_with("/sys.rs")
            || ["criu-glue/tracer/", "criu-glue/view/"]
                .iter()
                .any(|it| name.starts_with(it))
            || name.ends_with("tests/tidy.rs");
        let text = fs::read_to_string(&path).expect("a source file");
        let code = text
            .lines()
            .filter(|line| !line.trim_start().starts_with("//"));
        for (number, line) in code.enumerate() {
            let is_unsafe = line.contains("unsafe {")
                || line.contains("unsafe fn")
                || line.contains("unsafe impl")
                || line.contains("allow(unsafe_code)");
            if is_unsafe && !allowed {
                wrong.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn files_and_lines_are_short_and_nothing_is_left_for_later() {
    let root = workspace();
    let mut wrong = Vec::new();
    for path in sources(&root) {
        let name = path
            .strip_prefix(&root)
            .expect("below the root")
            .display()
            .to_string();
        let text = fs::read_to_string(&path).expect("a source file");
        let lines = text.lines().count();
        if lines > FILE_LINES_MAX {
            wrong.push(format!("{name}: {lines} lines, more than {FILE_LINES_MAX}"));
        }
        // What is expected to the letter is as long as it is.
        let mut is_literal = false;
        for (number, line) in text.lines().enumerate() {
            let number = number + 1;
            is_literal |= line.contains("expect![[");
            let is_free = is_literal || line.contains("://");
            is_literal &= !line.contains("]]");
            if line.chars().count() > LINE_COLUMNS_MAX && !is_free {
                wrong.push(format!(
                    "{name}:{number}: longer than {LINE_COLUMNS_MAX} columns"
                ));
            }
            let later = ["TO", "DO"].concat();
            let mend = ["FIX", "ME"].concat();
            let marks = [later.as_str(), mend.as_str(), "todo!(", "unimplemented!("];
            if !name.ends_with("tests/tidy.rs") && marks.iter().any(|mark| line.contains(mark)) {
                wrong.push(format!("{name}:{number}: {}", line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
