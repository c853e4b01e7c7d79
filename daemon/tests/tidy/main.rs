//! What no compiler checks: who may use whom, where unsafe may stand, and how long a file may be.
//!
//! The rules are those of `ARCHITECTURE.md`; a new edge between crates or modules is a decision,
//! made here.

mod crates;
mod modules;

use std::fs;
use std::path::{Path, PathBuf};

use crates::CRATES;

/// Lines after which a file is split along its ideas.
const FILE_LINES_MAX: usize = 600;

/// Columns of a line of code or comment.
const LINE_COLUMNS_MAX: usize = 100;

/// Crates that have a place for unsafe code. All others forbid it.
const HAVE_UNSAFE: &[&str] = &[
    "bench",
    "criu-glue",
    "criu-glue/gate",
    "criu-glue/tracer",
    "criu-glue/view",
    "sys",
    "sys/trial",
];

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

/// The lines of code of a source file, and those of its tests.
fn code_and_tests(path: &Path) -> (String, String) {
    let text = fs::read_to_string(path).expect("a source file");
    let inside = path.strip_prefix(workspace()).expect("below the root");
    let is_test = inside
        .iter()
        .any(|part| part == "tests" || part == "tests.rs")
        || inside.to_string_lossy().ends_with("_tests.rs");
    let begins = |line: &str| line.ends_with("mod tests {") && !line.starts_with(' ');
    let lines: Vec<&str> = text.lines().collect();
    let code = match lines.iter().position(|line| begins(line)) {
        _ if is_test => 0,
        Some(tests) => tests,
        None => lines.len(),
    };
    let code_of = |lines: &[&str]| {
        let lines = lines.iter().copied();
        let lines = lines.filter(|line| !line.trim_start().starts_with("//"));
        lines.collect::<Vec<_>>().join("\n")
    };
    (code_of(&lines[..code]), code_of(&lines[code..]))
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
            || name.starts_with("sys/")
            || name.ends_with("/sys.rs")
            || name.starts_with("criu-glue/tracer/")
            || name.starts_with("criu-glue/view/")
            || name.starts_with("daemon/tests/tidy/");
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
    for each in CRATES
        .iter()
        .filter(|each| !HAVE_UNSAFE.contains(&each.folder))
    {
        let path = root.join(each.folder).join("src/lib.rs");
        let text = fs::read_to_string(&path).expect("a library");
        if !text.lines().any(|line| line == "#![forbid(unsafe_code)]") {
            wrong.push(format!("{}: does not forbid unsafe code", each.package));
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
            if !name.starts_with("daemon/tests/tidy/")
                && marks.iter().any(|mark| line.contains(mark))
            {
                wrong.push(format!("{name}:{number}: {}", line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
