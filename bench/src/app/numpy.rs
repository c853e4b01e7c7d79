//! A Python program that changes arrays of numpy all the time.

use anyhow::Result;

use super::App;
use super::layer::ARRAYS;
use super::state::{Computing, FACTOR, mix};
use crate::lab::Lab;
use crate::workload::WorkloadPlan;

pub fn start(lab: &mut Lab, node: &str) -> Result<Box<dyn App>> {
    Ok(Box::new(Computing::start(lab, node, &plan(), replay)?))
}

/// How it is started.
pub fn plan() -> WorkloadPlan {
    WorkloadPlan {
        name: "numpy".to_owned(),
        arguments: ["/usr/bin/python3", "-B", ARRAYS]
            .map(str::to_owned)
            .to_vec(),
        own_pid_mnt: false,
        uid: None,
    }
}

/// What `arrays.py` holds after so many steps: integers and floating-point numbers.
pub fn replay(steps: u64) -> u64 {
    let spread = |index: u64| index.wrapping_mul(FACTOR);
    let indices = 0..LENGTH as u64;
    let integers = indices
        .clone()
        .map(|index| spread(index) ^ (spread(index) >> 29));
    let mut integers: Vec<u64> = integers.collect();
    let mut reals: Vec<f64> = indices.map(|index| index as f64).collect();
    for step in 1..=steps {
        let first = mix(step) as usize % (LENGTH / WINDOW) * WINDOW;
        let window = first..first + WINDOW;
        for integer in &mut integers[window.clone()] {
            *integer = integer.wrapping_mul(FACTOR).wrapping_add(step);
        }
        let add = (step % 65_536) as f64;
        for real in &mut reals[window] {
            *real = *real * 0.5 + add;
        }
    }
    let values = integers.into_iter().zip(reals).zip(0_u64..);
    values.fold(0, |sum, ((integer, real), index)| {
        let value = integer.wrapping_add(real.to_bits());
        sum.wrapping_add(value.wrapping_mul(2 * index + 1))
    })
}

/// 32 MiB of each.
const LENGTH: usize = 4 << 20;
/// What a step changes: 16 KiB of each.
const WINDOW: usize = 2048;
