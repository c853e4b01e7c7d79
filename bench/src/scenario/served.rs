//! What the API server told of pods, of the addresses that a Service leads to and of moves, judged
//! afterwards. Pure.
//!
//! Resource versions are those of one etcd: by them, what one watch was told lies before or after
//! what another one was told.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::pods::RESTORED;
use crate::cluster::watching::Event;

/// What became of pods that somebody counts on.
#[derive(Debug, Default)]
pub struct Story {
    /// The fewest that were ready at a time, from when `wanted` of them were.
    pub ready_min: usize,
    /// The most that were there of one, the one that comes among them.
    pub copies_max: usize,
    pub names: BTreeSet<String>,
}

/// A pod as it was told of last.
#[derive(Clone, Debug)]
struct Pod {
    name: String,
    /// The name of the first of its line.
    origin: String,
    address: Option<String>,
    ready: bool,
    came: bool,
    restored: bool,
}

impl Pod {
    fn read(object: &Value) -> Self {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let annotations = &object["metadata"]["annotations"];
        let origin = annotations["pageferry.dev/origin"].as_str();
        let condition = |wanted: &str| {
            let conditions = object["status"]["conditions"].as_array();
            let mut conditions = conditions.into_iter().flatten();
            conditions.any(|one| one["type"] == wanted && one["status"] == "True")
        };
        Self {
            name: name.to_owned(),
            origin: origin.unwrap_or(name).to_owned(),
            address: object["status"]["podIP"].as_str().map(str::to_owned),
            ready: condition("Ready"),
            came: annotations["pageferry.dev/migration"].is_string(),
            restored: condition(RESTORED),
        }
    }
}

#[derive(Debug, Default)]
struct Pods(BTreeMap<String, Pod>);

impl Pods {
    fn apply(&mut self, event: &Event) {
        let uid = uid(&event.object);
        match event.deleted {
            true => self.0.remove(&uid),
            false => self.0.insert(uid, Pod::read(&event.object)),
        };
    }

    fn ready(&self) -> usize {
        self.0.values().filter(|pod| pod.ready).count()
    }

    fn copies(&self) -> usize {
        let mut copies: BTreeMap<&str, usize> = BTreeMap::new();
        for pod in self.0.values() {
            *copies.entry(&pod.origin).or_default() += 1;
        }
        copies.into_values().max().unwrap_or(0)
    }
}

/// What became of pods of which `wanted` are to be ready.
pub fn story(events: &[Event], wanted: usize) -> Result<Story> {
    let mut pods = Pods::default();
    let mut story = Story::default();
    let mut begun = false;
    for event in events {
        pods.apply(event);
        story
            .names
            .extend(pods.0.values().map(|pod| pod.name.clone()));
        story.copies_max = story.copies_max.max(pods.copies());
        let ready = pods.ready();
        if !begun && ready == wanted {
            (begun, story.ready_min) = (true, ready);
        }
        story.ready_min = story.ready_min.min(ready);
    }
    ensure!(begun, "{wanted} pods were never ready");
    Ok(story)
}

/// What a Service led to.
#[derive(Debug, Default)]
pub struct Routes {
    /// The fewest addresses at a time, from when there were `wanted`.
    pub least: usize,
    /// The longest that an address was ready though no pod that has it was, as the lab heard of it.
    pub stale_max: Duration,
    /// The pods that it leads to in the end.
    pub last: BTreeSet<String>,
}

/// Judges the slices of one Service against its pods.
///
/// # Errors
/// When it led to a pod that had not arrived, or wrongly in the end.
pub fn routes(pods: &[Event], slices: &[Event], wanted: usize) -> Result<Routes> {
    let mut all: Vec<(u64, &Event, bool)> = Vec::new();
    for event in pods {
        all.push((version(&event.object)?, event, false));
    }
    for event in slices {
        all.push((version(&event.object)?, event, true));
    }
    all.sort_by_key(|(version, ..)| *version);
    let mut known = Pods::default();
    let mut routes = Routes::default();
    let (mut listed, mut begun) = (BTreeMap::new(), false);
    for (_, event, of_slice) in all {
        if !of_slice {
            known.apply(event);
            continue;
        }
        let name = uid(&event.object);
        let ready = match event.deleted {
            true => BTreeMap::new(),
            false => ready_endpoints(&event.object),
        };
        for (address, pod) in &ready {
            let early = known.0.get(pod).filter(|pod| pod.came && !pod.restored);
            if let Some(pod) = early {
                anyhow::bail!("{address} led to {} before it had arrived", pod.name);
            }
        }
        listed.insert(name, ready);
        let addresses: BTreeSet<&String> = listed.values().flat_map(BTreeMap::keys).collect();
        if !begun && addresses.len() == wanted {
            (begun, routes.least) = (true, wanted);
        }
        routes.least = routes.least.min(addresses.len());
    }
    ensure!(begun, "the Service never led to {wanted} addresses");
    routes.last = listed
        .into_values()
        .flat_map(BTreeMap::into_values)
        .collect();
    for uid in &routes.last {
        let pod = known
            .0
            .get(uid)
            .with_context(|| format!("it leads to {uid}, which is gone"))?;
        ensure!(pod.ready, "it leads to {}, which is not ready", pod.name);
    }
    routes.stale_max = stale_max(pods, slices);
    Ok(routes)
}

