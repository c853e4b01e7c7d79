//! CRIU's images on their way to the target.

use std::fs;
use std::path::Path;

use bytes::Bytes;
use pageferry_proto::id::{Generation, MemberIndex};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::stream::{ImageFileHeader, ImageName, StreamKind, seal};

use super::failure::lost;
use crate::migration::text::internal;
use crate::net::stream::{DataSender, SendStreamError};

/// Bytes of an image file given to the network at once.
const IMAGE_PIECE: usize = 256 << 10; // 256 KiB

/// Sends every image file of a member's folder; answers with how many and how many bytes.
pub(super) async fn send(
    data: &DataSender,
    generation: Generation,
    (member, folder): (MemberIndex, &Path),
) -> Result<(u32, u64), Failure> {
    let unreadable = |path: &Path, error: std::io::Error| {
        Failure::new(
            ErrorCode::CriuFailed,
            format!("image {}: {error}", path.display()),
        )
    };
    let (mut files, mut bytes) = (0, 0);
    // Most are small, and each stream costs a round trip: small ones go together.
    let mut together = Vec::new();
    let entries = fs::read_dir(folder).map_err(|error| unreadable(folder, error))?;
    for entry in entries {
        let path = entry.map_err(|error| unreadable(folder, error))?.path();
        if !path.is_file() {
            continue;
        }
        let content = fs::read(&path).map_err(|error| unreadable(&path, error))?;
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default();
        let name = ImageName::of_member(member, name).map_err(|error| internal(&error))?;
        let header = ImageFileHeader::new(generation, name, content.len() as u64);
        let mut body = header.map_err(|error| internal(&error))?.encode();
        body.extend(&content);
        seal(&mut body);
        bytes += body.len() as u64;
        files += 1;
        if IMAGE_PIECE < body.len() {
            let sent = send_pieces(data, body.into()).await;
            sent.map_err(|error| lost(&error))?;
            continue;
        }
        together.extend(body);
        if IMAGE_PIECE < together.len() {
            let sent = send_pieces(data, std::mem::take(&mut together).into()).await;
            sent.map_err(|error| lost(&error))?;
        }
    }
    if !together.is_empty() {
        let sent = send_pieces(data, together.into()).await;
        sent.map_err(|error| lost(&error))?;
    }
    Ok((files, bytes))
}

async fn send_pieces(data: &DataSender, mut body: Bytes) -> Result<(), SendStreamError> {
    if body.len() <= IMAGE_PIECE {
        return data.send_stream(StreamKind::ImageFile, body).await;
    }
    let mut writer = data.open(StreamKind::ImageFile).await?;
    while !body.is_empty() {
        let piece = body.split_to(IMAGE_PIECE.min(body.len()));
        writer.write(piece).await?;
    }
    writer.finish();
    Ok(())
}
