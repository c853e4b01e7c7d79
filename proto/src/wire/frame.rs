//! Frames of the control stream: a little-endian `u32` length, then that many bytes of one
//! message.

/// Length of a frame's length field, in bytes.
pub const HEADER_BYTES: usize = 4;

/// Longest message, in bytes (1 MiB). The largest is an offer, whose description holds a line
/// per file, pid and link; 1 MiB is ten thousand files.
pub const MESSAGE_BYTES_MAX: usize = 1 << 20;

/// Why a length field is not one of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// A frame without a message.
    #[error("frame of no bytes")]
    Empty,
    /// A frame longer than [`MESSAGE_BYTES_MAX`].
    #[error("frame of {0} bytes, more than {MESSAGE_BYTES_MAX}")]
    TooLong(usize),
}

/// The length of the message behind this length field, in bytes: 1 to [`MESSAGE_BYTES_MAX`].
pub fn length(header: [u8; HEADER_BYTES]) -> Result<usize, FrameError> {
    let length = u32::from_le_bytes(header) as usize;
    checked(length)
}

/// The frame around a message.
pub(crate) fn enclose(message: &[u8]) -> Result<Vec<u8>, FrameError> {
    let length = checked(message.len())?;
    let header = u32::try_from(length)
        .expect("MESSAGE_BYTES_MAX fits a u32")
        .to_le_bytes();
    Ok([&header, message].concat())
}

fn checked(length: usize) -> Result<usize, FrameError> {
    match length {
        0 => Err(FrameError::Empty),
        1..=MESSAGE_BYTES_MAX => Ok(length),
        _ => Err(FrameError::TooLong(length)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // clause: N-2
    #[test]
    fn a_frame_has_at_least_one_byte_and_at_most_a_mebibyte() {
        assert_eq!(length([0, 0, 0, 0]), Err(FrameError::Empty));
        assert_eq!(length([0, 0, 0x10, 0]), Ok(MESSAGE_BYTES_MAX));
        assert_eq!(
            length([1, 0, 0x10, 0]),
            Err(FrameError::TooLong(MESSAGE_BYTES_MAX + 1))
        );
        assert_eq!(enclose(b"ab"), Ok(vec![2, 0, 0, 0, b'a', b'b']));
        assert!(enclose(&vec![0; MESSAGE_BYTES_MAX + 1]).is_err());
    }
}
