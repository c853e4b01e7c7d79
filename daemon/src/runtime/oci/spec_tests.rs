use super::*;
use serde_json::json;

fn around<'a>(engine: Option<&'a Engine>, named: &'a [PathBuf]) -> Around<'a> {
    Around {
        bundle: Path::new("/srv/web"),
        engine,
        named,
    }
}

fn spec() -> Value {
    json!({
        "process": {"terminal": false},
        "root": {"path": "rootfs", "readonly": true},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "options": ["nosuid", "mode=755"]},
        ],
        "hooks": {"prestart": []},
        "linux": {
            "cgroupsPath": "/web",
            "namespaces": OWN.map(|kind| json!({"type": kind})),
        },
    })
}

fn refused(change: impl FnOnce(&mut Value)) -> String {
    let mut spec = spec();
    change(&mut spec);
    let parsed = Spec::parse(spec.to_string().as_bytes()).unwrap();
    let checked = parsed.check(&around(None, &[]));
    checked.expect_err("refused").to_string()
}

#[test]
fn what_is_not_moved_yet_is_refused_by_its_name() {
    Spec::parse(spec().to_string().as_bytes())
        .unwrap()
        .check(&around(None, &[]))
        .unwrap();
    let terminal = refused(|spec| spec["process"]["terminal"] = true.into());
    assert!(terminal.starts_with("stdio-unfit") && terminal.contains("terminal"));
    for mount in [
        json!({"destination": "/data", "type": "none", "options": ["rbind", "rw"]}),
        json!({"destination": "/data", "type": "tmpfs", "options": ["bind"]}),
        json!({"destination": "/data", "type": "nfs"}),
    ] {
        let volume = refused(|spec| spec["mounts"].as_array_mut().unwrap().push(mount));
        assert!(volume.contains("/data mounted"), "{volume}");
    }
    let hooks = refused(|spec| spec["hooks"]["poststop"] = json!([{"path": "/bin/true"}]));
    assert!(hooks.contains("poststop hooks"), "{hooks}");
    let profile = refused(|spec| spec["process"]["apparmorProfile"] = "docker".into());
    assert!(profile.contains("AppArmor"), "{profile}");
    let cgroup = refused(|spec| spec["linux"]["cgroupsPath"] = "web".into());
    assert!(cgroup.contains("linux.cgroupsPath"), "{cgroup}");
    let managed = refused(|spec| spec["annotations"] = json!({MANAGER: "libpod"}));
    assert!(managed.contains("one of libpod"), "{managed}");
    let shared = refused(|spec| spec["linux"]["rootfsPropagation"] = "rshared".into());
    assert!(shared.contains("rootfsPropagation"), "{shared}");
}

#[test]
fn what_is_bound_is_below_a_path_that_is_named() {
    let check = |source: &str, named: &str| {
        let mut spec = spec();
        let data = json!({"destination": "/data", "type": "none", "source": source,
            "options": ["rbind", "rw"]});
        spec["mounts"].as_array_mut().unwrap().push(data);
        let parsed = Spec::parse(spec.to_string().as_bytes()).unwrap();
        let named = [PathBuf::from(named)];
        let checked = parsed.check(&around(None, &named));
        checked.map_err(|refused| refused.to_string())
    };
    check("/srv/data", "/srv/data").unwrap();
    check("/srv/data/sub", "/srv/data").unwrap();
    check("data", "/srv/web/data").unwrap();
    let other = check("/srv/data2", "/srv/data").unwrap_err();
    assert!(
        other.contains("--copy") && other.contains("/srv/data2"),
        "{other}"
    );
    let up = check("/srv/data/../x", "/srv/data").unwrap_err();
    assert!(up.contains("no plain path"), "{up}");
    let within = refused(|spec| {
        let all = spec["mounts"].as_array_mut().unwrap();
        let bind = ["bind"];
        all.push(json!({"destination": "/dev/x", "source": "/s", "options": bind}));
    });
    assert!(within.contains("/dev/x mounted"), "{within}");
}

#[test]
fn nothing_is_mounted_within_a_volume() {
    let mut spec = spec();
    let all = spec["mounts"].as_array_mut().unwrap();
    all.push(json!({"destination": "/data", "source": "/s", "options": ["bind"]}));
    all.push(json!({"destination": "/data/tmp", "type": "tmpfs"}));
    let parsed = Spec::parse(spec.to_string().as_bytes()).unwrap();
    let named = [PathBuf::from("/s")];
    let within = parsed.check(&around(None, &named)).unwrap_err();
    assert!(
        within.text().contains("/data/tmp mounted within /data"),
        "{within}"
    );
}

#[test]
fn a_root_file_system_is_writable_unless_it_says_otherwise() {
    let is_writable = |root: Value| {
        let mut spec = spec();
        spec["root"] = root;
        let parsed = Spec::parse(spec.to_string().as_bytes()).unwrap();
        parsed.is_writable()
    };
    assert!(!is_writable(json!({"path": "rootfs", "readonly": true})));
    assert!(is_writable(json!({"path": "rootfs", "readonly": false})));
    assert!(is_writable(json!({"path": "rootfs"})));
}

#[test]
fn namespaces_are_those_that_can_be_made_again() {
    let add = |kind: &'static str| {
        refused(move |spec| {
            let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
            all.push(json!({"type": kind}));
        })
    };
    for kind in ["user", "cgroup", "time"] {
        let text = add(kind);
        assert!(
            text.contains(&format!("a {kind} namespace of its own")),
            "{text}"
        );
    }
    let joined = refused(|spec| spec["linux"]["namespaces"][2]["path"] = "/run/netns/x".into());
    assert!(
        joined.contains("network namespace /run/netns/x"),
        "{joined}"
    );
    let none = refused(|spec| {
        drop(
            spec["linux"]["namespaces"]
                .as_array_mut()
                .unwrap()
                .remove(3),
        );
    });
    assert!(none.contains("no pid namespace"), "{none}");
}

#[test]
fn what_its_engine_has_made_is_no_volume() {
    let engine = Engine {
        manager: "libpod",
        folders: vec!["/store/web".into()],
        ..Engine::default()
    };
    let check = |source: &str, manager: &str| {
        let mut spec = spec();
        spec["annotations"] = json!({MANAGER: manager});
        let hosts = json!({"destination": "/etc/hosts", "type": "bind", "source": source});
        spec["mounts"].as_array_mut().unwrap().push(hosts);
        let parsed = Spec::parse(spec.to_string().as_bytes()).unwrap();
        parsed
            .check(&around(Some(&engine), &[]))
            .map_err(|refused| refused.to_string())
    };
    check("/store/web/hosts", "libpod").unwrap();
    let volume = check("/store/webb/hosts", "libpod").unwrap_err();
    assert!(volume.contains("/etc/hosts mounted"), "{volume}");
    let other = check("/store/web/hosts", "other").unwrap_err();
    assert!(other.contains("one of other"), "{other}");
}
