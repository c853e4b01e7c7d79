//! Writing the journal beside the driver: in order, durable, never holding up the loop.

use pageferry_proto::migration::record::Record;
use tokio::sync::mpsc;

use super::journal::Journal;

/// Records that may wait; a machine writes one and waits for it.
const RECORDS_MAX: usize = 8;

/// The journal of one migration, written by a thread of its own.
#[derive(Debug)]
pub struct Log {
    records: mpsc::Sender<Record>,
}

impl Log {
    /// Starts the thread; `written` is called on it after each record, in order.
    ///
    /// The thread ends with the `Log`.
    pub fn start(
        mut journal: Journal,
        written: impl Fn(Record, Result<(), ()>) + Send + 'static,
    ) -> Self {
        let (records, mut queue) = mpsc::channel::<Record>(RECORDS_MAX);
        tokio::task::spawn_blocking(move || {
            while let Some(record) = queue.blocking_recv() {
                let result = journal.append(&record.to_bytes());
                if let Err(error) = &result {
                    tracing::error!(migration = %record.migration, "journal: {error}");
                }
                written(record, result.map_err(drop));
            }
        });
        Self { records }
    }

    /// Hands a record over.
    pub async fn write(&self, record: Record) {
        // The thread ends only after this sender is gone.
        drop(self.records.send(record).await);
    }
}
