//! What the drivers of both sides do with their machines' actions.

use std::time::Duration;

use super::attempt::images;
use super::course::Taken;
use super::lock::lock_taken;
use super::memory::Memory;
use super::node::{Attempt, Sending, SourceJob, SourceWorkload, Stream, TargetJob, TargetWorkload};
use super::oracle::Violation;
use super::world::{PAGE_DURATION, World, workload_gone};
use pageferry_proto::migration::absent::Absent;
use pageferry_proto::migration::handoff::Side;
use pageferry_proto::migration::ledger::Ledger;
use pageferry_proto::migration::policy::{FilesReport, RoundReport};
use pageferry_proto::migration::record::DriverState;
use pageferry_proto::migration::source::{FinalReport, RetryReport, SourceAction, SourceEvent};
use pageferry_proto::migration::target::{LET_GO_TRIES_MAX, TargetAction, TargetEvent};
use pageferry_proto::page::{PAGE_SIZE, PageCount};
use pageferry_proto::wire::code::{ErrorCode, Failure};
use pageferry_proto::wire::control::{Message, SourceMessage, TargetMessage};

impl World {
    pub(super) fn at_source(&mut self, event: SourceEvent) {
        let now = self.now;
        if let Some(machine) = &mut self.source.machine {
            self.trace.push(format!("  source: {}", brief(&event)));
            machine.handle(now, event);
        }
        self.drain();
    }

    pub(super) fn at_target(&mut self, event: TargetEvent) {
        let now = self.now;
        if let Some(machine) = &mut self.target.machine {
            self.trace.push(format!("  target: {}", brief(&event)));
            machine.handle(now, event);
        }
        self.drain();
    }

    pub(super) fn drain(&mut self) {
        if let Some(machine) = &mut self.source.machine {
            self.source
                .actions
                .extend(std::iter::from_fn(|| machine.poll_action()));
        }
        if let Some(machine) = &mut self.target.machine {
            self.target
                .actions
                .extend(std::iter::from_fn(|| machine.poll_action()));
        }
    }

    pub(super) fn begin_at_source(&mut self) -> Result<(), Violation> {
        let Some(action) = self.source.actions.pop_front() else {
            return Ok(());
        };
        self.trace
            .push(format!("  source begins {}", brief(&action)));
        self.source_begins(&action)?;
        let job = match action {
            SourceAction::CompareSmaps => SourceJob::CompareSmaps,
            SourceAction::Connect => SourceJob::Connect,
            SourceAction::Drain => return self.drain_at_source(),
            SourceAction::Finish {
                generation,
                round,
                absent,
            } => {
                let memory = self.source.memory.memory.clone();
                self.frozen = Some((memory, images(generation)));
                SourceJob::Send(self.final_sending(round, generation, absent))
            }
            SourceAction::Freeze { round: _ } => {
                if self.source.workload == SourceWorkload::Running {
                    self.source.workload = SourceWorkload::Frozen;
                    self.source.frozen_at = Some(self.now);
                }
                SourceJob::Freeze
            }
            SourceAction::Journal(ref record) => {
                self.check_aborted(&record.entry)?;
                self.check_lost(Side::Source, record)?;
                let place = self.source.journal.write(record);
                SourceJob::Journal { action, place }
            }
            SourceAction::Release => {
                self.check_release()?;
                self.source.workload = SourceWorkload::Gone;
                SourceJob::Release
            }
            SourceAction::Report(status) => return self.check_report(0, status.generation),
            SourceAction::Send(message) => {
                self.check_said_by_source(&message)?;
                self.go_said |= matches!(message, SourceMessage::Go { .. });
                if self.link.up {
                    let bytes = Message::from(message).encode().expect("a small message");
                    self.link.to_target.push_back(bytes);
                }
                return Ok(());
            }
            SourceAction::SendRound {
                round,
                folders: _,
                pages,
            } => SourceJob::Send(self.sending(round, pages)),
            SourceAction::Thaw { untrack } => self.thaw_at_source(untrack)?,
            SourceAction::Track => {
                self.source.memory.restart();
                SourceJob::Track
            }
            SourceAction::Unlock => {
                self.unlock_at_source()?;
                SourceJob::Unlock
            }
        };
        let undone = matches!(
            job,
            SourceJob::CompareSmaps | SourceJob::Freeze | SourceJob::Send(_) | SourceJob::Track
        );
        let hangs = undone && std::mem::take(&mut self.source.hang_next);
        let job = if hangs { SourceJob::Hung } else { job };
        self.source.jobs.push(job);
        Ok(())
    }

