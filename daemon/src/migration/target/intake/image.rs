//! Image files of CRIU's, written as they come.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;

use pageferry_proto::migration::ledger::Arrival;
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::stream::{CHECKSUM_BYTES, ImageFileHeader};

use super::{Shared, corrupt, image_failed, lost, malformed};
use crate::migration::text::chain;
use crate::net::stream::StreamReader;

impl Shared {
    /// Writes the image files of a stream as they come.
    pub(super) async fn take_images(&self, reader: &mut StreamReader) -> Result<(), Failure> {
        while !reader.is_over().await.map_err(|error| lost(&error))? {
            self.take_image(reader).await?;
        }
        Ok(())
    }

    /// Writes one image file, unless its attempt was given up. Its checksum covers the header too.
    async fn take_image(&self, reader: &mut StreamReader) -> Result<(), Failure> {
        let mut head = vec![0; ImageFileHeader::START_BYTES];
        let read = reader.read_exact(&mut head).await;
        read.map_err(|error| lost(&error))?;
        let length = head.first_chunk().map_or(0, ImageFileHeader::bytes);
        head.resize(length, 0);
        let read = reader
            .read_exact(&mut head[ImageFileHeader::START_BYTES..])
            .await;
        read.map_err(|error| lost(&error))?;
        let (header, _) = ImageFileHeader::decode(&head).map_err(|error| corrupt(&error))?;
        let (member, name) = header.name().split().map_err(|error| corrupt(&error))?;
        self.check_member(member.number())?;
        let generation = header.generation();
        let path = self.images_of(generation, member).join(name);
        let mut file = self.begin_image(&header, &path)?;
        let mut hasher = crc32fast::Hasher::new();
        hasher.update(&head);
        let mut left = header.length();
        while 0 < left {
            let most = usize::try_from(left).unwrap_or(usize::MAX);
            let content = reader.chunk_of(most).await.map_err(|error| lost(&error))?;
            let content = content.ok_or_else(|| malformed("image file"))?;
            hasher.update(&content);
            left -= content.len() as u64;
            let Some(open) = &mut file else { continue };
            if generation < self.lock().ledger.generation() {
                file = None;
                self.remove_images(generation);
                continue;
            }
            let written = open.write_all(&content);
            written.map_err(|error| image_failed(&path, &error))?;
        }
        let mut checksum = [0; CHECKSUM_BYTES];
        let read = reader.read_exact(&mut checksum).await;
        read.map_err(|error| lost(&error))?;
        if checksum != hasher.finalize().to_le_bytes() {
            let name = header.name();
            return Err(Failure::new(
                ErrorCode::Checksum,
                format!("image {name} has a wrong checksum"),
            ));
        }
        let bytes = header.length();
        let arrival = self.enter_and(
            |ledger| ledger.image(generation),
            |attempt, arrival| {
                if *arrival == Arrival::Kept {
                    attempt.image_bytes += bytes;
                }
            },
        )?;
        if file.is_some() && arrival == Arrival::Late {
            self.remove_images(generation);
        }
        Ok(())
    }

    /// The file for an image, if its attempt is collected. Images are on a tmpfs, so they are
    /// memory like the store's, and count as such.
    fn begin_image(&self, header: &ImageFileHeader, path: &Path) -> Result<Option<File>, Failure> {
        let generation = header.generation();
        if self.enter(|ledger| ledger.collect(generation))? == Arrival::Late {
            return Ok(None);
        }
        let bytes = header.length();
        self.lock()
            .images
            .entry(generation)
            .or_default()
            .push(bytes);
        let counted = self.receiver.store().take_besides(bytes);
        counted.map_err(|error| Failure::new(error.code(), chain(&error)))?;
        let folder = path.parent().unwrap_or(&self.images);
        let created = fs::create_dir_all(folder).and_then(|()| File::create_new(path));
        match created {
            Ok(file) => Ok(Some(file)),
            // Its folder has been removed in between.
            Err(_) if generation < self.lock().ledger.generation() => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Failure::new(
                ErrorCode::Unexpected,
                format!("image {} came twice", header.name()),
            )),
            Err(error) => Err(image_failed(path, &error)),
        }
    }
}
