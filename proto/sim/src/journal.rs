//! A disk that keeps what was fsynced, and may keep what was not, until the driver removes it.

use pageferry_proto::migration::record::Record;

/// The records of one node's journal, in the order they were written.
#[derive(Clone, Debug, Default)]
pub(super) struct Journal {
    lines: Vec<Line>,
    /// What was durable once and has been removed: no restart reads it, but the oracles do.
    removed: Vec<Record>,
}

#[derive(Clone, Debug)]
struct Line {
    bytes: Vec<u8>,
    durable: bool,
}

impl Journal {
    /// Writes a record; it is not durable yet. Answers its place.
    pub(super) fn write(&mut self, record: &Record) -> usize {
        self.lines.push(Line {
            bytes: record.to_bytes(),
            durable: false,
        });
        self.lines.len() - 1
    }

    pub(super) fn sync(&mut self, place: usize) {
        self.lines[place].durable = true;
    }

    /// The daemon ends: of the records that are not durable, those whose bit is set are found
    /// again, and are still not durable.
    pub(super) fn crash(&mut self, found: u8) {
        let mut unsynced = 0;
        self.lines.retain(|line| {
            if line.durable {
                return true;
            }
            let keep = found & (1 << (unsynced % u8::BITS)) != 0;
            unsynced += 1;
            keep
        });
    }

    /// Puts `kept`, durable, in the place of all there is.
    pub(super) fn replace(&mut self, kept: &[Record]) {
        self.removed = self.durable();
        self.lines = Vec::new();
        for record in kept {
            let place = self.write(record);
            self.sync(place);
        }
    }

    /// What a restart reads.
    pub(super) fn records(&self) -> Vec<Record> {
        let read = |line: &Line| Record::from_bytes(&line.bytes).expect("written by to_bytes");
        self.lines.iter().map(read).collect()
    }

    /// What is certain to survive, and what was until it was removed.
    pub(super) fn durable(&self) -> Vec<Record> {
        let durable = self.lines.iter().filter(|line| line.durable);
        let durable =
            durable.map(|line| Record::from_bytes(&line.bytes).expect("written by to_bytes"));
        self.removed.iter().cloned().chain(durable).collect()
    }
}
