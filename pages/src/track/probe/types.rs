//! The types of the running kernel (BTF), as far as a program needs them to find its way: the id
//! of a function, and where a member of a structure is.
//!
//! The format is the kernel's `Documentation/bpf/btf.rst`. A text of another form, or a name that
//! is not there, is `None`: then there is no program, and nothing is guessed.

/// All types of a kernel.
pub struct Types {
    data: Vec<u8>,
    strings: usize,
    /// Where the type of each id begins; 0 is `void`, which is nowhere.
    places: Vec<usize>,
}

/// One type: its name, its kind, how many parts follow, and where they begin.
#[derive(Clone, Copy)]
struct Type {
    name: u32,
    kind: u32,
    parts: usize,
    /// The offsets of members carry the sizes of bit fields too.
    has_bit_fields: bool,
    body: usize,
}

impl Types {
    /// Reads the contents of `/sys/kernel/btf/vmlinux`.
    pub fn parse(data: Vec<u8>) -> Option<Self> {
        let word = |at| u32_at(&data, at).and_then(|word| usize::try_from(word).ok());
        if data.get(..2)? != MAGIC.to_ne_bytes() {
            return None;
        }
        let header = word(4)?;
        let (first, length) = (header.checked_add(word(8)?)?, word(12)?);
        let strings = header.checked_add(word(16)?)?;
        let end = first.checked_add(length)?;
        if data.len() < end {
            return None;
        }
        let mut types = Self {
            data,
            strings,
            places: vec![0],
        };
        let mut place = first;
        while place < end {
            types.places.push(place);
            let found = types.read(place)?;
            place = found.body.checked_add(length_of_body(found)?)?;
        }
        Some(types)
    }

    /// The id of a function.
    pub fn function(&self, name: &str) -> Option<u32> {
        let (id, _) = self.find(name, |kind| kind == FUNCTION)?;
        u32::try_from(id).ok()
    }

    /// Where a member is in its structure, in bytes; also one of a nameless part of it.
    pub fn member(&self, structure: &str, member: &str) -> Option<i16> {
        let (_, found) = self.find(structure, |kind| kind == STRUCTURE)?;
        let bits = self.member_bits(found, member, NESTING_MAX)?;
        if bits % 8 != 0 {
            return None;
        }
        i16::try_from(bits / 8).ok()
    }

    fn member_bits(&self, within: Type, wanted: &str, depth: u32) -> Option<u32> {
        (0..within.parts).find_map(|index| {
            let place = within.body + index * MEMBER_BYTES;
            let name = u32_at(&self.data, place)?;
            let kind = u32_at(&self.data, place + 4)?;
            let offset = u32_at(&self.data, place + 8)?;
            let (offset, bits) = if within.has_bit_fields {
                (offset & 0xff_ffff, offset >> 24)
            } else {
                (offset, 0)
            };
            if self.text(name) == Some(wanted.as_bytes()) {
                return (bits == 0).then_some(offset);
            }
            if name != 0 || depth == 0 {
                return None;
            }
            let nameless = self.read(*self.places.get(usize::try_from(kind).ok()?)?)?;
            if !matches!(nameless.kind, STRUCTURE | UNION) {
                return None;
            }
            let inner = self.member_bits(nameless, wanted, depth - 1)?;
            offset.checked_add(inner)
        })
    }

    fn find(&self, name: &str, of: impl Fn(u32) -> bool) -> Option<(usize, Type)> {
        let types = self.places.iter().enumerate().skip(1);
        let mut read = types.filter_map(|(id, place)| Some((id, self.read(*place)?)));
        read.find(|(_, found)| of(found.kind) && self.text(found.name) == Some(name.as_bytes()))
    }

    fn read(&self, place: usize) -> Option<Type> {
        let info = u32_at(&self.data, place.checked_add(4)?)?;
        Some(Type {
            name: u32_at(&self.data, place)?,
            kind: (info >> 24) & 0x1f,
            parts: usize::try_from(info & 0xffff).ok()?,
            has_bit_fields: info >> 31 == 1,
            body: place + TYPE_BYTES,
        })
    }

    fn text(&self, name: u32) -> Option<&[u8]> {
        let start = self.strings.checked_add(usize::try_from(name).ok()?)?;
        let rest = self.data.get(start..)?;
        rest.split(|byte| *byte == 0).next()
    }
}

