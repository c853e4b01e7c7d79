//! The program as network plugins start it, above a delegate with a range of four addresses.

use std::fs;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use pageferry_ipam::{Away, Expected, Folders, Left, release};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A node with nothing but folders.
struct Node {
    folder: TempDir,
}

impl Node {
    fn new() -> Self {
        let node = Self {
            folder: tempfile::tempdir().expect("a folder"),
        };
        let program = node.path().join("range-of-four");
        fs::write(&program, include_str!("delegate.sh")).expect("the delegate");
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&program, executable).expect("the delegate");
        node
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn folders(&self) -> Folders {
        Folders::new(self.path().join("run"), self.path().join("state"))
    }

    fn config(&self) -> Value {
        json!({
            "cniVersion": "1.1.0", "name": "pods", "type": "bridge",
            "ipam": {
                "type": "pageferry-ipam",
                "runDir": self.path().join("run"), "stateDir": self.path().join("state"),
                "delegate": {
                    "type": "range-of-four", "ranges": [[{"subnet": "10.244.11.0/24"}]],
                    "routes": [{"dst": "0.0.0.0/0"}],
                },
            },
        })
    }

    /// The network of an attachment, which is there from its ADD to its DEL.
    fn network(&self, container: &str) -> std::path::PathBuf {
        self.path().join(format!("net-{container}"))
    }

    fn ask(&self, verb: &str, (container, pod): (&str, &str), config: &Value) -> Output {
        self.ask_of(verb, (container, pod, &format!("uid-{pod}")), config)
    }

    /// The same of a pod with a UID of its own.
    fn ask_of(&self, verb: &str, one: (&str, &str, &str), config: &Value) -> Output {
        let (container, pod, uid) = one;
        let pod = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod};K8S_POD_UID={uid}"
        );
        let mut child = Command::new(env!("CARGO_BIN_EXE_pageferry-ipam"))
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", container)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_NETNS", self.network(container))
            .env("CNI_ARGS", pod)
            .env("CNI_PATH", self.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program");
        let mut stdin = child.stdin.take().expect("a pipe");
        stdin
            .write_all(config.to_string().as_bytes())
            .expect("it reads");
        drop(stdin);
        child.wait_with_output().expect("it ends")
    }

    /// The result of an ADD.
    fn add(&self, container: &str, pod: &str) -> Value {
        fs::write(self.network(container), "").expect("a network");
        let output = self.ask("ADD", (container, pod), &self.config());
        assert!(output.status.success(), "{output:?}");
        serde_json::from_slice(&output.stdout).expect("a result")
    }

    /// The DEL of what an ADD returned.
    fn delete(&self, container: &str, pod: &str, result: &Value) {
        let mut config = self.config();
        config["prevResult"] = result.clone();
        let output = self.ask("DEL", (container, pod), &config);
        assert!(output.status.success(), "{output:?}");
        let _ = fs::remove_file(self.network(container));
    }

    /// What the delegate has given and not got back.
    fn taken(&self) -> Vec<String> {
        let range = fs::read_dir(self.path().join("range")).expect("a range");
        let names = range.map(|entry| entry.expect("an entry").file_name().into_string());
        let mut names: Vec<String> = names.map(|name| name.expect("a name")).collect();
        names.retain(|name| name != "last");
        names.sort();
        names
    }

    fn expect(&self, pod: &str, address: Ipv4Addr) {
        self.expect_one((pod, Some(&format!("uid-{pod}"))), address);
    }

    fn expect_one(&self, (pod, uid): (&str, Option<&str>), address: Ipv4Addr) {
        let expected = Expected {
            address,
            gateway: None,
            uid: uid.map(str::to_owned),
            migration: "0123".to_owned(),
        };
        let folders = self.folders();
        folders.expect("default", pod, &expected).expect("written");
    }

    fn away(&self, address: Ipv4Addr) {
        let migration = "0123".to_owned();
        let folders = self.folders();
        folders.away(address, &Away { migration }).expect("written");
    }
}

fn address(result: &Value) -> Ipv4Addr {
    let text = result["ips"][0]["address"].as_str().expect("an address");
    let address = text
        .strip_suffix("/24")
        .expect("a network of the range's size");
    address.parse().expect("an address")
}

fn message(output: &Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    let said: Value = serde_json::from_slice(&output.stdout).expect("an object");
    said["msg"].as_str().expect("a message").to_owned()
}

/// So many pods wrap a range of four.
const MANY: usize = 12;

