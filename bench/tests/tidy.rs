//! What no compiler checks: the layers of the lab go one way, and no files go in a circle.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Each module and those it may name after `crate::`, from the bottom to the top: a module uses
/// only what stands above it here. An edge that nothing uses any more must go.
const LAYERS: &[(&str, &[&str])] = &[
    ("content", &[]),
    ("sys", &[]),
    // Programs that nodes run.
    ("writer", &["content", "sys"]),
    ("cases", &["sys"]),
    // Nodes, and what is started and measured at them.
    ("lab", &["sys"]),
    ("measure", &["lab"]),
    ("workload", &["cases", "lab", "sys", "writer"]),
    ("cluster", &["lab", "sys", "workload"]),
    ("client", &["content", "lab", "workload", "writer"]),
    ("app", &["client", "content", "lab", "workload"]),
    ("mover", &["lab", "sys", "workload"]),
    (
        "bench",
        &[
            "app", "client", "content", "lab", "measure", "mover", "workload", "writer",
        ],
    ),
    (
        "scenario",
        &[
            "app", "client", "cluster", "content", "lab", "measure", "mover", "sys", "workload",
            "writer",
        ],
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("src")
}

/// Every source file of the library by its module path ("lab::node"), with its text.
fn modules() -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut folders = vec![root()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)
            .expect("a folder of sources")
            .flatten()
        {
            let path = entry.path();
            let inside = path.strip_prefix(root()).expect("below the root");
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs")
                && !inside.starts_with("bin")
            {
                let name = inside.with_extension("");
                let name: Vec<_> = name.iter().map(|part| part.to_string_lossy()).collect();
                let name = name.join("::");
                let name = name.strip_suffix("::mod").unwrap_or(&name).to_owned();
                found.insert(name, code(&path));
            }
        }
    }
    found
}

/// A file without its comments and its tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a source file");
    let text = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = text
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"));
    lines.collect::<Vec<_>>().join("\n")
}

/// The paths that a file names after `crate::` or, in its module, after `super::`; each name in
/// braces is a path of its own.
fn paths(module: &str, text: &str) -> Vec<String> {
    let parent = module.rsplit_once("::").map_or("", |(parent, _)| parent);
    let starts = [("crate::", String::new()), ("super::", parent.to_owned())];
    let mut found = Vec::new();
    for (word, base) in starts {
        for rest in text.split(word).skip(1) {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_' && c != ':');
            let path = &rest[..end.unwrap_or(rest.len())];
            let braces = rest[path.len()..].strip_prefix('{');
            let inside = braces.and_then(|inside| inside.split_once('}'));
            let names = inside.map_or(vec![""], |(inside, _)| inside.split(',').collect());
            for name in names {
                let parts = [base.as_str(), path.trim_end_matches(':'), name.trim()];
                let parts = parts.into_iter().filter(|part| !part.is_empty());
                found.push(parts.collect::<Vec<_>>().join("::"));
            }
        }
    }
    found
}

/// The file that a path leads into: the longest of its beginnings that is one.
fn file_of<'a>(path: &str, modules: &'a BTreeMap<String, String>) -> Option<&'a str> {
    let mut path = path;
    loop {
        if let Some((name, _)) = modules.get_key_value(path) {
            return Some(name);
        }
        path = path.rsplit_once("::")?.0;
    }
}

fn first(path: &str) -> &str {
    path.split("::").next().unwrap_or(path)
}

#[test]
fn layers_use_exactly_the_layers_below_them_that_they_may() {
    let modules = modules();
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for (module, text) in modules.iter().filter(|(name, _)| *name != "lib") {
        let layer = first(module);
        let row = LAYERS.iter().find(|(name, _)| *name == layer);
        let (_, allowed) = row.unwrap_or_else(|| panic!("{layer} is not in LAYERS"));
        for path in paths(module, text) {
            let used = first(&path);
            seen.insert((layer, used.to_owned()));
            if used != layer && !allowed.contains(&used) {
                wrong.push(format!("{module}: {layer} may not use {used}"));
            }
        }
    }
    for (index, (layer, allowed)) in LAYERS.iter().enumerate() {
        for used in *allowed {
            if !LAYERS[..index].iter().any(|(name, _)| name == used) {
                wrong.push(format!("{used} does not stand above {layer} in the table"));
            }
            if !seen.contains(&(*layer, (*used).to_owned())) {
                wrong.push(format!(
                    "{layer} does not use {used}: take it from the table"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// A file that declares modules is their parent: what it does with them is no edge, unless it names
/// them by `crate::`.
#[test]
fn no_files_use_each_other_in_a_circle() {
    let modules = modules();
    let mut edges: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for (module, text) in &modules {
        let used = paths(module, text);
        let used = used.iter().filter_map(|path| file_of(path, &modules));
        edges.insert(module, used.filter(|used| used != module).collect());
    }
    // Whatever uses nothing that is left is in no circle.
    loop {
        let left: BTreeSet<&str> = edges.keys().copied().collect();
        edges
            .values_mut()
            .for_each(|used| used.retain(|one| left.contains(one)));
        edges.retain(|_, used| !used.is_empty());
        if edges.len() == left.len() {
            break;
        }
    }
    assert!(edges.is_empty(), "in a circle, or above one: {edges:#?}");
}
