//! What a node has room for, by what pods request: as the scheduler counts. Pure.
//!
//! Absent: what else the scheduler knows (ports, volumes, spreading, other pods' affinity). It has
//! the last word of every pod that comes.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Node, Pod, PodSpec, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// Amounts of resources by their names, in thousandths.
pub type Amounts = BTreeMap<String, i128>;

/// Of which resource a node has too little left for a pod beside others, in words. None if it fits.
pub fn lacks<'a>(node: &Node, others: impl Iterator<Item = &'a Pod>, pod: &Pod) -> Option<String> {
    let left = left(node, others);
    requested(pod).into_iter().find_map(|(name, wanted)| {
        let left = left.get(&name).copied().unwrap_or(0);
        (0 < wanted && left < wanted).then(|| {
            format!(
                "it has {} of {name} left, and the pod requests {}",
                shown(left.max(0)),
                shown(wanted)
            )
        })
    })
}

/// How much of a node's memory is left, in thousandths.
pub fn memory_left<'a>(node: &Node, others: impl Iterator<Item = &'a Pod>) -> i128 {
    let all = allocatable(node).get(MEMORY).copied().unwrap_or(0);
    let left = left(node, others).get(MEMORY).copied().unwrap_or(0);
    left.saturating_mul(1000).checked_div(all).unwrap_or(0)
}

/// What pods request of a node is taken from what it has. Those that have ended have nothing.
fn left<'a>(node: &Node, others: impl Iterator<Item = &'a Pod>) -> Amounts {
    let mut left = allocatable(node);
    for pod in others.filter(|pod| !has_ended(pod)) {
        for (name, amount) in requested(pod) {
            if let Some(left) = left.get_mut(&name) {
                *left = left.saturating_sub(amount);
            }
        }
    }
    left
}

fn allocatable(node: &Node) -> Amounts {
    let status = node.status.as_ref();
    amounts(status.and_then(|status| status.allocatable.as_ref()))
}

/// Whether nothing of a pod will run any more.
pub fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|one| one.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// What a pod takes of its node: its containers together, or an init container that wants more.
pub fn requested(pod: &Pod) -> Amounts {
    let mut total = Amounts::new();
    if let Some(spec) = &pod.spec {
        total = of_containers(spec);
        // What is said of the whole pod counts more than its parts.
        let whole = spec.resources.as_ref();
        total.extend(amounts(whole.and_then(|one| one.requests.as_ref())));
        add(&mut total, &amounts(spec.overhead.as_ref()));
    }
    total.insert(PODS.to_owned(), 1000);
    total
}

fn of_containers(spec: &PodSpec) -> Amounts {
    let of = |container: &Container| {
        let resources: Option<&ResourceRequirements> = container.resources.as_ref();
        amounts(resources.and_then(|one| one.requests.as_ref()))
    };
    let mut total = Amounts::new();
    for container in &spec.containers {
        add(&mut total, &of(container));
    }
    let mut sidecars = Amounts::new();
    let mut most = Amounts::new();
    for container in spec.init_containers.iter().flatten() {
        let mut now = of(container);
        if container.restart_policy.as_deref() == Some("Always") {
            add(&mut sidecars, &now);
            continue;
        }
        // It runs beside the sidecars that came before it.
        add(&mut now, &sidecars);
        raise(&mut most, now);
    }
    add(&mut total, &sidecars);
    raise(&mut total, most);
    total
}

fn add(to: &mut Amounts, more: &Amounts) {
    for (name, amount) in more {
        let sum = to.entry(name.clone()).or_default();
        *sum = sum.saturating_add(*amount);
    }
}

fn raise(to: &mut Amounts, least: Amounts) {
    for (name, amount) in least {
        let one = to.entry(name).or_default();
        *one = (*one).max(amount);
    }
}

fn amounts(quantities: Option<&BTreeMap<String, Quantity>>) -> Amounts {
    let all = quantities.into_iter().flatten();
    let known = all.filter_map(|(name, quantity)| Some((name.clone(), amount(&quantity.0)?)));
    known.collect()
}

