//! The plan in a bottle: an API server, two controllers of which one may think that it still leads,
//! two agents with what they saw a while ago, two daemons, a kubelet, and an owner that counts.
//!
//! A case is its number: the number says what happens and in which order. SIMULATE_CASES says how
//! many there are, SIMULATE_SEED the first one.
//!
//! Not modelled: what the daemons say to each other (that is `proto`'s simulation), and API servers
//! that lose what they have confirmed.

mod cluster;
mod daemons;
mod oracle;
mod random;
mod world;

use std::collections::BTreeMap;

use pageferry_k8s::plan::Broken;
use world::{Setup, World};

fn number(name: &str, default: u64) -> u64 {
    let text = std::env::var(name).ok();
    text.map_or(default, |text| {
        text.parse()
            .unwrap_or_else(|error| panic!("{name}={text}: {error}"))
    })
}

fn run(seed: u64, setup: Setup, log: &mut String) -> Result<End, String> {
    let mut world = World::new(seed, setup);
    let end = world.run();
    *log = world.log().to_owned();
    let end = end.map_err(|violation| format!("case {seed}: {violation}"))?;
    Ok(End {
        end,
        adopted_amid_faults: world.adopted_amid_faults,
    })
}

/// How a case ended.
struct End {
    end: String,
    adopted_amid_faults: bool,
}

/// How cases ended, and in how many the owner had its part in it while there were faults.
fn cases(count: u64, setup: Setup) -> (BTreeMap<String, u64>, u64) {
    let first = number("SIMULATE_SEED", 0);
    let (mut ends, mut adopted) = (BTreeMap::new(), 0);
    for seed in first..first + number("SIMULATE_CASES", count) {
        let mut log = String::new();
        match run(seed, setup, &mut log) {
            Ok(End { end, .. }) if end != "Succeeded" && !setup.faults => {
                panic!("case {seed}: {end} without a fault\n{log}")
            }
            Ok(one) => {
                adopted += u64::from(one.adopted_amid_faults);
                *ends.entry(one.end).or_default() += 1;
            }
            Err(violation) => panic!("{violation}\n{log}"),
        }
    }
    println!("{setup:?}: {ends:?}, adopted amid faults in {adopted}");
    (ends, adopted)
}

const CALM: Setup = Setup {
    owned: false,
    faults: false,
    broken: None,
};

#[test]
fn without_faults_every_move_succeeds() {
    for owned in [false, true] {
        let (ends, _) = cases(500, Setup { owned, ..CALM });
        assert_eq!(ends.keys().collect::<Vec<_>>(), ["Succeeded"], "{ends:?}");
    }
}

#[test]
fn with_faults_no_rule_is_broken_and_every_move_ends() {
    for owned in [false, true] {
        let setup = Setup {
            owned,
            faults: true,
            broken: None,
        };
        let (ends, adopted) = cases(20_000, setup);
        assert_eq!(owned, adopted != 0, "adopted amid faults in {adopted}");
        // The faults are such that every end is met.
        for end in ["Succeeded", "Failed", "Cancelled"] {
            assert!(ends.contains_key(end), "{end} is never met: {ends:?}");
        }
    }
}

#[test]
fn broken_rules_are_caught() {
    for broken in [
        Broken::ProceedEarly,
        Broken::DeleteSourceEarly,
        Broken::DeleteNewAlways,
        Broken::DeleteBeforeAdoption,
        Broken::RestoredEarly,
        Broken::LeaveNew,
        Broken::AdoptBlindly,
        Broken::AbsentIsDown,
        Broken::LostIsMoved,
    ] {
        let setup = Setup {
            owned: true,
            faults: true,
            broken: Some(broken),
        };
        let caught = (0..20_000).find_map(|seed| run(seed, setup, &mut String::new()).err());
        let caught = caught.unwrap_or_else(|| panic!("nobody notices {broken:?}"));
        println!("{broken:?}: {caught}");
    }
}
