//! By which path the pages of a parcel travel: as zero pages, as they are, or compressed.

use pageferry_proto::page::PAGE_SIZE;
use pageferry_proto::wire::parcel::{BlockHeader, Codec, ParcelHeader};
use pageferry_proto::wire::stream::CHECKSUM_BYTES;

use crate::metrics::Paths;

/// What is in a parcel; nothing if it is none. Looks at its headers alone: two for a hundred pages.
pub fn paths(parcel: &[u8]) -> Option<Paths> {
    let (header, rest) = ParcelHeader::decode(parcel).ok()?;
    let mut paths = Paths {
        zero: header.pages().0 - u64::from(header.data_pages()),
        ..Paths::default()
    };
    let mut body = rest.get(..rest.len().checked_sub(CHECKSUM_BYTES)?)?;
    while !body.is_empty() {
        let (block, rest) = BlockHeader::decode(body).ok()?;
        let pages = u64::from(block.raw_bytes()) / PAGE_SIZE as u64;
        match block.codec() {
            Codec::Raw => paths.raw += pages,
            Codec::Lz4 => paths.lz4 += pages,
        }
        body = rest.get(block.bytes() as usize..)?;
    }
    Some(paths)
}

#[cfg(test)]
mod tests {
    use pageferry_proto::id::{Round, SpaceId};
    use pageferry_proto::page::{PageIndex, PageRun};
    use pageferry_proto::wire::parcel::{ParcelRun, RunKind};
    use pageferry_proto::wire::stream::seal;

    use super::*;

    #[test]
    fn each_page_is_counted_once_by_how_it_travels() {
        let run = |start, end, kind| ParcelRun {
            pages: PageRun::between(PageIndex(start), PageIndex(end)).unwrap(),
            kind,
        };
        let runs = vec![run(1, 8, RunKind::Zero), run(9, 12, RunKind::Data)];
        let blocks = [(Codec::Lz4, 2, 100), (Codec::Raw, 1, PAGE_SIZE)];
        let mut body = Vec::new();
        for (codec, pages, length) in blocks {
            let (raw, length) = (pages * PAGE_SIZE as u32, length);
            let header = BlockHeader::new(codec, raw, u32::try_from(length).unwrap()).unwrap();
            body.extend(header.encode());
            body.resize(body.len() + length, 7);
        }
        let length = u32::try_from(body.len()).unwrap();
        let header = ParcelHeader::new(SpaceId(1), Round::FIRST, runs, length).unwrap();
        let mut parcel = header.encode();
        parcel.extend(body);
        seal(&mut parcel);
        let found = paths(&parcel).unwrap();
        assert_eq!((found.zero, found.raw, found.lz4), (7, 1, 2));
        assert!(paths(&parcel[..parcel.len() - 1]).is_none());
        assert!(paths(&[]).is_none());
    }
}