    /// What a thaw ends may still report that it failed.
    pub(super) fn undo_at_source(&mut self) {
        for job in &mut self.source.jobs {
            match job {
                SourceJob::CompareSmaps
                | SourceJob::Freeze
                | SourceJob::Hung
                | SourceJob::Send(_)
                | SourceJob::Track => {
                    *job = SourceJob::Late(SourceEvent::Failure(injected()));
                }
                SourceJob::Connect
                | SourceJob::Fetch(_)
                | SourceJob::Journal { .. }
                | SourceJob::Late(_)
                | SourceJob::Release
                | SourceJob::Thaw { .. }
                | SourceJob::Unlock => {}
            }
        }
    }

    pub(super) fn advance_at_source(&mut self, place: usize) {
        let job = self.source.jobs.remove(place);
        let failed = std::mem::take(&mut self.source.fail_next);
        let outcome = |event| {
            if failed {
                SourceEvent::Failure(injected())
            } else {
                event
            }
        };
        let event = match job {
            SourceJob::CompareSmaps => outcome(SourceEvent::SmapsEqual),
            SourceJob::Connect => return self.connect(failed),
            SourceJob::Fetch(fetch) => return self.answer_fetch(fetch, failed),
            SourceJob::Freeze if self.source.gives_up() => retry(0, PageCount::ZERO),
            SourceJob::Freeze => outcome(SourceEvent::Frozen),
            SourceJob::Journal {
                action: SourceAction::Journal(record),
                place,
            } => {
                if failed {
                    SourceEvent::JournalFailed(record)
                } else {
                    self.source.journal.sync(place);
                    SourceEvent::Journalled(record)
                }
            }
            SourceJob::Hung | SourceJob::Journal { .. } => return,
            SourceJob::Late(event) => event,
            SourceJob::Release => outcome(SourceEvent::Released),
            SourceJob::Send(_) if failed => SourceEvent::Failure(injected()),
            SourceJob::Send(sending) => return self.send_on(sending, place),
            SourceJob::Thaw { untrack } => {
                self.source.untracked |= untrack && !failed;
                let lost = workload_gone();
                outcome(if self.source.back_in_part {
                    SourceEvent::ThawedInPart { untrack, lost }
                } else {
                    SourceEvent::Thawed { untrack }
                })
            }
            SourceJob::Track => outcome(SourceEvent::TrackingReady {
                memory: self.source.memory.memory.pages(),
            }),
            SourceJob::Unlock if failed && self.copy_is_maimed() => {
                self.source.knows_maimed = true;
                SourceEvent::Failure(workload_gone())
            }
            SourceJob::Unlock => outcome(SourceEvent::Unlocked),
        };
        self.at_source(event);
    }

    /// Reads and sends one parcel, after the scan: what is written meanwhile is dirty again. After
    /// the parcels of the final round come the other streams of the attempt, which may be given up
    /// at any point before its end.
    fn send_on(&mut self, mut sending: Sending, place: usize) {
        if sending.last.is_some() && self.source.gives_up() {
            for (space, pages) in sending.parcels.iter().chain(&sending.absent) {
                self.source.memory.put_back(*space, pages);
            }
            return self.at_source(retry(sending.sent, PageCount(sending.pages)));
        }
        if let Some((space, set)) = sending.parcels.pop_front() {
            let pages = self.source.memory.memory.read(space, &set);
            sending.sent += 1;
            sending.pages += pages.len() as u64;
            self.put(Stream::Parcel {
                space,
                round: sending.round,
                pages,
            });
            self.source.jobs.insert(place, SourceJob::Send(sending));
            return;
        }
        let raw_bytes = sending.pages * PAGE_SIZE as u64;
        let Some(last) = &mut sending.last else {
            let pages = u32::try_from(sending.pages).expect("few pages");
            return self.at_source(SourceEvent::RoundSent(RoundReport {
                round: sending.round,
                parcels: sending.sent,
                pages_sent: PageCount(sending.pages),
                pages_dirtied_estimate: self.source.memory.dirty_pages(),
                raw_bytes,
                wire_bytes: raw_bytes / 2,
                duration: PAGE_DURATION * pages.max(1),
                eager_bytes: 0,
                anew: false,
                files: FilesReport::default(),
            }));
        };
        if let Some(stream) = last.unsent.pop_front() {
            self.put(stream);
            self.source.jobs.insert(place, SourceJob::Send(sending));
            return;
        }
        let report = FinalReport {
            parcels: sending.sent,
            pages: PageCount(sending.pages),
            live_sets: last.live_sets,
            images: last.images,
            digests: last.digests,
            locks: u32::try_from(self.locks.len()).expect("few locks"),
            files: 0,
            absent_sets: u32::try_from(sending.absent.len()).expect("few spaces"),
            absent_pages: sending.absent.iter().map(|(_, pages)| pages.len()).sum(),
            raw_bytes,
            wire_bytes: raw_bytes / 2,
        };
        self.at_source(SourceEvent::Finished(report));
    }