#[test]
fn an_ordinary_pod_is_the_delegates_business() {
    let node = Node::new();
    let result = node.add("one", "web");
    assert_eq!(address(&result), Ipv4Addr::new(10, 244, 11, 2));
    assert_eq!(node.taken(), ["10.244.11.2"]);
    let check = node.ask("CHECK", ("one", "web"), &node.config());
    assert_eq!(message(&check), "not one of mine");
    node.delete("one", "web", &result);
    assert_eq!(node.taken(), [""; 0]);
    let log = fs::read_to_string(node.path().join("log")).expect("a log");
    assert_eq!(log, "ADD one eth0\nCHECK one eth0\nDEL one eth0\n");
}

#[test]
fn an_address_that_is_away_is_given_to_nobody_while_the_range_wraps() {
    let node = Node::new();
    let result = node.add("one", "web");
    let moved = address(&result);
    node.away(moved);
    node.delete("one", "web", &result);
    assert_eq!(node.taken(), [moved.to_string()]);
    // The runtime may say it twice.
    node.delete("one", "web", &result);
    let mut seen = Vec::new();
    for number in 0..MANY {
        let (container, pod) = (format!("c{number}"), format!("p{number}"));
        let result = node.add(&container, &pod);
        seen.push(address(&result));
        node.delete(&container, &pod, &result);
    }
    assert!(!seen.contains(&moved), "{seen:?}");
    seen.sort();
    seen.dedup();
    assert_eq!(seen.len(), 3, "the range has wrapped: {seen:?}");

    assert!(release(&node.folders(), moved).expect("released"));
    assert!(!release(&node.folders(), moved).expect("released before"));
    assert_eq!(node.taken(), [""; 0]);
    let again = (0..4).map(|number| address(&node.add(&format!("d{number}"), "p")));
    assert!(again.collect::<Vec<_>>().contains(&moved));
}

#[test]
fn a_delegate_that_has_lost_what_it_gave_is_asked_again() {
    let node = Node::new();
    let result = node.add("one", "web");
    node.away(address(&result));
    fs::remove_dir_all(node.path().join("range")).expect("its files");
    let second = node.add("two", "other");
    assert_ne!(address(&second), address(&result));
    assert_eq!(node.taken(), [address(&second).to_string()]);
    for last in 2..6 {
        node.away(Ipv4Addr::new(10, 244, 11, last));
    }
    let third = node.ask("ADD", ("three", "third"), &node.config());
    assert!(message(&third).contains("pageferry-ipam release"));
    assert_eq!(node.taken(), [address(&second).to_string()]);
}

#[test]
fn a_pod_that_comes_keeps_its_address_and_takes_none_of_the_range() {
    let node = Node::new();
    let kept = Ipv4Addr::new(10, 244, 12, 9);
    node.expect("web-m1", kept);
    let result = node.add("one", "web-m1");
    assert_eq!(address(&result), kept);
    assert_eq!(result["ips"][0]["gateway"], "10.244.11.1");
    let routes = result["routes"].as_array().expect("routes");
    assert_eq!(routes.last().expect("one")["dst"], "0.0.0.0/0");
    assert!(!node.path().join("range").exists());

    let mut config = node.config();
    config["prevResult"] = result.clone();
    let check = node.ask("CHECK", ("one", "web-m1"), &config);
    assert!(check.status.success(), "{check:?}");
    config["prevResult"]["ips"][0]["address"] = json!("10.244.12.10/24");
    let check = node.ask("CHECK", ("one", "web-m1"), &config);
    assert!(message(&check).contains("10.244.12.9"));

    // Another pod cannot have it as well, and the same one can be tried again.
    node.expect("other", kept);
    fs::write(node.network("two"), "").expect("a network");
    let other = node.ask("ADD", ("two", "other"), &node.config());
    assert!(message(&other).contains("default/web-m1"));
    assert_eq!(address(&node.add("three", "web-m1")), kept);

    node.delete("one", "web-m1", &result);
    node.delete("three", "web-m1", &result);
    assert_eq!(node.taken(), [""; 0]);
    assert!(
        node.folders()
            .unexpect("default", "web-m1")
            .expect("removed")
    );
    assert_eq!(address(&node.add("four", "web-m1")).octets()[2], 11);
}

