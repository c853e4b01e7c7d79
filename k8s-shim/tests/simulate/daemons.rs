//! The two daemons of a move, as far as agents and kubelets see them: what `proto` guarantees is
//! taken for granted here.

use pageferry_k8s::agent::orders::{Call, Known};
use pageferry_k8s::plan::{Report, Side, Why};

/// A daemon's own view of a move, all of it durable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum SourcePhase {
    #[default]
    None,
    /// It said no before it began.
    Refused,
    Copying,
    Holding,
    Frozen,
    Committed,
    Aborted,
    Done,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum TargetPhase {
    #[default]
    None,
    Receiving,
    /// The new pod's container asks to be created, and waits.
    Waiting,
    /// Restored and held.
    Ready,
    Running,
    Aborted,
    Done,
    /// It ran, and could not be kept.
    Lost,
}

#[derive(Clone, Debug, Default)]
pub struct Daemons {
    pub source: SourcePhase,
    pub target: TargetPhase,
    pub proceed: bool,
    pub expected: Option<String>,
    /// Nodes that are down for good.
    pub source_down: bool,
    pub target_down: bool,
    /// They do not hear of each other, and both run.
    pub cut: bool,
    /// How often a workload was let go at the target.
    pub restores: u32,
    /// The source froze though nobody waited at the target.
    pub froze_for_nothing: bool,
}

impl Daemons {
    pub fn is_down(&self, side: Side) -> bool {
        match side {
            Side::Source => self.source_down,
            Side::Target => self.target_down,
        }
    }

    /// Carries out a call. Errors are the daemon's, and change nothing.
    pub fn call(&mut self, side: Side, call: &Call, refuse: bool) {
        match (side, call) {
            (Side::Source, Call::Migrate) if self.source == SourcePhase::None => {
                self.source = match refuse {
                    true => SourcePhase::Refused,
                    false => SourcePhase::Copying,
                };
            }
            (Side::Source, Call::Proceed) => self.proceed = true,
            (Side::Source, Call::Abort) if self.source < SourcePhase::Committed => {
                self.source = SourcePhase::Aborted;
            }
            (Side::Target, Call::Abort) if self.target < TargetPhase::Running => {
                self.target = TargetPhase::Aborted;
            }
            (Side::Target, Call::Expect { pod_uid }) => {
                self.expected.get_or_insert_with(|| pod_uid.clone());
            }
            (Side::Source, Call::Resolve) if self.source == SourcePhase::Committed => {
                self.source = SourcePhase::Aborted;
            }
            (Side::Target, Call::Resolve) => match self.target {
                // It believes who says so.
                TargetPhase::Ready => self.run(),
                TargetPhase::Receiving | TargetPhase::Waiting => {
                    self.target = TargetPhase::Aborted;
                }
                _ => {}
            },
            _ => {}
        }
    }

    fn run(&mut self) {
        self.target = TargetPhase::Running;
        self.restores += 1;
    }

    /// One of the things that the daemons do by themselves, if it is possible now. The pod waits if
    /// the new pod's container is asking to be created.
    pub fn step(&mut self, choice: u64, waiting_pod: Option<&str>) {
        use {SourcePhase as S, TargetPhase as T};
        let both = !self.source_down && !self.target_down && !self.cut;
        match choice {
            0 if both && self.source == S::Copying && self.target == T::None => {
                self.target = T::Receiving;
            }
            1 if both && self.source == S::Copying && self.target != T::None => {
                self.source = S::Holding;
            }
            2 if !self.target_down
                && self.target == T::Receiving
                && self.expected.is_some()
                && self.expected.as_deref() == waiting_pod =>
            {
                self.target = T::Waiting;
            }
            3 if !self.source_down && self.proceed && self.source == S::Holding => {
                self.source = S::Frozen;
                self.froze_for_nothing |= self.target < T::Waiting;
            }
            4 if both && self.source == S::Frozen && self.target == T::Waiting => {
                self.target = T::Ready;
            }
            5 if both && self.source == S::Frozen && self.target == T::Ready => {
                self.source = S::Committed;
            }
            6 if both && self.source == S::Committed && self.target == T::Ready => self.run(),
            7 if both && self.source == S::Committed && T::Running <= self.target => {
                if self.target != T::Aborted {
                    self.source = S::Done;
                } else {
                    self.source = S::Aborted;
                }
            }
            // All of its memory is there.
            8 if !self.target_down && self.target == T::Running => {
                self.target = T::Done;
            }
            // Each side hears that the other has given up.
            9 if both
                && self.target == T::Aborted
                && (S::Copying..S::Committed).contains(&self.source) =>
            {
                self.source = S::Aborted;
            }
            10 if both
                && self.source == S::Aborted
                && (T::Receiving..T::Running).contains(&self.target) =>
            {
                self.target = T::Aborted;
            }
            // It waits for the target, and gives up: nothing is committed.
            11 if !self.source_down
                && self.source == S::Frozen
                && (self.target == T::Aborted || self.target_down || self.cut) =>
            {
                self.source = S::Aborted;
            }
            _ => {}
        }
    }

    /// What goes wrong by itself: a link, a round, a restore.
    pub fn fail(&mut self, side: Side) {
        match side {
            Side::Source
                if (SourcePhase::Copying..SourcePhase::Committed).contains(&self.source) =>
            {
                self.source = SourcePhase::Aborted;
            }
            Side::Target
                if (TargetPhase::Receiving..TargetPhase::Running).contains(&self.target) =>
            {
                self.target = TargetPhase::Aborted;
            }
            Side::Target if self.target == TargetPhase::Running => {
                self.target = TargetPhase::Lost;
            }
            _ => {}
        }
    }

    pub fn known(&self, side: Side) -> Option<Known> {
        match side {
            Side::Source => (self.source != SourcePhase::None).then(|| Known {
                is_final: self.source >= SourcePhase::Aborted,
                copying: matches!(self.source, SourcePhase::Copying | SourcePhase::Holding),
                receiving: false,
                fence_wanted: self.source == SourcePhase::Committed
                    && (self.target_down || self.cut),
                expected: None,
                refused: self.source == SourcePhase::Refused,
            }),
            Side::Target => (self.target != TargetPhase::None).then(|| Known {
                is_final: self.target >= TargetPhase::Aborted,
                copying: false,
                receiving: self.target == TargetPhase::Receiving,
                fence_wanted: self.target < TargetPhase::Running && (self.source_down || self.cut),
                expected: self.expected.clone(),
                refused: false,
            }),
        }
    }

    /// What an agent says of it.
    pub fn report(&self, side: Side, now: i64, aborting: bool) -> Report {
        let Some(known) = self.known(side) else {
            return Report {
                at: now,
                phase: "unknown".to_owned(),
                is_final: aborting,
                ..Report::default()
            };
        };
        let phase = match side {
            Side::Source => format!("{:?}", self.source),
            Side::Target => format!("{:?}", self.target),
        };
        let moved = match side {
            Side::Source => self.source == SourcePhase::Done,
            Side::Target => self.target == TargetPhase::Done,
        };
        let is_final = known.is_final || known.refused;
        Report {
            at: now,
            phase: phase.to_lowercase(),
            is_final,
            moved,
            holding: side == Side::Source && self.source == SourcePhase::Holding,
            waiting: side == Side::Target && self.target == TargetPhase::Waiting,
            pod_uid: known.expected.clone(),
            fence_wanted: known.fence_wanted,
            failure: (is_final && !moved).then(|| Why::new("Daemon", "it went wrong")),
            ..Report::default()
        }
    }
}
