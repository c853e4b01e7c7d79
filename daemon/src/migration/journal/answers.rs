//! What is left of journals that are too old to be kept whole, and may not be forgotten.
//!
//! `ID.answer` is a journal with the few records that a source may still ask for, and without the
//! room for more: some hundred bytes. It takes the place of `ID.journal` at once, and goes when the
//! source has settled the migration, or when an operator says so.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use pageferry_proto::id::MigrationId;

use super::{
    HEADER_BYTES, JOURNAL_SUFFIX, Journal, JournalError, Journals, Recovered, TEMPORARY_SUFFIX,
    frame, header, names_ending, sync_folder,
};

/// Most answers that are kept, 40 MB or so. A node that has as many takes in no new workload: to
/// forget one instead could run a workload twice.
pub const ANSWERS_MAX: usize = 100_000;

const ANSWER_SUFFIX: &str = ".answer";

impl Journals {
    /// Puts these records in the place of a whole journal; durable when it returns.
    pub fn bury(&self, migration: MigrationId, records: &[Vec<u8>]) -> Result<(), JournalError> {
        let path = self.answer_path(migration);
        let temporary = self.folder.join(format!("{migration}{TEMPORARY_SUFFIX}"));
        let whole = self.path(migration);
        let written = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .and_then(|file| write_records(&file, migration, records))
            .and_then(|()| fs::rename(&temporary, &path))
            .and_then(|()| sync_folder(&self.folder));
        written.map_err(|source| JournalError::Create { path, source })?;
        fs::remove_file(&whole).map_err(|source| JournalError::Remove {
            path: whole,
            source,
        })
    }

    /// Every migration of which an answer is kept. Of one that is there whole too, because a crash
    /// came in between, the whole one counts.
    pub fn answers(&self) -> Result<Vec<MigrationId>, JournalError> {
        let refuse = |source| JournalError::Folder {
            folder: self.folder.clone(),
            source,
        };
        let paths = names_ending(&self.folder, ANSWER_SUFFIX).map_err(refuse)?;
        let mut answers = Vec::with_capacity(paths.len());
        for path in paths {
            let id = path
                .file_stem()
                .and_then(|stem| stem.to_str()?.parse().ok());
            let Some(id) = id else { continue };
            if self.path(id).exists() {
                fs::remove_file(&path).map_err(refuse)?;
            } else {
                answers.push(id);
            }
        }
        Ok(answers)
    }

    /// Opens what is kept of a migration.
    pub fn read_answer(&self, migration: MigrationId) -> Result<Recovered, JournalError> {
        Journal::open(self.answer_path(migration), migration)
    }

    /// Removes what is kept of a migration.
    pub fn remove_answer(&self, migration: MigrationId) -> Result<(), JournalError> {
        let path = self.answer_path(migration);
        // Not synced: one that comes back after a crash is kept for longer, and that is all.
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(JournalError::Remove { path, source })
            }
            _ => Ok(()),
        }
    }

    fn answer_path(&self, migration: MigrationId) -> PathBuf {
        debug_assert_ne!(ANSWER_SUFFIX, JOURNAL_SUFFIX);
        self.folder.join(format!("{migration}{ANSWER_SUFFIX}"))
    }
}

/// A header and records, durable.
fn write_records(file: &File, migration: MigrationId, records: &[Vec<u8>]) -> io::Result<()> {
    let mut bytes = vec![0; HEADER_BYTES];
    bytes.copy_from_slice(&header(migration));
    for record in records {
        let at = bytes.len() as u64;
        bytes.extend(frame(record, at));
    }
    file.write_all_at(&bytes, 0)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: MigrationId = MigrationId::new([7; 16]);

    fn buried() -> (tempfile::TempDir, Journals) {
        let folder = tempfile::tempdir().unwrap();
        let journals = Journals::open(&folder.path().join("journal")).unwrap();
        let mut journal = journals.create(ID).unwrap();
        journal.append(&[1; 3000]).unwrap();
        journals
            .bury(ID, &[b"kept".to_vec(), b"this".to_vec()])
            .unwrap();
        (folder, journals)
    }

    #[test]
    fn what_is_kept_takes_the_place_of_the_whole_journal() {
        let (_folder, journals) = buried();
        assert_eq!(journals.scan().unwrap().len(), 0);
        assert_eq!(journals.answers().unwrap(), [ID]);
        let kept = journals.read_answer(ID).unwrap();
        assert_eq!(kept.records, [b"kept", b"this"]);
        let length = fs::metadata(journals.answer_path(ID)).unwrap().len();
        assert!(length < 200, "{length}");
        journals.remove_answer(ID).unwrap();
        assert_eq!(journals.answers().unwrap(), []);
    }

    #[test]
    fn what_is_kept_can_be_added_to() {
        let (_folder, journals) = buried();
        let mut kept = journals.read_answer(ID).unwrap();
        kept.journal.append(b"settled").unwrap();
        let records = journals.read_answer(ID).unwrap().records;
        assert_eq!(records, [&b"kept"[..], b"this", b"settled"]);
    }

    #[test]
    fn of_a_journal_that_is_there_twice_the_whole_one_counts() {
        let (_folder, journals) = buried();
        journals.create(ID).unwrap();
        assert_eq!(journals.answers().unwrap(), []);
        assert_eq!(journals.scan().unwrap().len(), 1);
        assert!(!journals.answer_path(ID).exists());
    }
}