    pub(super) fn put(&mut self, stream: Stream) {
        if self.link.up {
            self.streams.push(stream);
        }
    }

    fn connect(&mut self, failed: bool) {
        if failed {
            return self.at_source(SourceEvent::PeerRefused(injected()));
        }
        if self.target.machine.is_none() {
            return self.at_source(SourceEvent::PeerLost);
        }
        if std::mem::replace(&mut self.link.target_thinks, true) {
            self.forget_asked();
            self.at_target(TargetEvent::PeerLost);
        }
        self.break_link();
        self.link.up = true;
        self.link.source_thinks = true;
        self.at_target(TargetEvent::PeerConnected);
        self.at_source(SourceEvent::PeerConnected);
    }

    pub(super) fn begin_at_target(&mut self) -> Result<(), Violation> {
        let Some(action) = self.target.actions.pop_front() else {
            return Ok(());
        };
        self.trace
            .push(format!("  target begins {}", brief(&action)));
        let job = match action {
            TargetAction::Abandon => {
                self.abandon()?;
                TargetJob::Abandon
            }
            TargetAction::AwaitFinal(last) => {
                self.target_hears_final(last.generation);
                let ended = self
                    .target
                    .ledger
                    .as_mut()
                    .map(|ledger| ledger.final_end(last));
                self.enter(ended.unwrap_or(Ok(())));
                return Ok(());
            }
            TargetAction::AwaitRound(end) => {
                let ended = self
                    .target
                    .ledger
                    .as_mut()
                    .map(|ledger| ledger.round_end(end));
                self.enter(ended.unwrap_or(Ok(())));
                return Ok(());
            }
            TargetAction::Discard => {
                self.check_discard()?;
                self.undo_at_target();
                TargetJob::Discard
            }
            TargetAction::Journal(ref record) => {
                self.check_over(record)?;
                self.check_lost(Side::Target, record)?;
                let place = self.target.journal.write(record);
                TargetJob::Journal { action, place }
            }
            TargetAction::LetGo { generation: _ } => {
                self.let_go()?;
                TargetJob::LetGo
            }
            TargetAction::Lock => TargetJob::Lock {
                has_lock: self.lock_at_target(),
            },
            TargetAction::Prepare(_) => {
                self.target.ledger = Some(Ledger::new());
                self.target.taken = Taken::default();
                self.target.store = Memory::default();
                self.target.attempt = Attempt::default();
                TargetJob::Prepare
            }
            TargetAction::Report(status) => return self.check_report(1, status.generation),
            TargetAction::Restore { generation: _ } => TargetJob::Restore,
            TargetAction::Send(message) => return self.target_sends(message),
        };
        let undone = matches!(job, TargetJob::Prepare | TargetJob::Restore);
        let hangs = undone && std::mem::take(&mut self.target.hang_next);
        let job = if hangs { TargetJob::Hung } else { job };
        self.target.jobs.push(job);
        Ok(())
    }

    fn target_sends(&mut self, mut message: TargetMessage) -> Result<(), Violation> {
        if let TargetMessage::Accepted { drains, .. } = &mut message {
            *drains = self.takes_missing;
        }
        self.check_said_by_target(&message)?;
        if self.link.up {
            let bytes = Message::from(message).encode().expect("a small message");
            self.link.to_source.push_back(bytes);
        }
        Ok(())
    }

    fn let_go(&mut self) -> Result<(), Violation> {
        let may_fail = self.target.let_go_failures + 1 < LET_GO_TRIES_MAX;
        if self.target.workload == TargetWorkload::Held && !(self.target.fail_next && may_fail) {
            self.check_let_go()?;
            self.target.workload = TargetWorkload::Running;
            self.starts += 1;
        }
        Ok(())
    }

