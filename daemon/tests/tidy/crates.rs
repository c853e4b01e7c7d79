//! Who may use whom among the crates, and what must not be linked into the pager.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::{code_and_tests, sources, workspace};

/// Where and what a crate is, and which crates of ours it may use.
pub struct Crate {
    pub folder: &'static str,
    pub package: &'static str,
    /// What is linked.
    uses: &'static [&'static str],
    /// What its tests use besides.
    tests_use: &'static [&'static str],
}

/// Each crate of the workspace. An edge that nothing uses any more must go.
///
/// `pageferry-trial` makes processes do what no program of ours may: it is for tests alone.
pub const CRATES: &[Crate] = &[
    Crate {
        folder: "proto",
        package: "pageferry-proto",
        uses: &[],
        tests_use: &[],
    },
    Crate {
        folder: "proto/sim",
        package: "pageferry-sim",
        uses: &["pageferry-proto"],
        tests_use: &[],
    },
    Crate {
        folder: "criu-glue",
        package: "criu-glue",
        uses: &["criu-gate", "criu-tracer"],
        tests_use: &["criu-view", "pageferry-bench"],
    },
    Crate {
        folder: "criu-glue/gate",
        package: "criu-gate",
        uses: &[],
        tests_use: &[],
    },
    Crate {
        folder: "criu-glue/tracer",
        package: "criu-tracer",
        uses: &[],
        tests_use: &[],
    },
    Crate {
        folder: "criu-glue/view",
        package: "criu-view",
        uses: &["criu-tracer"],
        tests_use: &[],
    },
    Crate {
        folder: "sys",
        package: "pageferry-sys",
        uses: &[],
        tests_use: &[],
    },
    Crate {
        folder: "sys/trial",
        package: "pageferry-trial",
        uses: &["pageferry-sys"],
        tests_use: &[],
    },
    Crate {
        folder: "cgroup",
        package: "pageferry-cgroup",
        uses: &["pageferry-proto", "pageferry-sys"],
        tests_use: &["pageferry-trial"],
    },
    Crate {
        folder: "inject",
        package: "pageferry-inject",
        uses: &["pageferry-cgroup", "pageferry-sys"],
        tests_use: &["pageferry-trial"],
    },
    Crate {
        folder: "files",
        package: "pageferry-files",
        uses: &[],
        tests_use: &["pageferry-trial"],
    },
    Crate {
        folder: "pages",
        package: "pageferry-pages",
        uses: &[
            "criu-glue",
            "pageferry-inject",
            "pageferry-proto",
            "pageferry-sys",
        ],
        tests_use: &["pageferry-trial"],
    },
    Crate {
        folder: "pager",
        package: "pageferry-pager",
        uses: &[
            "criu-glue",
            "pageferry-cgroup",
            "pageferry-inject",
            "pageferry-pages",
            "pageferry-proto",
            "pageferry-sys",
        ],
        tests_use: &[],
    },
    Crate {
        folder: "api",
        package: "pageferry-api",
        uses: &[],
        tests_use: &[],
    },
    Crate {
        folder: "oci",
        package: "pageferry-oci",
        uses: &["pageferry-cgroup", "pageferry-sys"],
        tests_use: &[],
    },
    Crate {
        folder: "containerd",
        package: "pageferry-containerd",
        uses: &["pageferry-oci"],
        tests_use: &[],
    },
    Crate {
        folder: "cni",
        package: "pageferry-ipam",
        uses: &[],
        tests_use: &[],
    },
    Crate {
        folder: "k8s-shim",
        package: "pageferry-k8s",
        uses: &["pageferry-api", "pageferry-ipam"],
        tests_use: &[],
    },
    Crate {
        folder: "daemon",
        package: "pageferry",
        uses: &[
            "criu-glue",
            "pageferry-api",
            "pageferry-cgroup",
            "pageferry-containerd",
            "pageferry-files",
            "pageferry-inject",
            "pageferry-ipam",
            "pageferry-oci",
            "pageferry-pager",
            "pageferry-pages",
            "pageferry-proto",
            "pageferry-sys",
        ],
        tests_use: &["pageferry-trial"],
    },
    Crate {
        folder: "bench",
        package: "pageferry-bench",
        uses: &[],
        tests_use: &[],
    },
];

/// A dependency that is there so that cargo builds it, and never named.
const NEVER_NAMED: (&str, &str) = ("criu-glue", "criu-view");

