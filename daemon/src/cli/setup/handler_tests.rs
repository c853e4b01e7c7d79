use super::*;

const DUMP: &str = r#"
version = 3
imports = []
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dir = ''
bin_dirs = ['/opt/cni/bin', '/usr/lib/cni']
conf_dir = '/etc/cni/net.d'
[plugins.'io.containerd.cri.v1.runtime'.containerd]
default_runtime_name = 'runc'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
runtime_path = ''
pod_annotations = ['example.com/*']
base_runtime_spec = '/etc/containerd/base.json'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = ''
SystemdCgroup = true
"#;

const MAIN: &str = "/etc/containerd/config.toml";

fn dump() -> Dump {
    Dump::parse(DUMP).unwrap()
}

fn plan(main: Option<&str>) -> Result<Option<Written>, Unfit> {
    dump().plan(Path::new(MAIN), main)
}

/// What containerd would print with a drop-in of version 3.
fn with(written: &Written) -> Dump {
    let mut table: Table = DUMP.parse().unwrap();
    let mut own: Table = written.drop_in.1.parse().unwrap();
    let (_, plugin) = PLUGINS[1];
    let path = ["plugins", plugin, "containerd", "runtimes"];
    let mut at = Value::Table(std::mem::take(&mut own));
    for name in path {
        at = at.get(name).unwrap().clone();
    }
    let mut all = table.get_mut("plugins");
    for name in &path[1..] {
        all = all.and_then(|value| value.get_mut(*name));
    }
    let runtimes = all.and_then(Value::as_table_mut).unwrap();
    runtimes.extend(at.as_table().unwrap().clone());
    Dump(table)
}

#[test]
fn it_is_the_default_handler_with_another_program() {
    let written = plan(Some("version = 3\n")).unwrap().unwrap();
    let after = with(&written);
    let handler = after.handler(HANDLER).unwrap();
    let mut expected = dump().handler("runc").unwrap().clone();
    let options = expected["options"].as_table_mut().unwrap();
    options.insert("BinaryName".to_owned(), INSTALLED.into());
    let annotations = ["example.com/*", ANNOTATIONS].map(Value::from).to_vec();
    expected.insert("pod_annotations".to_owned(), annotations.into());
    let annotations = vec![Value::from(ANNOTATIONS)];
    expected.insert("container_annotations".to_owned(), annotations.into());
    assert_eq!(*handler, expected);
    assert!(after.has_handler() && !dump().has_handler());
    dump().check_after(&after).unwrap();
    // It is there, then.
    assert_eq!(after.plan(Path::new(MAIN), Some("version = 3")), Ok(None));
}

#[test]
fn it_is_written_by_the_schema_of_the_main_file() {
    for (version, plugin) in PLUGINS {
        let written = plan(Some(&format!("version = {version}\n")))
            .unwrap()
            .unwrap();
        let own: Table = written.drop_in.1.parse().unwrap();
        assert_eq!(own["version"].as_integer(), Some(version));
        assert!(own["plugins"].get(plugin).is_some(), "{own}");
    }
    for (text, version) in [("", 1), ("version = 1", 1), ("version = 7", 7)] {
        let path = MAIN.into();
        assert_eq!(plan(Some(text)), Err(Unfit::Schema { path, version }));
    }
    assert!(matches!(Dump::parse("version = 2"), Err(Unfit::Old(2))));
    assert!(matches!(plan(Some("version = ")), Err(Unfit::Text { .. })));
}

#[test]
fn it_goes_to_where_the_main_file_imports_from() {
    let place = |main| plan(main).unwrap().unwrap();
    let beside = place(Some("imports = ['extra/*.toml']\nversion = 3\n"));
    assert_eq!(
        beside.drop_in.0,
        Path::new("/etc/containerd/extra/pageferry.toml")
    );
    assert_eq!(beside.main, None);
    let main = "# mine\nversion = 3\nroot = '/var/lib/containerd'\n[grpc]\ngid = 5\n";
    let added = place(Some(main));
    assert_eq!(
        added.drop_in.0,
        Path::new("/etc/containerd/conf.d/pageferry.toml")
    );
    let text = added.main.unwrap();
    let table: Table = text.parse().unwrap();
    let imports = table["imports"].as_array().unwrap();
    assert_eq!(imports[..], ["/etc/containerd/conf.d/*.toml".into()]);
    assert_eq!(table["grpc"]["gid"].as_integer(), Some(5));
    // Without what it got it is what it was, whatever else somebody has changed.
    assert_eq!(without_imports(&text), main);
    let changed = without_imports(&text.replace("gid = 5", "gid = 6"));
    assert_eq!(changed, main.replace("gid = 5", "gid = 6"));
    // An empty one is replaced.
    let text = place(Some("imports = []\nversion = 2\n")).main.unwrap();
    assert_eq!(
        text.parse::<Table>().unwrap()["imports"]
            .as_array()
            .unwrap()
            .len(),
        1
    );
    // There need be no main file.
    let made = place(None).main.unwrap();
    assert!(
        made.starts_with("version = 3\n") && made.contains("imports"),
        "{made}"
    );
    let imports = vec!["/etc/containerd/one.toml".to_owned()];
    let refused = plan(Some("version = 3\nimports = ['/etc/containerd/one.toml']"));
    let path = MAIN.into();
    assert_eq!(refused, Err(Unfit::Imports { path, imports }));
}

#[test]
fn what_the_program_does_not_stand_for_is_refused() {
    for (old, new, what) in [
        ("io.containerd.runc.v2'", "io.containerd.kata.v2'", "kata"),
        (
            "BinaryName = ''",
            "BinaryName = '/usr/bin/nvidia-container-runtime'",
            "nvidia",
        ),
        ("runtime_path = ''", "runtime_path = '/opt/shim'", "shim"),
        (
            "default_runtime_name = 'runc'",
            "default_runtime_name = 'crun'",
            "not there",
        ),
    ] {
        let dump = Dump::parse(&DUMP.replace(old, new)).unwrap();
        let refused = dump.plan(Path::new(MAIN), Some("version = 3")).unwrap_err();
        assert!(refused.to_string().contains(what), "{refused}");
    }
    let taken = format!(
        "{DUMP}[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.pageferry]\n\
         runtime_type = 'io.containerd.runc.v2'\n"
    );
    let taken = Dump::parse(&taken).unwrap();
    let refused = taken
        .plan(Path::new(MAIN), Some("version = 3"))
        .unwrap_err();
    assert!(matches!(refused, Unfit::Taken(_)), "{refused}");
}

#[test]
fn a_configuration_that_is_read_otherwise_is_found() {
    let written = plan(Some("version = 3\n")).unwrap().unwrap();
    let lost = dump().check_after(&dump()).unwrap_err();
    assert!(lost.to_string().contains("is not there"), "{lost}");
    let mut after = with(&written);
    let (_, plugin) = PLUGINS[1];
    let cni = after.0["plugins"][plugin].get_mut("cni").unwrap();
    cni.as_table_mut().unwrap().remove("conf_dir");
    let lost = dump().check_after(&after).unwrap_err();
    assert!(lost.to_string().contains("cni.conf_dir"), "{lost}");
}

#[test]
fn folders_of_networks_are_where_containerd_looks() {
    let (configurations, programs) = dump().networks();
    assert_eq!(configurations, Path::new("/etc/cni/net.d"));
    assert_eq!(
        programs,
        ["/opt/cni/bin", "/usr/lib/cni"].map(PathBuf::from)
    );
    let bare = Dump::parse("version = 3").unwrap().networks();
    assert_eq!(bare.1, [PathBuf::from("/opt/cni/bin")]);
}
