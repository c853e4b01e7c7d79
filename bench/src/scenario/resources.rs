//! The resources of pageferry at a real API server: it takes what is right, and refuses what their
//! rules forbid, with the words that are to be read then.

use anyhow::{Result, bail, ensure};
use serde_json::{Value, json};

use crate::cluster::kubectl::Kubectl;

/// Applies the definitions, and tries them.
pub fn check(kubectl: &Kubectl) -> Result<()> {
    kubectl.apply(DEFINITIONS)?;
    let established = ["wait", "--for=condition=Established", "--timeout=20s"];
    let names = [
        "crd/migrations.pageferry.dev",
        "crd/migrationpolicies.pageferry.dev",
    ];
    kubectl.run(&[&established[..], &names].concat())?;
    migrations(kubectl)?;
    policies(kubectl)
}

fn migrations(kubectl: &Kubectl) -> Result<()> {
    let to_node = json!({"node": "node-b"});
    kubectl.apply(&migration(&to_node).to_string())?;
    let both = json!({"node": "node-b", "nodeSelector": {"disk": "fast"}});
    let made = kubectl.apply(&migration(&both).to_string());
    refused(made, "a target is either a node or a nodeSelector")?;
    let change = |patch: &Value| patch_of(kubectl, "", &json!({"spec": patch}));
    refused(
        change(&json!({"target": {"node": "node-a"}})),
        "only cancel may change",
    )?;
    refused(
        change(&json!({"policy": "strict"})),
        "only cancel may change",
    )?;
    change(&json!({"cancel": true}))?;
    refused(
        change(&json!({"cancel": false})),
        "a cancelled Migration stays so",
    )?;
    let say = |status: &Value| patch_of(kubectl, "status", &json!({"status": status}));
    say(&json!({"phase": "Transferring", "source": "node-a", "target": "node-b"}))?;
    say(&json!({"phase": "Done", "result": "Cancelled", "reason": "Asked"}))?;
    refused(
        say(&json!({"result": "Succeeded"})),
        "how a Migration ended does not change",
    )?;
    refused(say(&json!({"phase": "Somewhere"})), "Unsupported value")?;
    let shown = kubectl.run(&["get", "mig", NAME])?;
    for word in [
        "POD",
        "FROM",
        "RESULT",
        "web",
        "node-a",
        "node-b",
        "Done",
        "Cancelled",
    ] {
        ensure!(
            shown.contains(word),
            "kubectl get mig does not show {word}: {shown}"
        );
    }
    kubectl.run(&["delete", "mig", NAME])?;
    Ok(())
}

fn policies(kubectl: &Kubectl) -> Result<()> {
    kubectl.apply(&policy(&json!({})).to_string())?;
    let made = kubectl.json(&["get", "migp", NAME])?;
    ensure!(
        made["spec"]["atOnce"]["perNode"] == 2,
        "without its defaults: {made}"
    );
    for (spec, why) in [
        (
            json!({"downtimeBudgetMs": 900, "timeouts": {"frozenMs": 500}}),
            "the downtime budget must not be above timeouts.frozenMs",
        ),
        (
            json!({"atOnce": {"perNode": 9, "perCluster": 8}}),
            "perNode must not be above perCluster",
        ),
        (json!({"downtimeBudgetMs": 0}), "greater than or equal to 1"),
    ] {
        refused(kubectl.apply(&policy(&spec).to_string()), why)?;
    }
    kubectl.run(&["delete", "migp", NAME])?;
    Ok(())
}

fn refused(made: Result<String>, why: &str) -> Result<()> {
    match made {
        Ok(said) => bail!("taken, although {why}: {said}"),
        Err(error) => {
            let text = format!("{error:#}");
            ensure!(
                text.contains(why),
                "refused for another reason than {why:?}: {text}"
            );
            Ok(())
        }
    }
}

fn patch_of(kubectl: &Kubectl, subresource: &str, patch: &Value) -> Result<String> {
    let (subresource, patch) = (format!("--subresource={subresource}"), patch.to_string());
    kubectl.run(&[
        "patch",
        "mig",
        NAME,
        &subresource,
        "--type=merge",
        "--patch",
        &patch,
    ])
}

fn migration(target: &Value) -> Value {
    json!({
        "apiVersion": "pageferry.dev/v1alpha1",
        "kind": "Migration",
        "metadata": {"name": NAME, "namespace": "default"},
        "spec": {
            "pod": {"name": "web", "uid": "6b0f8a5e-0000-4000-8000-000000000000"},
            "target": target,
        },
    })
}

fn policy(spec: &Value) -> Value {
    json!({
        "apiVersion": "pageferry.dev/v1alpha1",
        "kind": "MigrationPolicy",
        "metadata": {"name": NAME},
        "spec": spec,
    })
}

const NAME: &str = "trial";
const DEFINITIONS: &str = include_str!("../../../deploy/kubernetes/crds.yaml");