#[test]
fn only_the_pod_that_is_expected_gets_the_address_and_nobody_of_its_name_another() {
    let node = Node::new();
    let kept = Ipv4Addr::new(10, 244, 12, 9);
    fs::write(node.network("one"), "").expect("a network");
    let add = |uid: &str| node.ask_of("ADD", ("one", "web-m1", uid), &node.config());
    let code = |output: &Output| -> Value {
        let said: Value = serde_json::from_slice(&output.stdout).expect("an object");
        said["code"].clone()
    };
    node.expect_one(("web-m1", None), kept);
    let early = add("mine");
    assert!(message(&early).contains("not known yet"), "{early:?}");
    assert_eq!(code(&early), 11);
    node.expect_one(("web-m1", Some("mine")), kept);
    let foreign = add("foreign");
    assert!(
        message(&foreign).contains("has the UID mine"),
        "{foreign:?}"
    );
    assert_eq!(code(&foreign), 11);
    assert_eq!(code(&add("")), 7);
    assert!(!node.path().join("range").exists());
    let mine = add("mine");
    assert!(mine.status.success(), "{mine:?}");
    let result = serde_json::from_slice(&mine.stdout).expect("a result");
    assert_eq!(address(&result), kept);
    // Its name alone does not make another one the one that has it.
    node.expect_one(("web-m1", Some("later")), kept);
    assert!(message(&add("later")).contains("is still that of the pod"));
}

#[test]
fn an_address_that_comes_home_is_free_when_its_last_pod_ends() {
    let node = Node::new();
    let first = node.add("one", "web");
    let moved = address(&first);
    node.away(moved);
    node.delete("one", "web", &first);
    node.expect("web-m2", moved);
    let second = node.add("two", "web-m2");
    assert_eq!(address(&second), moved);
    assert_eq!(second["routes"].as_array().expect("routes").len(), 1);
    assert!(node.folders().returned(moved).expect("removed"));
    // It is at home, and in use.
    assert_eq!(node.taken(), [moved.to_string()]);
    let other = node.add("three", "other");
    assert_ne!(address(&other), moved);
    node.delete("three", "other", &other);
    node.delete("two", "web-m2", &second);
    assert_eq!(node.taken(), [""; 0]);
}

#[test]
fn an_address_of_the_range_that_a_pod_here_may_have_comes_with_nobody() {
    let node = Node::new();
    let first = node.add("one", "web");
    let taken = address(&first);
    node.expect("web-m2", taken);
    let add = || {
        fs::write(node.network("two"), "").expect("a network");
        node.ask("ADD", ("two", "web-m2"), &node.config())
    };
    assert!(message(&add()).contains("not away"));
    // Nor one that the range may give at any time.
    node.delete("one", "web", &first);
    assert!(message(&add()).contains("not away"));
    node.away(taken);
    assert!(add().status.success());
}

#[test]
fn a_pod_that_has_left_is_not_started_again_until_it_stays() {
    let node = Node::new();
    let folders = node.folders();
    let migration = Some("0123".to_owned());
    folders
        .leave("uid-web", &Left { migration })
        .expect("written");
    fs::write(node.network("one"), "").expect("a network");
    let add = || node.ask("ADD", ("one", "web"), &node.config());
    let refused = message(&add());
    assert!(
        refused.contains("default/web of UID uid-web has moved"),
        "{refused}"
    );
    assert!(refused.contains("0123"), "{refused}");
    assert!(!node.path().join("range").exists());
    // Another one of its name is another pod.
    let other = node.ask_of("ADD", ("two", "web", "another"), &node.config());
    assert!(other.status.success(), "{other:?}");
    assert!(folders.stay("uid-web").expect("removed"));
    assert!(!folders.stay("uid-web").expect("removed before"));
    assert!(add().status.success());
    assert!(folders.leave("../web", &Left::default()).is_err());
}

#[test]
fn an_address_that_is_away_stays_reserved_though_nobody_says_it_at_the_end() {
    let node = Node::new();
    let moved = address(&node.add("one", "web"));
    node.away(moved);
    // The runtime has lost what it knew.
    let output = node.ask("DEL", ("one", "web"), &node.config());
    assert!(output.status.success(), "{output:?}");
    assert_eq!(node.taken(), [moved.to_string()]);
    // Or never says that it has ended.
    let second = address(&node.add("two", "other"));
    node.away(second);
    let mut config = node.config();
    config["cni.dev/valid-attachments"] = json!([]);
    let output = node.ask("GC", ("", ""), &config);
    assert!(output.status.success(), "{output:?}");
    let told = fs::read(node.path().join("collected")).expect("what it was told");
    let told: Value = serde_json::from_slice(&told).expect("an object");
    let valid = told["cni.dev/valid-attachments"].as_array().expect("some");
    assert_eq!(valid.len(), 2, "{told}");
    let given = fs::read_dir(node.path().join("state/given")).expect("a folder");
    assert_eq!(given.count(), 0);
    assert!(release(&node.folders(), second).expect("released"));
    assert_eq!(node.taken(), [moved.to_string()]);
}