/// What follows a type, in bytes; `None` for a kind that is newer than this list.
fn length_of_body(of: Type) -> Option<usize> {
    const INTEGER: u32 = 1;
    const ARRAY: u32 = 3;
    const ENUMERATION: u32 = 6;
    const PROTOTYPE: u32 = 13;
    const VARIABLE: u32 = 14;
    const SECTION: u32 = 15;
    const DECLARATION_TAG: u32 = 17;
    const ENUMERATION_64: u32 = 19;
    // Pointer, forward, typedef, volatile, const, restrict, float, type tag.
    const BARE: [u32; 8] = [2, 7, 8, 9, 10, 11, 16, 18];
    Some(match of.kind {
        INTEGER | VARIABLE | DECLARATION_TAG => 4,
        ARRAY => 12,
        STRUCTURE | UNION | SECTION | ENUMERATION_64 => of.parts * MEMBER_BYTES,
        ENUMERATION | PROTOTYPE => of.parts * 8,
        FUNCTION => 0,
        kind if BARE.contains(&kind) => 0,
        _ => return None,
    })
}

fn u32_at(data: &[u8], place: usize) -> Option<u32> {
    let bytes = data.get(place..place.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

const MAGIC: u16 = 0xeb9f;
const STRUCTURE: u32 = 4;
const UNION: u32 = 5;
const FUNCTION: u32 = 12;
const TYPE_BYTES: usize = 12;
const MEMBER_BYTES: usize = 12;
/// Nameless structures within nameless unions; the kernel's are two deep.
const NESTING_MAX: u32 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    /// `struct outer { u64 first; union { u64 second; struct { u64 third, fourth; }; }; }`, and a
    /// function of the same name.
    fn example() -> Vec<u8> {
        let strings = b"\0outer\0first\0second\0third\0fourth\0";
        let name = |text: &str| {
            let mut at = 0;
            while !strings[at..].starts_with(text.as_bytes()) {
                at += 1;
            }
            at as u32
        };
        let kind = |kind: u32, parts: u32| kind << 24 | parts;
        let words = [
            // 1: an integer of 64 bits.
            [0, kind(1, 0), 8].as_slice(),
            &[64],
            // 2: the innermost.
            &[0, kind(4, 2), 16],
            &[name("third"), 1, 0, name("fourth"), 1, 64],
            // 3: the union.
            &[0, kind(5, 2), 16],
            &[name("second"), 1, 0, 0, 2, 0],
            // 4: a function.
            &[name("outer"), kind(12, 0), 1],
            // 5: the outermost.
            &[name("outer"), kind(4, 2), 24],
            &[name("first"), 1, 0, 0, 3, 64],
        ]
        .concat();
        let types: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let header = [
            24,
            0,
            types.len() as u32,
            types.len() as u32,
            strings.len() as u32,
        ];
        let mut data = MAGIC.to_ne_bytes().to_vec();
        data.extend([1, 0]);
        data.extend(header.iter().flat_map(|word: &u32| word.to_ne_bytes()));
        data.extend(types);
        data.extend(strings);
        data
    }

    #[test]
    fn members_of_nameless_parts_are_found_where_they_are() {
        let types = Types::parse(example()).unwrap();
        assert_eq!(types.function("outer"), Some(4));
        assert_eq!(types.function("first"), None);
        let place = |member| types.member("outer", member);
        assert_eq!(place("first"), Some(0));
        assert_eq!(place("second"), Some(8));
        assert_eq!(place("third"), Some(8));
        assert_eq!(place("fourth"), Some(16));
        assert_eq!(place("fifth"), None);
    }

    #[test]
    fn no_text_of_another_form_is_believed_or_panics() {
        let whole = example();
        for length in 0..whole.len() {
            if let Some(types) = Types::parse(whole[..length].to_vec()) {
                types.function("outer");
                types.member("outer", "fourth");
            }
        }
        for place in 0..whole.len() {
            let mut bent = whole.clone();
            bent[place] ^= 0xff;
            if let Some(types) = Types::parse(bent) {
                types.function("outer");
                types.member("outer", "fourth");
            }
        }
    }
}