/// By when the lab heard of them: an upper bound, as no event is heard of before it happens.
fn stale_max(pods: &[Event], slices: &[Event]) -> Duration {
    let mut all: Vec<(&Event, bool)> = pods.iter().map(|event| (event, false)).collect();
    all.extend(slices.iter().map(|event| (event, true)));
    all.sort_by_key(|(event, _)| event.at);
    let mut known = Pods::default();
    let mut listed: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    let mut since: BTreeMap<String, Instant> = BTreeMap::new();
    let mut longest = Duration::ZERO;
    for (event, of_slice) in all {
        match of_slice {
            false => known.apply(event),
            true => {
                let ready = match event.deleted {
                    true => BTreeMap::new(),
                    false => ready_endpoints(&event.object),
                };
                listed.insert(uid(&event.object), ready);
            }
        }
        let addresses: BTreeSet<&String> = listed.values().flat_map(BTreeMap::keys).collect();
        let served = |address: &String| {
            let mut pods = known.0.values();
            pods.any(|pod| pod.ready && pod.address.as_ref() == Some(address))
        };
        let stale: BTreeSet<&String> = addresses.into_iter().filter(|one| !served(one)).collect();
        since.retain(|address, since| {
            let still = stale.contains(address);
            if !still {
                longest = longest.max(event.at - *since);
            }
            still
        });
        for address in stale {
            since.entry(address.clone()).or_insert(event.at);
        }
    }
    longest
}

/// The most moves that went on at a time, and on what those that waited did so.
pub fn moves(migrations: &[Event]) -> (usize, BTreeSet<String>) {
    let mut going = BTreeSet::new();
    let (mut most, mut blocked) = (0, BTreeSet::new());
    for event in migrations {
        let course = &event.object["status"]["course"];
        let step = course["step"].as_str().unwrap_or("Waiting");
        match event.deleted || matches!(step, "Waiting" | "Ended") {
            true => going.remove(&uid(&event.object)),
            false => going.insert(uid(&event.object)),
        };
        most = most.max(going.len());
        blocked.extend(course["blocked"]["reason"].as_str().map(str::to_owned));
    }
    (most, blocked)
}

fn uid(object: &Value) -> String {
    object["metadata"]["uid"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

fn version(object: &Value) -> Result<u64> {
    let text = object["metadata"]["resourceVersion"].as_str();
    let text = text.context("an object without a version")?;
    text.parse()
        .with_context(|| format!("the version {text:?}"))
}

/// Addresses that are ready, and whose they are.
fn ready_endpoints(slice: &Value) -> BTreeMap<String, String> {
    let endpoints = slice["endpoints"].as_array().into_iter().flatten();
    let ready = endpoints.filter(|one| one["conditions"]["ready"] == true);
    let ready = ready.flat_map(|one| {
        let pod = one["targetRef"]["uid"].as_str().unwrap_or_default();
        let addresses = one["addresses"].as_array().into_iter().flatten();
        let addresses = addresses.filter_map(Value::as_str);
        addresses.map(move |address| (address.to_owned(), pod.to_owned()))
    });
    ready.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(version: u64, deleted: bool, mut object: Value) -> Event {
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        Event {
            at: Instant::now(),
            deleted,
            object,
        }
    }

    fn pod(version: u64, name: &str, conditions: &[&str], deleted: bool) -> Event {
        let conditions = conditions
            .iter()
            .map(|one| json!({"type": one, "status": "True"}));
        let mut metadata = json!({"name": name, "uid": name});
        if let Some((origin, _)) = name.rsplit_once("-m") {
            metadata["annotations"] = json!({
                "pageferry.dev/origin": origin, "pageferry.dev/migration": "id",
            });
        }
        let status = json!({
            "podIP": "10.0.0.1", "conditions": conditions.collect::<Vec<_>>(),
        });
        event(
            version,
            deleted,
            json!({"metadata": metadata, "status": status}),
        )
    }

    fn slice(version: u64, pods: &[&str]) -> Event {
        let endpoint = |pod: &&str| {
            json!({
                "addresses": ["10.0.0.1"], "conditions": {"ready": true},
                "targetRef": {"uid": pod},
            })
        };
        let endpoints: Vec<Value> = pods.iter().map(endpoint).collect();
        event(
            version,
            false,
            json!({"metadata": {"uid": "slice"}, "endpoints": endpoints}),
        )
    }

    #[test]
    fn a_move_is_told_as_it_was() {
        let pods = [
            pod(1, "web", &["Ready"], false),
            pod(3, "web-m1", &[], false),
            pod(4, "web-m1", &[RESTORED, "Ready"], false),
            pod(6, "web", &["Ready"], true),
        ];
        let told = story(&pods, 1).expect("a story");
        assert_eq!(
            (told.ready_min, told.copies_max, told.names.len()),
            (1, 2, 2)
        );
        let slices = [slice(2, &["web"]), slice(5, &["web-m1"])];
        let good = routes(&pods, &slices, 1).expect("good routes");
        assert_eq!((good.least, good.last.len()), (1, 1));
        // Too early.
        let early = routes(&pods[..2], &[slice(5, &["web-m1"])], 1);
        assert!(format!("{:#}", early.expect_err("too early")).contains("before it had arrived"));
        // To nobody.
        let gone = routes(&pods, &[slice(7, &["web"])], 1);
        assert!(format!("{:#}", gone.expect_err("gone")).contains("is gone"));
    }

    #[test]
    fn moves_that_go_on_are_counted() {
        let at = |name: &str, step: &str, blocked: Value| {
            let course = json!({"step": step, "blocked": blocked});
            event(
                1,
                false,
                json!({"metadata": {"uid": name}, "status": {"course": course}}),
            )
        };
        let events = [
            at("a", "Copying", Value::Null),
            at("b", "Waiting", json!({"reason": "NodeLimit"})),
            at("a", "Ended", Value::Null),
            at("b", "Copying", Value::Null),
        ];
        let (most, blocked) = moves(&events);
        assert_eq!((most, blocked.len()), (1, 1));
    }
}
