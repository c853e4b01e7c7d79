//! Which cells there are, and in which order they are run.
//!
//! Repeats go around: every cell has its first run before any has its second, in an order that is
//! shuffled anew each time, so that a slow hour of the machine is nobody's alone, and a benchmark
//! that is out of time has as many runs of each.

use std::time::Duration;

use super::kinds::{Entry, KINDS, LINKS, LinkKind, SYSTEMS, System};
use super::series::{Cell, Series};
use super::trial::Stretches;
use crate::content::Generator;

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Plan {
    pub repeats: u32,
    /// No run is begun after it.
    pub budget: Option<Duration>,
    pub stretches: Stretches,
    pub full: bool,
    /// Of `workload/link/system`, with `*` for anything; none for all.
    pub only: Option<String>,
    pub seed: u64,
}

/// One cell that is to be run.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    pub entry: &'static Entry,
    pub link: &'static LinkKind,
    pub system: &'static System,
}

impl Plan {
    /// Three runs a cell, of what tells most: ends within twenty minutes.
    pub fn quick(seed: u64) -> Self {
        Self {
            repeats: 3,
            budget: Some(QUICK_BUDGET),
            stretches: Stretches {
                warm: Duration::from_millis(500),
                calm: Duration::from_secs(2),
                after: Duration::from_millis(3500),
            },
            full: false,
            only: None,
            seed,
        }
    }

    /// Five runs of every cell.
    pub fn full(seed: u64) -> Self {
        Self {
            repeats: 5,
            budget: None,
            stretches: Stretches {
                warm: Duration::from_secs(2),
                calm: Duration::from_secs(5),
                after: Duration::from_secs(10),
            },
            full: true,
            ..Self::quick(seed)
        }
    }

    /// The cells: those of the set that the patterns name; of a pattern that names none of the
    /// quick set, all.
    pub fn cells(&self) -> Vec<Wanted> {
        let everything: Vec<Wanted> = all().collect();
        let mut chosen = vec![false; everything.len()];
        for pattern in self.only.as_deref().unwrap_or("*").split(',') {
            let named = |cell: &Wanted| matches(pattern, &cell.name());
            let is_in_quick = everything.iter().any(|cell| named(cell) && cell.is_quick());
            for (cell, chosen) in everything.iter().zip(&mut chosen) {
                let wanted = self.full || !is_in_quick || cell.is_quick();
                *chosen |= named(cell) && wanted;
            }
        }
        let chosen = everything.into_iter().zip(chosen);
        chosen
            .filter_map(|(cell, chosen)| chosen.then_some(cell))
            .collect()
    }
}

/// Every cell that makes sense.
fn all() -> impl Iterator<Item = Wanted> {
    KINDS.iter().flat_map(|entry| {
        LINKS.iter().flat_map(move |link| {
            let fits = |system: &&System| {
                let kind = &entry.kind;
                kind.packs(system.packing) && (kind.is_redis() || !system.only_redis)
            };
            let systems = SYSTEMS.iter().filter(fits);
            systems.map(move |system| Wanted {
                entry,
                link,
                system,
            })
        })
    })
}

impl Wanted {
    pub fn name(&self) -> String {
        format!(
            "{}/{}/{}",
            self.entry.kind.name, self.link.name, self.system.name
        )
    }

    /// Whether the nodes need more than their image for it.
    pub fn needs_layer(&self) -> bool {
        self.system.needs_layer || self.entry.kind.needs_layer()
    }

    /// What this machine has no room for, in words.
    pub fn crowded(&self, available_bytes: u64) -> Option<String> {
        let needed = self.entry.kind.bytes() * self.system.copies + SPARE_BYTES;
        let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
        (available_bytes < needed).then(|| {
            format!(
                "it needs {:.1} GiB in all, and this machine has {:.1} available",
                gib(needed),
                gib(available_bytes)
            )
        })
    }

    /// Its row of a series.
    pub fn row<'a>(&self, series: &'a mut Series) -> &'a mut Cell {
        series.cell_mut(self.entry.kind.name, self.link.name, self.system.name)
    }

    fn is_quick(&self) -> bool {
        self.entry.quick && self.link.quick && self.system.quick
    }
}

/// The numbers below `count` in an order that the seed and the repeat decide.
pub fn shuffled(count: usize, seed: u64, repeat: u32) -> Vec<usize> {
    let mut generator = Generator(seed ^ (u64::from(repeat) << 32));
    let mut order: Vec<usize> = (0..count).collect();
    for last in (1..count).rev() {
        let other = generator.below(last as u64 + 1) as usize;
        order.swap(last, other);
    }
    order
}

/// Whether a pattern names all of a text, where `*` stands for anything. A pattern without a slash
/// is about any part between slashes; several have commas between them.
pub fn matches(patterns: &str, name: &str) -> bool {
    patterns.split(',').any(|pattern| {
        if pattern.contains('/') {
            is_like(pattern.as_bytes(), name.as_bytes())
        } else {
            name.split('/')
                .any(|part| is_like(pattern.as_bytes(), part.as_bytes()))
        }
    })
}

fn is_like(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern, text) {
        ([b'*', rest @ ..], _) => (0..=text.len()).any(|skipped| is_like(rest, &text[skipped..])),
        ([one, rest @ ..], [other, text @ ..]) => one == other && is_like(rest, text),
        ([], []) => true,
        _ => false,
    }
}

/// What is left to everything else.
const SPARE_BYTES: u64 = 1 << 30;
/// A run takes up to a minute, and the lab some seconds to go up and down.
const QUICK_BUDGET: Duration = Duration::from_secs(18 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_has_everything_once_and_is_that_of_its_seed() {
        let one = shuffled(50, 7, 0);
        assert_eq!(one, shuffled(50, 7, 0));
        assert_ne!(one, shuffled(50, 7, 1));
        assert_ne!(one, shuffled(50, 8, 0));
        let mut sorted = one;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn patterns_name_cells_or_parts_of_them() {
        let name = "redis-ycsb-a/1gbit/criu-lazy";
        for pattern in ["criu-lazy", "criu-*", "redis*/1gbit/*", "*", "x,1gbit"] {
            assert!(matches(pattern, name), "{pattern}");
        }
        for pattern in ["criu", "lazy", "redis*/unshaped/*", "1gbit/criu-lazy", ""] {
            assert!(!matches(pattern, name), "{pattern}");
        }
    }

    #[test]
    fn what_is_not_in_the_quick_set_can_be_asked_for_by_name() {
        let mut plan = Plan::quick(1);
        assert!(plan.cells().iter().all(Wanted::is_quick));
        for cell in all() {
            plan.only = Some(cell.name());
            let found: Vec<String> = plan.cells().iter().map(Wanted::name).collect();
            assert_eq!(found, [cell.name()]);
        }
        // Also beside one that is.
        plan.only = Some("writer/unshaped/pageferry,writer/10gbit/pageferry".to_owned());
        assert_eq!(plan.cells().len(), 2);
    }
}
