//! A Java program that changes its heap all the time, with threads, a JIT and a garbage collector.

use anyhow::Result;

use super::App;
use super::layer::JAVA_CLASSES;
use super::state::{Computing, FACTOR, mix};
use crate::lab::Lab;
use crate::workload::WorkloadPlan;

pub fn start(lab: &mut Lab, node: &str) -> Result<Box<dyn App>> {
    let arguments = [
        "/usr/bin/java",
        // A file in /tmp that other processes of the node map.
        "-XX:+PerfDisableSharedMem",
        // Executable memory is copied in the freeze.
        "-XX:ReservedCodeCacheSize=32m",
        "-Xms192m",
        "-Xmx192m",
        "-cp",
        JAVA_CLASSES,
        "Heap",
    ];
    let plan = WorkloadPlan {
        name: "jvm".to_owned(),
        arguments: arguments.map(str::to_owned).to_vec(),
        own_pid_mnt: false,
        uid: None,
    };
    Ok(Box::new(Computing::start(lab, node, &plan, replay)?))
}

/// What `Heap.java` holds after so many steps: words in chunks, and texts in a map.
fn replay(steps: u64) -> u64 {
    let mut words = vec![0_u64; WORDS];
    let mut texts = vec![0_u64; TEXTS];
    for step in 1..=steps {
        let x = mix(step);
        let word = &mut words[x as usize % WORDS];
        *word = word.wrapping_mul(FACTOR).wrapping_add(x);
        texts[(x >> 48) as usize % TEXTS] = x;
    }
    let weighted = |values: &[u64]| {
        let weighted = values.iter().zip(0_u64..);
        weighted.fold(0_u64, |sum, (value, index)| {
            sum.wrapping_add(value.wrapping_mul(2 * index + 1))
        })
    };
    weighted(&words).wrapping_add(weighted(&texts))
}

/// 32 MiB.
const WORDS: usize = 4 << 20;
const TEXTS: usize = 1 << 16;
