//! A protobuf message whose fields are replaced while all others stay as they are, byte for byte.
//!
//! prost drops what it does not know. A request that somebody else made may have fields that are
//! younger than this crate, so it is never encoded anew.

use std::collections::BTreeSet;
use std::ops::Range;

/// Why bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    #[error("it ends in the middle of a field")]
    Short,
    #[error("a number at byte {at} has more than {VARINT_MAX} bytes")]
    LongNumber { at: usize },
    #[error("field {field} at byte {at} is of kind {kind}, which CRIU does not use")]
    Kind { field: u64, kind: u64, at: usize },
    #[error("it has no field {field}")]
    Missing { field: u64 },
}

/// What is to be set in a message.
#[derive(Clone, Debug, Default)]
pub(super) struct Changes {
    replaced: BTreeSet<u64>,
    encoded: Vec<u8>,
}

/// One field where it stands in a message.
#[derive(Clone, Debug)]
struct Field {
    number: u64,
    /// All of it.
    range: Range<usize>,
    /// What is in it, if it is bytes, text or a message.
    inside: Option<Range<usize>>,
}

impl Changes {
    /// The field has this value and no other.
    pub fn set_number(&mut self, field: u64, value: i64) {
        self.replaced.insert(field);
        put_number(&mut self.encoded, field << 3 | NUMBER);
        // Also a negative `int32` is as long as the `int64` it would be.
        put_number(&mut self.encoded, value.cast_unsigned());
    }

    /// As [`Changes::set_number`].
    pub fn set_bytes(&mut self, field: u64, value: &[u8]) {
        self.replaced.insert(field);
        self.add_bytes(field, value);
    }

    /// The field has this value, too.
    pub fn add_bytes(&mut self, field: u64, value: &[u8]) {
        put_bytes(&mut self.encoded, field, value);
    }

    /// `message` with these changes.
    fn applied(&self, message: &[u8], last: bool) -> Result<Vec<u8>, WireError> {
        let mut changed = Vec::with_capacity(message.len() + self.encoded.len());
        for field in fields(message) {
            let field = field?;
            if !self.replaced.contains(&field.number) {
                changed.extend_from_slice(&message[field.range]);
            }
        }
        if last {
            changed.extend_from_slice(&self.encoded);
        }
        Ok(changed)
    }

    /// `message` with these changes made in the message that its field `within` is.
    pub fn applied_within(&self, message: &[u8], within: u64) -> Result<Vec<u8>, WireError> {
        let all: Vec<Field> = fields(message).collect::<Result<_, _>>()?;
        // A message that comes in pieces is the sum of them.
        let is_piece = |field: &&Field| field.number == within && field.inside.is_some();
        let pieces = all.iter().filter(is_piece).count();
        let mut changed = Vec::with_capacity(message.len() + self.encoded.len());
        let mut seen = 0;
        for field in &all {
            match &field.inside {
                Some(inside) if field.number == within => {
                    seen += 1;
                    let inside = self.applied(&message[inside.clone()], seen == pieces)?;
                    put_bytes(&mut changed, within, &inside);
                }
                Some(_) | None => changed.extend_from_slice(&message[field.range.clone()]),
            }
        }
        match pieces {
            0 => Err(WireError::Missing { field: within }),
            _ => Ok(changed),
        }
    }
}

fn fields(message: &[u8]) -> impl Iterator<Item = Result<Field, WireError>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == message.len() {
            return None;
        }
        let field = field(message, at);
        // After an error nothing comes.
        at = field
            .as_ref()
            .map_or(message.len(), |field| field.range.end);
        Some(field)
    })
}

fn field(message: &[u8], start: usize) -> Result<Field, WireError> {
    let (key, at) = number(message, start)?;
    let (field, kind) = (key >> 3, key & 7);
    let (inside, end) = match kind {
        NUMBER => (None, number(message, at)?.1),
        FIXED_8 => (None, at + 8),
        FIXED_4 => (None, at + 4),
        BYTES => {
            let (length, at) = number(message, at)?;
            let end = usize::try_from(length)
                .ok()
                .and_then(|length| at.checked_add(length));
            let end = end.ok_or(WireError::Short)?;
            (Some(at..end), end)
        }
        _ => {
            return Err(WireError::Kind {
                field,
                kind,
                at: start,
            });
        }
    };
    if end > message.len() {
        return Err(WireError::Short);
    }
    Ok(Field {
        number: field,
        range: start..end,
        inside,
    })
}

