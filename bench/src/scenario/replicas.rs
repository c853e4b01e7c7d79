//! Pods of a Deployment: one moves, and its owner neither loses one nor makes a third; and what
//! cannot move is refused, with the pod as it was.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::pods::{POD_TIME_MAX, pod, successor};
use crate::cluster::kubectl::Kubectl;
use crate::cluster::wait::{Hopeless, until};
use crate::cluster::worker;
use crate::lab::Lab;
use crate::workload::redis;

/// Moves a pod of a Deployment of two.
pub fn move_one(lab: &Lab, kubectl: &Kubectl) -> Result<()> {
    kubectl.apply(&deployment().to_string())?;
    let pods = until("two pods are ready", POD_TIME_MAX, || {
        let pods = list(kubectl)?;
        ensure!(
            pods.iter().filter(|pod| is_ready(pod)).count() == 2,
            "they are not"
        );
        Ok(pods)
    })?;
    let moving = &pods[0];
    let name = text(moving, "/metadata/name")?;
    let here = text(moving, "/spec/nodeName")?;
    let to = lab
        .nodes
        .iter()
        .map(worker::name)
        .find(|node| *node != here);
    let to = to.context("there is another node")?;
    refuse(kubectl, moving, &to)?;
    let mut wanted: BTreeSet<String> = names(&pods)?;
    let new = successor(&name);
    annotate(kubectl, &name, &to)?;
    let mut seen = BTreeSet::new();
    until("a pod of the Deployment has moved", MOVE_TIME_MAX, || {
        let pods = list(kubectl)?;
        seen.extend(names(&pods)?);
        let ready = pods.iter().filter(|pod| is_ready(pod)).count();
        if ready == 0 {
            return Err(Hopeless("no pod is ready".to_owned()).into());
        }
        match result(kubectl, moving)?.as_deref() {
            Some("Succeeded") => Ok(()),
            Some(other) => Err(Hopeless(format!("it ended as {other}")).into()),
            None => bail!("it goes on"),
        }
    })?;
    wanted.insert(new.clone());
    ensure!(
        seen == wanted,
        "there were the pods {seen:?}, and not {wanted:?}"
    );
    wanted.remove(&name);
    until("the Deployment has two pods again", POD_TIME_MAX, || {
        let pods = list(kubectl)?;
        let found = names(&pods)?;
        ensure!(found == wanted, "they are {found:?}, and not {wanted:?}");
        ensure!(pods.iter().all(is_ready), "they are not ready");
        Ok(())
    })?;
    let moved = kubectl.json(&["get", "pod", &new])?;
    let owner = text(&moved, "/metadata/ownerReferences/0/uid")?;
    let before = text(moving, "/metadata/ownerReferences/0/uid")?;
    ensure!(owner == before, "{new} belongs to {owner}");
    let again = ["rollout", "status", "deployment", NAME, "--timeout=20s"];
    kubectl.run(&again)?;
    kubectl.run(&[
        "delete",
        "deployment",
        NAME,
        "--cascade=foreground",
        "--timeout=60s",
    ])?;
    Ok(())
}

/// To a node that takes none: the pod stays as it is, and the Migration says why.
fn refuse(kubectl: &Kubectl, pod: &Value, to: &str) -> Result<()> {
    let name = text(pod, "/metadata/name")?;
    kubectl.run(&["cordon", to])?;
    annotate(kubectl, &name, to)?;
    let refused = until("the move is refused", POD_TIME_MAX, || {
        let status = status(kubectl, pod)?;
        ensure!(!status["result"].is_null(), "it is at {status}");
        Ok(status)
    });
    kubectl.run(&["uncordon", to])?;
    let refused = refused?;
    let why = (&refused["result"], &refused["reason"]);
    ensure!(
        *why.0 == "Failed" && *why.1 == "TargetCordoned",
        "it ended as {refused}"
    );
    let now = kubectl.json(&["get", "pod", &name])?;
    ensure!(is_ready(&now), "it is not ready: {}", now["status"]);
    ensure!(
        now["metadata"]["uid"] == pod["metadata"]["uid"],
        "it is another one"
    );
    Ok(())
}

fn annotate(kubectl: &Kubectl, pod: &str, to: &str) -> Result<()> {
    let wish = format!("pageferry.dev/migrate-to={to}");
    kubectl.run(&["annotate", "pod", pod, &wish])?;
    Ok(())
}

/// How the newest move of a pod stands.
fn status(kubectl: &Kubectl, pod: &Value) -> Result<Value> {
    let sorted = ["get", "migrations", "--sort-by=.metadata.name"];
    let listed = kubectl.json(&sorted)?;
    let migrations = listed["items"].as_array().context("a list")?;
    let mut of_pod = migrations.iter();
    let uid = &pod["metadata"]["uid"];
    let newest = of_pod.rfind(|one| one["spec"]["pod"]["uid"] == *uid);
    Ok(newest.context("there is no Migration yet")?["status"].clone())
}

/// How it ended. One that was refused before does not count.
fn result(kubectl: &Kubectl, pod: &Value) -> Result<Option<String>> {
    let status = status(kubectl, pod)?;
    if status["reason"] == "TargetCordoned" {
        return Ok(None);
    }
    Ok(status["result"].as_str().map(str::to_owned))
}

fn list(kubectl: &Kubectl) -> Result<Vec<Value>> {
    let listed = kubectl.json(&["get", "pods", "--selector", &format!("app={NAME}")])?;
    Ok(listed["items"].as_array().cloned().unwrap_or_default())
}

fn names(pods: &[Value]) -> Result<BTreeSet<String>> {
    pods.iter().map(|pod| text(pod, "/metadata/name")).collect()
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod["status"]["conditions"].as_array().into_iter().flatten();
    let mut ready = conditions.filter(|one| one["type"] == "Ready");
    ready.any(|one| one["status"] == "True")
}

fn text(object: &Value, place: &str) -> Result<String> {
    let text = object.pointer(place).and_then(Value::as_str);
    let text = text.with_context(|| format!("an object without {place}"))?;
    Ok(text.to_owned())
}

fn deployment() -> Value {
    let mut template = pod(NAME, "", &redis::plan().arguments);
    if let Some(spec) = template["spec"].as_object_mut() {
        spec.remove("nodeName");
    }
    let labels = json!({"app": NAME});
    json!({
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": NAME},
        "spec": {
            "replicas": 2,
            "selector": {"matchLabels": labels},
            "template": {"metadata": {"labels": labels}, "spec": template["spec"]},
        },
    })
}

const NAME: &str = "shop";
const MOVE_TIME_MAX: Duration = Duration::from_secs(90);
