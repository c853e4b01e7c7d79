//! What is left of journals that are too old to be kept whole, and may not be forgotten.
//!
//! `ID.answer` is the journal of a target with the few records that its source may still ask for,
//! and goes when the source has settled the migration, or when an operator says so. `ID.outcome` is
//! that of a source, for a call that is repeated, and goes when there are many younger ones. Both
//! are without the room for more: some hundred bytes, which take the place of `ID.journal` at once.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use pageferry_proto::id::MigrationId;

use super::{
    HEADER_BYTES, Journal, JournalError, Journals, Recovered, TEMPORARY_SUFFIX, frame, header,
    names_ending, sync_folder,
};

/// Most answers that are kept, 40 MB or so. A node that has as many takes in no new workload: to
/// forget one instead could run a workload twice.
pub const ANSWERS_MAX: usize = 100_000;

/// Most outcomes that are kept, 40 MB or so. Whoever repeats a call does so within that many.
pub const OUTCOMES_MAX: usize = 10_000;

/// What is kept of a migration in the place of its journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remains {
    /// Of a target, for its source.
    Answer,
    /// Of a source, for whoever asked for it.
    Outcome,
}

impl Remains {
    const fn suffix(self) -> &'static str {
        match self {
            Self::Answer => ".answer",
            Self::Outcome => ".outcome",
        }
    }
}

impl Journals {
    /// Puts these records in the place of a whole journal; durable when it returns.
    pub fn bury(
        &self,
        what: Remains,
        migration: MigrationId,
        records: &[Vec<u8>],
    ) -> Result<(), JournalError> {
        let path = self.kept_path(what, migration);
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

    /// Every migration of which this is kept, the oldest first. Of one that is there whole too,
    /// because a crash came in between, the whole one counts.
    pub fn kept(&self, what: Remains) -> Result<Vec<MigrationId>, JournalError> {
        let refuse = |source| JournalError::Folder {
            folder: self.folder.clone(),
            source,
        };
        let paths = names_ending(&self.folder, what.suffix()).map_err(refuse)?;
        let mut kept = Vec::with_capacity(paths.len());
        for path in paths {
            let id = path
                .file_stem()
                .and_then(|stem| stem.to_str()?.parse().ok());
            let Some(id) = id else { continue };
            if self.path(id).exists() {
                fs::remove_file(&path).map_err(refuse)?;
            } else {
                let written = fs::metadata(&path).and_then(|metadata| metadata.modified());
                kept.push((written.map_err(refuse)?, id));
            }
        }
        kept.sort_unstable();
        Ok(kept.into_iter().map(|(_, id)| id).collect())
    }

    /// Opens what is kept of a migration.
    pub fn read_kept(
        &self,
        what: Remains,
        migration: MigrationId,
    ) -> Result<Recovered, JournalError> {
        Journal::open(self.kept_path(what, migration), migration)
    }

    /// Removes what is kept of a migration.
    pub fn remove_kept(&self, what: Remains, migration: MigrationId) -> Result<(), JournalError> {
        let path = self.kept_path(what, migration);
        // Not synced: one that comes back after a crash is kept for longer, and that is all.
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(JournalError::Remove { path, source })
            }
            _ => Ok(()),
        }
    }

    fn kept_path(&self, what: Remains, migration: MigrationId) -> PathBuf {
        self.folder.join(format!("{migration}{}", what.suffix()))
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
            .bury(Remains::Answer, ID, &[b"kept".to_vec(), b"this".to_vec()])
            .unwrap();
        (folder, journals)
    }

    #[test]
    fn what_is_kept_takes_the_place_of_the_whole_journal() {
        let (_folder, journals) = buried();
        assert_eq!(journals.scan().unwrap().len(), 0);
        assert_eq!(journals.kept(Remains::Answer).unwrap(), [ID]);
        let kept = journals.read_kept(Remains::Answer, ID).unwrap();
        assert_eq!(kept.records, [b"kept", b"this"]);
        let length = fs::metadata(journals.kept_path(Remains::Answer, ID))
            .unwrap()
            .len();
        assert!(length < 200, "{length}");
        journals.remove_kept(Remains::Answer, ID).unwrap();
        assert_eq!(journals.kept(Remains::Answer).unwrap(), []);
    }

    #[test]
    fn outcomes_are_kept_beside_answers_and_listed_by_age() {
        let (_folder, journals) = buried();
        for (number, age) in [(1, 10), (2, 30), (3, 20)] {
            let id = MigrationId::new([number; 16]);
            journals.create(id).unwrap();
            journals
                .bury(Remains::Outcome, id, &[b"moved".to_vec()])
                .unwrap();
            let path = journals.kept_path(Remains::Outcome, id);
            let written = std::time::SystemTime::now() - std::time::Duration::from_secs(age);
            let file = File::options().write(true).open(path).unwrap();
            file.set_modified(written).unwrap();
        }
        let oldest_first = [2, 3, 1].map(|number| MigrationId::new([number; 16]));
        assert_eq!(journals.kept(Remains::Outcome).unwrap(), oldest_first);
        assert_eq!(journals.kept(Remains::Answer).unwrap(), [ID]);
        let outcome = journals.read_kept(Remains::Outcome, oldest_first[0]);
        assert_eq!(outcome.unwrap().records, [b"moved"]);
    }

    #[test]
    fn what_is_kept_can_be_added_to() {
        let (_folder, journals) = buried();
        let mut kept = journals.read_kept(Remains::Answer, ID).unwrap();
        kept.journal.append(b"settled").unwrap();
        let records = journals.read_kept(Remains::Answer, ID).unwrap().records;
        assert_eq!(records, [&b"kept"[..], b"this", b"settled"]);
    }

    #[test]
    fn of_a_journal_that_is_there_twice_the_whole_one_counts() {
        let (_folder, journals) = buried();
        journals.create(ID).unwrap();
        assert_eq!(journals.kept(Remains::Answer).unwrap(), []);
        assert_eq!(journals.scan().unwrap().len(), 1);
        assert!(!journals.kept_path(Remains::Answer, ID).exists());
    }
}