#[test]
fn an_address_that_leaves_again_stays_reserved() {
    let node = Node::new();
    let first = node.add("one", "web");
    let moved = address(&first);
    node.away(moved);
    node.expect("web-m2", moved);
    // It is back before the first sandbox is gone.
    let second = node.add("two", "web-m2");
    node.folders().returned(moved).expect("removed");
    node.delete("one", "web", &first);
    assert_eq!(node.taken(), [moved.to_string()]);
    node.away(moved);
    node.delete("two", "web-m2", &second);
    assert_eq!(node.taken(), [moved.to_string()]);
    // Whoever says that it is over need not wait for the delegate.
    node.folders().returned(moved).expect("removed");
    let other = node.add("three", "other");
    assert_eq!(node.taken(), [address(&other).to_string()]);
}

#[test]
fn collecting_garbage_spares_what_is_away_and_what_the_runtime_has() {
    let node = Node::new();
    let first = node.add("one", "web");
    node.away(address(&first));
    node.delete("one", "web", &first);
    node.expect("in", Ipv4Addr::new(10, 244, 12, 9));
    node.expect("gone", Ipv4Addr::new(10, 244, 12, 10));
    node.add("two", "in");
    node.add("three", "gone");
    let valid = json!({"containerID": "two", "ifname": "eth0"});
    let mut config = node.config();
    config["cni.dev/valid-attachments"] = json!([valid]);
    let output = node.ask("GC", ("", ""), &config);
    assert!(output.status.success(), "{output:?}");
    let told = fs::read(node.path().join("collected")).expect("what it was told");
    let told: Value = serde_json::from_slice(&told).expect("an object");
    let reserved = json!({"containerID": "one", "ifname": "eth0"});
    assert_eq!(told["cni.dev/valid-attachments"], json!([valid, reserved]));
    assert_eq!(told["ipam"]["type"], "range-of-four");
    let kept = fs::read_dir(node.path().join("state/kept")).expect("a folder");
    let kept: Vec<_> = kept.map(|entry| entry.expect("one").file_name()).collect();
    assert_eq!(kept, ["two:eth0"]);
    config
        .as_object_mut()
        .expect("an object")
        .remove("cni.dev/valid-attachments");
    assert!(message(&node.ask("GC", ("", ""), &config)).contains("valid-attachments"));
}

#[test]
fn what_it_cannot_do_it_says_by_the_codes_of_the_specification() {
    let node = Node::new();
    let code = |output: &Output| -> u64 {
        assert!(!output.status.success(), "{output:?}");
        let said: Value = serde_json::from_slice(&output.stdout).expect("an object");
        said["code"].as_u64().expect("a code")
    };
    let version = node.ask("VERSION", ("", ""), &json!({"cniVersion": "1.1.0"}));
    let said: Value = serde_json::from_slice(&version.stdout).expect("an object");
    assert_eq!(said["supportedVersions"], json!(["1.0.0", "1.1.0"]));
    let status = node.ask("STATUS", ("", ""), &node.config());
    assert!(status.status.success(), "{status:?}");

    let mut old = node.config();
    old["cniVersion"] = json!("0.4.0");
    assert_eq!(code(&node.ask("ADD", ("one", "web"), &old)), 1);
    old["cniVersion"] = json!("1.0.0");
    assert_eq!(code(&node.ask("GC", ("", ""), &old)), 1);
    assert_eq!(code(&node.ask("MOVE", ("one", "web"), &node.config())), 4);
    assert_eq!(code(&node.ask("ADD", ("../one", "web"), &node.config())), 4);
    assert_eq!(code(&node.ask("ADD", ("one", "web"), &json!("it"))), 1);
    let mut without = node.config();
    without["ipam"]["delegate"] = json!({});
    assert_eq!(code(&node.ask("ADD", ("one", "web"), &without)), 7);
    without["ipam"]["delegate"] = json!({"type": "nobody"});
    assert_eq!(code(&node.ask("ADD", ("one", "web"), &without)), 7);
    // A file that is not understood is no reason to give the pod another address.
    fs::create_dir_all(node.path().join("run/expected")).expect("a folder");
    fs::write(node.path().join("run/expected/default_web"), "it").expect("a file");
    assert_eq!(code(&node.ask("ADD", ("one", "web"), &node.config())), 6);
}
