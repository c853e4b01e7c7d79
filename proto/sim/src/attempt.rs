//! What belongs to one attempt at the final round, at both sides.

use std::collections::VecDeque;

use super::node::{Attempt, Images, Last, Stream};
use super::world::World;
use pageferry_proto::id::Generation;

impl World {
    pub(super) fn last(&self, generation: Generation) -> Last {
        let memory = &self.source.memory.memory;
        let live = memory.live();
        let spaces = u32::try_from(live.len()).expect("few spaces");
        let mut unsent = VecDeque::new();
        for (space, live) in live {
            let pages = memory.read(space, &live);
            unsent.push_back(Stream::LiveSet {
                generation,
                space,
                live,
            });
            unsent.push_back(Stream::Digests {
                generation,
                space,
                pages,
            });
        }
        let images = images(generation);
        let image = |(name, generation)| Stream::Image { generation, name };
        let files = u32::try_from(images.len()).expect("few images");
        unsent.extend(images.into_iter().map(image));
        Last {
            live_sets: spaces,
            images: files,
            digests: spaces,
            unsent,
        }
    }
}

impl Attempt {
    /// Drops what an older attempt has left.
    pub(super) fn belong_to(&mut self, generation: Generation) {
        if self.generation != Some(generation) {
            *self = Self {
                generation: Some(generation),
                ..Self::default()
            };
        }
    }
}

/// The image files that an attempt writes: not always of the same names.
pub(super) fn images(generation: Generation) -> Images {
    let odd = u8::from(generation.number() % 2 == 1);
    [(0, generation), (1 + odd, generation)].into()
}
