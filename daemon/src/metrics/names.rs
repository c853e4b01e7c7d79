//! What each metric is called, and what it is, in the words of the catalogue.
//!
//! Histograms have their unit in their name alone: a line of its own for that is not taken by every
//! parser.

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use super::Counted;

impl Counted {
    /// Gives every metric its name and its help.
    pub(super) fn register(&self, registry: &mut Registry) {
        self.register_moves(registry);
        self.register_memory(registry);
        self.register_levels(registry);
    }

    fn register_moves(&self, registry: &mut Registry) {
        registry.register(
            "migrations_ended",
            "Migrations that have ended at this node, by what came of them",
            self.ended.clone(),
        );
        registry.register(
            "migration_failures",
            "Migrations that have failed, by code",
            self.failures.clone(),
        );
        registry.register(
            "refusals",
            "Moves that were refused before they began, by code",
            self.refusals.clone(),
        );
        let seconds = |registry: &mut Registry, name: &str, help: &str, histogram: &Histogram| {
            registry.register(name, help, histogram.clone());
        };
        seconds(
            registry,
            "downtime_seconds",
            "How long workloads stood still that have left, by the source's clock",
            &self.downtime,
        );
        registry.register(
            "downtime_part_seconds",
            "The parts of that, in their order",
            self.parts.clone(),
        );
        seconds(
            registry,
            "blackout_seconds",
            "From the ports being closed here to the last word there: known where both nodes' \
             spans are on one clock",
            &self.blackout,
        );
        seconds(
            registry,
            "migration_seconds",
            "How long whole migrations took that have left",
            &self.elapsed,
        );
        registry.register("rounds", "Rounds that were begun", self.rounds.clone());
        registry.register(
            "freezes_given_up",
            "Freezes that were given up for another round",
            self.retries.clone(),
        );
        registry.register(
            "parked_frames",
            "Frames that came for frozen workloads: kept or lost here as a source, given to the \
             workload as a target",
            self.frames.clone(),
        );
    }

    fn register_memory(&self, registry: &mut Registry) {
        let bytes = |registry: &mut Registry, name: &str, help: &str, counter: &Counter| {
            registry.register_with_unit(name, help, Unit::Bytes, counter.clone());
        };
        bytes(
            registry,
            "sent",
            "Bytes of pages and files sent, before they were encoded",
            &self.sent_raw,
        );
        bytes(
            registry,
            "sent_wire",
            "Bytes sent on the wire, of all streams",
            &self.sent_wire,
        );
        bytes(
            registry,
            "received_wire",
            "Bytes received on the wire, of all streams",
            &self.received_wire,
        );
        registry.register(
            "sent_pages",
            "Pages sent, by how they travel",
            self.sent_pages.clone(),
        );
        registry.register(
            "received_pages",
            "Pages received, by how they travel",
            self.received_pages.clone(),
        );
        registry.register(
            "filled_pages",
            "Pages put into workloads that run: for a thread that waited, or ahead of that. \
             Counted when a fill has ended",
            self.filled_pages.clone(),
        );
        registry.register(
            "fill_seconds",
            "From a workload being let go to its last page",
            self.fill.clone(),
        );
        registry.register(
            "fault_seconds",
            "From a page fault being read to it being served. Counted when a fill has ended",
            self.faults.clone(),
        );
    }

    fn register_levels(&self, registry: &mut Registry) {
        registry.register_with_unit(
            "send_queue",
            "Bytes of parcels that wait for the network",
            Unit::Bytes,
            self.send_queue.clone(),
        );
        registry.register(
            "receiving_streams",
            "Data streams that are being taken in",
            self.receiving.clone(),
        );
        registry.register(
            "migrations",
            "Migrations under way, by their phase",
            self.migrations.clone(),
        );
        registry.register_with_unit(
            "promised",
            "Memory promised to incoming workloads",
            Unit::Bytes,
            self.promised.clone(),
        );
        registry.register_with_unit(
            "stored",
            "Memory that incoming workloads have in stores and images",
            Unit::Bytes,
            self.stored.clone(),
        );
        registry.register(
            "journals",
            "Migrations that are on disk: whole, or what is kept of them",
            self.journals.clone(),
        );
        registry.register_with_unit(
            "journal",
            "What they take on disk",
            Unit::Bytes,
            self.journal_bytes.clone(),
        );
    }
}