    /// What a discard ends may still report that it failed.
    fn undo_at_target(&mut self) {
        self.target.ledger = None;
        self.target.store = Memory::default();
        self.target.attempt = Attempt::default();
        self.target.absent = Absent::default();
        match self.target.workload {
            TargetWorkload::Held | TargetWorkload::Dropped => {
                self.target.workload = TargetWorkload::Nothing;
                self.release_locks(Side::Target);
            }
            TargetWorkload::Nothing
            | TargetWorkload::Running
            | TargetWorkload::Lost
            | TargetWorkload::Ended => {}
        }
        for job in &mut self.target.jobs {
            match job {
                TargetJob::Hung
                | TargetJob::Prepare
                | TargetJob::Restore
                | TargetJob::Stored(_) => {
                    *job = TargetJob::Late(TargetEvent::Failure(injected()));
                }
                TargetJob::Abandon
                | TargetJob::Discard
                | TargetJob::Fill
                | TargetJob::Journal { .. }
                | TargetJob::Late(_)
                | TargetJob::LetGo
                | TargetJob::Lock { .. } => {}
            }
        }
    }

    pub(super) fn advance_at_target(&mut self, place: usize) {
        let job = self.target.jobs.remove(place);
        let failed = std::mem::take(&mut self.target.fail_next);
        let outcome = |event| {
            if failed {
                TargetEvent::Failure(injected())
            } else {
                event
            }
        };
        let state = || DriverState::new(b"target".to_vec()).expect("six bytes");
        let event = match job {
            TargetJob::Abandon => outcome(TargetEvent::Abandoned),
            TargetJob::Discard if failed => TargetEvent::DiscardFailed(injected()),
            TargetJob::Discard => TargetEvent::Discarded,
            TargetJob::Fill => return self.filled(),
            TargetJob::Journal {
                action: TargetAction::Journal(record),
                place,
            } => {
                if failed {
                    TargetEvent::JournalFailed(record)
                } else {
                    if !self.spoils_record(&record.entry) {
                        self.target.journal.sync(place);
                    }
                    TargetEvent::Journalled(record)
                }
            }
            TargetJob::Hung | TargetJob::Journal { .. } => return,
            TargetJob::Late(event) | TargetJob::Stored(event) => event,
            TargetJob::LetGo if self.target.workload == TargetWorkload::Dropped => {
                TargetEvent::NeverRan(workload_gone())
            }
            // Of another boot: nothing is left, and nothing says whether it ran.
            TargetJob::LetGo if self.target.workload == TargetWorkload::Lost => {
                TargetEvent::Lost(workload_gone())
            }
            TargetJob::LetGo => {
                let may_fail = self.target.let_go_failures + 1 < LET_GO_TRIES_MAX;
                if self.target.workload != TargetWorkload::Running || (failed && may_fail) {
                    self.target.let_go_failures += 1;
                    TargetEvent::Failure(injected())
                } else {
                    self.target.jobs.push(TargetJob::Fill);
                    TargetEvent::Resumed
                }
            }
            TargetJob::Lock { has_lock } => match self.target.workload {
                TargetWorkload::Held if has_lock => outcome(TargetEvent::Locked),
                TargetWorkload::Held => TargetEvent::NotLocked(lock_taken()),
                TargetWorkload::Nothing
                | TargetWorkload::Dropped
                | TargetWorkload::Running
                | TargetWorkload::Lost
                | TargetWorkload::Ended => TargetEvent::Failure(workload_gone()),
            },
            TargetJob::Prepare => outcome(TargetEvent::Prepared { state: state() }),
            TargetJob::Restore if failed => TargetEvent::Failure(injected()),
            TargetJob::Restore => {
                let images = self.target.attempt.images.clone();
                self.target.restored = (self.target.store.clone(), images);
                self.target.workload = TargetWorkload::Held;
                TargetEvent::Restored { state: state() }
            }
        };
        self.at_target(event);
    }
}

pub(super) fn retry(parcels: u32, pages: PageCount) -> SourceEvent {
    SourceEvent::Retry(RetryReport {
        parcels,
        pages,
        raw_bytes: pages.bytes(),
        wire_bytes: 0,
        pause: PAUSE * (parcels % 2),
        reason: injected(),
    })
}

fn injected() -> Failure {
    Failure::new(ErrorCode::Internal, "injected")
}

/// The first words of what a value says of itself.
fn brief(value: &impl std::fmt::Debug) -> String {
    format!("{value:?}").chars().take(BRIEF_CHARS).collect()
}

/// Most characters of an event or action in a trace.
const BRIEF_CHARS: usize = 90;

/// How long the simulated workload runs after some of the freezes that were given up. While it
/// does, all that is in flight arrives, so that nothing would ever be late.
const PAUSE: Duration = Duration::from_millis(25);