/// A quantity in thousandths, rounded up. None if it is none.
fn amount(text: &str) -> Option<i128> {
    let text = text.trim();
    let end = text
        .find(|one: char| !one.is_ascii_digit() && !matches!(one, '.' | '+' | '-'))
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let (factor, divisor) = unit_of(unit)?;
    let (sign, number) = match number.strip_prefix('-') {
        Some(number) => (-1, number),
        None => (1, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && part.is_empty() || DIGITS_MAX < whole.len() + part.len() {
        return None;
    }
    let digits: i128 = format!("{whole}{part}").parse().ok()?;
    let below = 10_i128.checked_pow(u32::try_from(part.len()).ok()?)?;
    let divisor = divisor.checked_mul(below)?;
    let above = digits.checked_mul(factor)?.checked_mul(1000)?;
    let rounded = above.checked_add(divisor - 1)?.checked_div(divisor)?;
    Some(sign * rounded)
}

/// What a unit multiplies with, and divides by.
fn unit_of(unit: &str) -> Option<(i128, i128)> {
    if let Some(power) = unit.strip_prefix(['e', 'E'])
        && let Ok(power) = power.parse::<i32>()
    {
        let one = 10_i128.checked_pow(power.unsigned_abs())?;
        return Some(if power < 0 { (1, one) } else { (one, 1) });
    }
    let thousands = ["", "k", "M", "G", "T", "P", "E"];
    let binary = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let below = ["", "m", "u", "n"];
    let power = |units: &[&str]| {
        let index = units.iter().position(|one| *one == unit)?;
        u32::try_from(index).ok()
    };
    if let Some(index) = power(&thousands) {
        return Some((1000_i128.pow(index), 1));
    }
    if let Some(index) = power(&binary) {
        return Some((1024_i128.pow(index), 1));
    }
    power(&below).map(|index| (1, 1000_i128.pow(index)))
}

/// For people.
fn shown(thousandths: i128) -> String {
    let whole = thousandths / 1000;
    let mebi = 1 << 20;
    match thousandths % 1000 {
        0 if mebi <= whole => format!("{}Mi", whole / mebi),
        0 => whole.to_string(),
        _ => format!("{thousandths}m"),
    }
}

const MEMORY: &str = "memory";
const PODS: &str = "pods";
/// More than these no quantity has.
const DIGITS_MAX: usize = 24;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn quantities_are_as_kubernetes_writes_them() {
        for (text, thousandths) in [
            ("1", Some(1000)),
            ("100m", Some(100)),
            ("0.5", Some(500)),
            ("1.5Gi", Some(1_610_612_736_000)),
            ("64Mi", Some(67_108_864_000)),
            ("2k", Some(2_000_000)),
            ("1e3", Some(1_000_000)),
            ("1E", Some(1_000_000_000_000_000_000_000)),
            ("12e-1", Some(1200)),
            ("1u", Some(1)),
            ("-1", Some(-1000)),
            ("", None),
            (".", None),
            ("1x", None),
            ("12345678901234567890123456", None),
            ("9999999999999999999999E", None),
        ] {
            assert_eq!(amount(text), thousandths, "{text}");
        }
    }

    fn pod(spec: &serde_json::Value) -> Pod {
        serde_json::from_value(json!({"spec": spec})).expect("a pod")
    }

    fn container(cpu: &str) -> serde_json::Value {
        json!({"name": "c", "resources": {"requests": {"cpu": cpu}}})
    }

    #[test]
    fn a_pod_requests_what_its_containers_do() {
        let cpu = |spec| requested(&pod(&spec)).get("cpu").copied();
        let two = json!([container("1"), container("500m")]);
        assert_eq!(cpu(json!({"containers": two})), Some(1500));
        let big = json!({"containers": [container("1")], "initContainers": [container("3")]});
        assert_eq!(cpu(big), Some(3000));
        let mut sidecar = container("2");
        sidecar["restartPolicy"] = json!("Always");
        let beside = json!([sidecar, container("3")]);
        let spec = json!({"containers": [container("1")], "initContainers": beside});
        assert_eq!(cpu(spec), Some(5000));
        let whole = json!({
            "containers": two, "resources": {"requests": {"cpu": "4"}}, "overhead": {"cpu": "1"},
        });
        assert_eq!(cpu(whole), Some(5000));
    }

    #[test]
    fn a_node_has_what_others_leave() {
        let node: Node = serde_json::from_value(json!({"status": {"allocatable": {
            "cpu": "2", "memory": "1Gi", "pods": "2",
        }}}))
        .expect("a node");
        let here = pod(&json!({"containers": [container("1500m")]}));
        let mut gone = here.clone();
        gone.status = serde_json::from_value(json!({"phase": "Succeeded"})).ok();
        let comes = pod(&json!({"containers": [container("1")]}));
        assert_eq!(lacks(&node, [].iter(), &comes), None);
        assert_eq!(lacks(&node, [gone].iter(), &comes), None);
        let why = lacks(&node, [here.clone()].iter(), &comes).expect("it is full");
        assert_eq!(why, "it has 500m of cpu left, and the pod requests 1");
        let small = pod(&json!({"containers": [container("1m")]}));
        let two = [small.clone(), small.clone()];
        let why = lacks(&node, two.iter(), &small).expect("it is full");
        assert!(why.contains("of pods"), "{why}");
        assert_eq!(memory_left(&node, [here].iter()), 1000);
    }
}
