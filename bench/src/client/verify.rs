//! Reading everything back: is every acknowledged write there, and is the rest untouched?

use anyhow::{Context, Result};

use super::load::LoadReport;
use super::resp::{Connection, Reply};

/// What reading the whole data set found.
#[derive(Debug, Default)]
pub struct Verdict {
    /// Acknowledged writes that are gone: versions by which values are older than acknowledged.
    pub lost_acks: u64,
    /// Keys no client writes have the very contents they were populated with.
    pub digest_equal: bool,
    /// Values that were never sent, with their key: at most [`FINDINGS_MAX`].
    pub findings: Vec<String>,
    pub keys_read: u32,
}

/// Reads and checks every key.
///
/// # Errors
/// When Redis does not answer: what it holds is then unknown.
pub fn verify(connection: &mut Connection, report: &LoadReport) -> Result<Verdict> {
    let mut verdict = Verdict {
        digest_equal: true,
        ..Verdict::default()
    };
    let dataset = report.dataset;
    let mut number = 0;
    let mut expected = Vec::new();
    while number < dataset.keys {
        let last = dataset.keys.min(number + BATCH);
        for key in number..last {
            connection.queue(&[b"GET", &dataset.key(key)]);
        }
        connection.flush().context("reading back")?;
        for key in number..last {
            let reply = connection.receive().context("reading back")?;
            let Reply::Bulk(value) = reply else {
                verdict.note_wrong(
                    key,
                    dataset.hot_keys,
                    format!("key {key} is gone: {reply:?}"),
                );
                continue;
            };
            judge(&mut verdict, report, key, &value, &mut expected);
        }
        number = last;
    }
    verdict.keys_read = dataset.keys;
    Ok(verdict)
}

fn judge(verdict: &mut Verdict, report: &LoadReport, key: u32, value: &[u8], fill: &mut Vec<u8>) {
    let dataset = report.dataset;
    let hot = key < dataset.hot_keys;
    let (acknowledged, sent) = if hot { report.versions(key) } else { (0, 0) };
    let version = dataset_version(value);
    dataset.value(key, version, fill);
    if fill != value {
        verdict.note_wrong(
            key,
            dataset.hot_keys,
            format!("key {key} has a value never sent"),
        );
    } else if version > sent {
        let text = format!("key {key} has version {version}, but {sent} was the last sent");
        verdict.note_wrong(key, dataset.hot_keys, text);
    } else if version < acknowledged {
        verdict.lost_acks += u64::from(acknowledged - version);
        verdict.note(format!(
            "key {key} has version {version}, {acknowledged} was acknowledged"
        ));
    }
}

fn dataset_version(value: &[u8]) -> u32 {
    super::load::Dataset::version_in(value).unwrap_or(u32::MAX)
}

impl Verdict {
    fn note_wrong(&mut self, key: u32, hot_keys: u32, text: String) {
        if key >= hot_keys {
            self.digest_equal = false;
        }
        self.note(text);
    }

    fn note(&mut self, text: String) {
        if self.findings.len() < FINDINGS_MAX {
            self.findings.push(text);
        }
    }
}

/// Answers of one batch fit the connection's and the kernel's buffers.
const BATCH: u32 = 32;
/// Enough to see a pattern.
pub const FINDINGS_MAX: usize = 16;