/// What a process that must not die has no use for: networks, certificates, servers.
const NOT_IN_THE_PAGER: &[&str] = &[
    "h2",
    "hyper",
    "quinn",
    "quinn-proto",
    "rcgen",
    "ring",
    "rtnetlink",
    "rustls",
    "tonic",
    "tower",
];

pub fn library(package: &str) -> String {
    package.replace('-', "_")
}

fn read_toml(path: &Path) -> Table {
    let text = fs::read_to_string(path).expect("a file of cargo's");
    text.parse().expect("TOML")
}

/// Names of a table of dependencies that are crates of ours.
fn ours(manifest: &Table, kind: &str, own: &str) -> BTreeSet<String> {
    let names = manifest.get(kind).and_then(Value::as_table);
    let names = names.into_iter().flat_map(Table::keys);
    let ours = |name: &&String| {
        let known = CRATES.iter().any(|each| each.package == *name);
        known && *name != own
    };
    names.filter(ours).cloned().collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

#[test]
fn crates_use_exactly_the_crates_they_may() {
    let root = workspace();
    let mut wrong = Vec::new();
    let manifest = read_toml(&root.join("Cargo.toml"));
    let members = manifest["workspace"]["members"].as_array();
    let members = members.expect("members").iter().filter_map(Value::as_str);
    let folders: Vec<&str> = CRATES.iter().map(|each| each.folder).collect();
    assert_eq!(
        members.map(str::to_owned).collect::<BTreeSet<_>>(),
        set(&folders)
    );
    for each in CRATES {
        let folder = root.join(each.folder);
        let manifest = read_toml(&folder.join("Cargo.toml"));
        let inner: Vec<PathBuf> = CRATES
            .iter()
            .map(|other| root.join(other.folder))
            .filter(|other| *other != folder)
            .collect();
        let (mut code, mut tests) = (String::new(), String::new());
        for path in sources(&folder) {
            // A crate within the folder of another is its own.
            if !inner
                .iter()
                .any(|other| other.starts_with(&folder) && path.starts_with(other))
            {
                let (more, of_tests) = code_and_tests(&path);
                code.push_str(&more);
                tests.push_str(&of_tests);
            }
        }
        for (kind, allowed, text) in [
            ("dependencies", each.uses, &code),
            ("dev-dependencies", each.tests_use, &tests),
            ("build-dependencies", &[][..], &code),
        ] {
            let (found, allowed) = (ours(&manifest, kind, each.package), set(allowed));
            for used in found.difference(&allowed) {
                wrong.push(format!("{}: {kind} may not have {used}", each.package));
            }
            for used in &allowed {
                let named = text.contains(&format!("{}::", library(used)))
                    || text.contains(&format!("use {} as", library(used)))
                    || (each.package, used.as_str()) == NEVER_NAMED;
                if !named || !found.contains(used) {
                    let package = each.package;
                    wrong.push(format!(
                        "{package} does not use {used}: take it from the table"
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_pager_links_no_network() {
    let lock = read_toml(&workspace().join("Cargo.lock"));
    let packages = lock["package"].as_array().expect("packages");
    let mut depends: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for package in packages {
        let name = package["name"].as_str().expect("a name");
        let on = package.get("dependencies").and_then(Value::as_array);
        let on = on.into_iter().flatten().filter_map(Value::as_str);
        // A name that several versions have is followed by one.
        let on = on.filter_map(|name| name.split(' ').next());
        // The lab is of tests, and the lock file does not tell whose dependencies those are.
        let of_tests = CRATES.iter().find(|each| each.package == name);
        let of_tests = of_tests.map_or(&[][..], |each| each.tests_use);
        let on = on.filter(|name| !of_tests.contains(name));
        depends.entry(name).or_default().extend(on);
    }
    let mut reached = BTreeSet::new();
    let mut next = vec!["pageferry-pager"];
    while let Some(name) = next.pop() {
        if reached.insert(name) {
            next.extend(&depends[name]);
        }
    }
    assert!(reached.contains("pageferry-sys"), "{reached:?}");
    let wrong: Vec<&&str> = NOT_IN_THE_PAGER
        .iter()
        .filter(|name| reached.contains(**name))
        .collect();
    assert!(wrong.is_empty(), "the pager depends on {wrong:?}");
    let unknown = NOT_IN_THE_PAGER
        .iter()
        .find(|name| !depends.contains_key(**name));
    assert_eq!(
        unknown, None,
        "nothing depends on it: take it from the table"
    );
}