/// The number that begins at `start`, and where it ends.
fn number(message: &[u8], start: usize) -> Result<(u64, usize), WireError> {
    let mut value = 0;
    for index in 0..VARINT_MAX {
        let byte = *message.get(start + index).ok_or(WireError::Short)?;
        value |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok((value, start + index + 1));
        }
    }
    Err(WireError::LongNumber { at: start })
}

fn put_number(into: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

fn put_bytes(into: &mut Vec<u8>, field: u64, value: &[u8]) {
    put_number(into, field << 3 | BYTES);
    put_number(into, value.len() as u64);
    into.extend_from_slice(value);
}

/// Bytes of the longest number.
const VARINT_MAX: usize = 10;

/// Kinds of field.
const NUMBER: u64 = 0;
const FIXED_8: u64 = 1;
const BYTES: u64 = 2;
const FIXED_4: u64 = 5;

#[cfg(test)]
mod tests {
    use super::*;

    /// `message` with field 1 set to 300 inside field 2.
    fn check(message: &[u8], expected: Result<&[u8], WireError>) {
        let mut changes = Changes::default();
        changes.set_number(1, 300);
        let changed = changes.applied_within(message, 2);
        assert_eq!(changed, expected.map(<[u8]>::to_vec));
    }

    #[test]
    fn a_field_is_replaced_and_all_others_stay_in_their_order() {
        // 5: 1, 2: {1: 7, 9: "x", 1: 8, 3: 4 bytes, 4: 8 bytes}, 200: "end"
        let message = [
            40, 1, 18, 21, 8, 7, 74, 1, b'x', 8, 8, 29, 1, 2, 3, 4, 33, 1, 2, 3, 4, 5, 6, 7, 8,
            0xc2, 12, 3, b'e', b'n', b'd',
        ];
        let expected = [
            40, 1, 18, 20, 74, 1, b'x', 29, 1, 2, 3, 4, 33, 1, 2, 3, 4, 5, 6, 7, 8, 8, 0xac, 2,
            0xc2, 12, 3, b'e', b'n', b'd',
        ];
        check(&message, Ok(&expected));
    }

    #[test]
    fn in_a_message_of_two_pieces_the_change_comes_last() {
        let message = [18, 2, 8, 7, 40, 1, 18, 4, 8, 8, 16, 9];
        check(&message, Ok(&[18, 0, 40, 1, 18, 5, 16, 9, 8, 0xac, 2]));
    }

    #[test]
    fn numbers_below_zero_have_ten_bytes() {
        let mut changes = Changes::default();
        changes.set_number(1, -1);
        let changed = changes.applied_within(&[18, 0], 2).expect("a message");
        let ones = [0xff; 9];
        assert_eq!(changed, [&[18, 11, 8], &ones[..], &[1]].concat());
    }

    #[test]
    fn what_is_no_message_is_refused() {
        check(&[], Err(WireError::Missing { field: 2 }));
        check(&[8, 1], Err(WireError::Missing { field: 2 }));
        check(&[18], Err(WireError::Short));
        check(&[18, 2, 8], Err(WireError::Short));
        check(&[18, 1, 8], Err(WireError::Short));
        check(&[18, 2, 10, 5], Err(WireError::Short));
        check(&[18, 3, 29, 1, 2], Err(WireError::Short));
        check(&[8, 0x80], Err(WireError::Short));
        let long = [
            8, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 1,
        ];
        check(&long, Err(WireError::LongNumber { at: 1 }));
        let huge = [18, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
        check(&huge, Err(WireError::Short));
        let group = WireError::Kind {
            field: 1,
            kind: 3,
            at: 0,
        };
        check(&[11, 12], Err(group));
    }
}
