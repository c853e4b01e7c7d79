//! What belongs to one attempt at the final round, at both sides.

use std::collections::{BTreeMap, VecDeque};

use super::node::{Attempt, Images, Last, Sending, Stream};
use super::world::World;
use pageferry_proto::id::{Generation, Round, SpaceId};
use pageferry_proto::page::PageCount;
use pageferry_proto::set::PageSet;

/// Pages of a simulated parcel: few, so that a round has several.
const PARCEL_PAGES: PageCount = PageCount(3);

impl World {
    /// A round, with pages or without.
    pub(super) fn sending(&mut self, round: Round, pages: bool) -> Sending {
        let scan = match pages {
            true => self.source.memory.scan(),
            false => BTreeMap::new(),
        };
        let cut = |(space, pages): (SpaceId, PageSet)| {
            let parts = pages.partition(PARCEL_PAGES).into_iter();
            parts.map(move |part| (space, part)).collect::<Vec<_>>()
        };
        Sending {
            round,
            parcels: scan.into_iter().flat_map(cut).collect(),
            absent: Vec::new(),
            sent: 0,
            pages: 0,
            last: None,
        }
    }

    /// The final round: what is dirty is sent, or said to be absent.
    pub(super) fn final_sending(
        &mut self,
        round: Round,
        generation: Generation,
        absent: bool,
    ) -> Sending {
        let absent: Vec<(SpaceId, PageSet)> = match absent {
            true => self.source.memory.scan().into_iter().collect(),
            false => Vec::new(),
        };
        let mut last = self.last(generation);
        let set = |(space, absent): &(SpaceId, PageSet)| Stream::AbsentSet {
            generation,
            space: *space,
            absent: absent.clone(),
        };
        last.unsent.extend(absent.iter().map(set));
        Sending {
            absent,
            last: Some(last),
            // All that was dirty is absent, if anything is.
            ..self.sending(round, true)
        }
    }

    fn last(&self, generation: Generation) -> Last {
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
            if self.verifies {
                unsent.push_back(Stream::Digests {
                    generation,
                    space,
                    pages,
                });
            }
        }
        let images = images(generation);
        let image = |(name, generation)| Stream::Image { generation, name };
        let files = u32::try_from(images.len()).expect("few images");
        unsent.extend(images.into_iter().map(image));
        Last {
            live_sets: spaces,
            images: files,
            digests: if self.verifies { spaces } else { 0 },
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
