//! A histogram of what somebody else has counted: the library's own takes one value at a time.

use std::fmt::Error;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::{EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;

/// Counts by edges. Cheap to clone; clones are of the same.
#[derive(Clone, Debug)]
pub(super) struct Buckets(Arc<Mutex<Counts>>);

#[derive(Debug)]
struct Counts {
    /// Each with how many are at most that, and more than the one before: in seconds.
    buckets: Vec<(f64, u64)>,
    sum: f64,
}

impl Buckets {
    /// With edges in microseconds; what is longer than all has a place too.
    pub(super) fn new(edges_us: &[u64]) -> Self {
        let edges = edges_us.iter().map(|edge| *edge as f64 / 1e6);
        let all = edges.chain([f64::INFINITY]);
        Self(Arc::new(Mutex::new(Counts {
            buckets: all.map(|edge| (edge, 0)).collect(),
            sum: 0.0,
        })))
    }

    /// So many more by each edge, and their sum. What has no edge here counts as longer than all.
    pub(super) fn add(&self, counts: &[u64], sum: Duration) {
        let mut own = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let last = own.buckets.len() - 1;
        for (index, count) in counts.iter().enumerate() {
            own.buckets[index.min(last)].1 += count;
        }
        own.sum += sum.as_secs_f64();
    }
}

impl EncodeMetric for Buckets {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), Error> {
        let own = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = own.buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(own.sum, count, &own.buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}
