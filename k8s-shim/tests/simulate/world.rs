//! All of them together, step by step.

use std::fmt::Write;

use pageferry_k8s::agent::orders::{self, Call, Orders};
use pageferry_k8s::plan::{Action, Broken, Decision, Observed, Side, Step, plan_broken};

use crate::cluster::{Api, NEW_NAME, Owner, Pod, SOURCE};
use crate::daemons::{Daemons, SourcePhase, TargetPhase};
use crate::random::Random;

#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub owned: bool,
    pub faults: bool,
    pub broken: Option<Broken>,
}

/// A process with a view that only moves on, unless the process is started again.
#[derive(Debug, Default)]
struct Process {
    seen: usize,
}

pub struct World {
    pub api: Api,
    pub daemons: Daemons,
    /// The new pod's container runs.
    pub new_alive: bool,
    pub new_restarted_before_end: bool,
    /// The owner was given the new pod while things went wrong.
    pub adopted_amid_faults: bool,
    /// The source's processes were killed while they were the workload.
    source_killed: bool,
    /// A kill waits for the thaw.
    kill_pending: bool,
    /// The workload is nowhere any more.
    pub lost: bool,
    /// A person or a dying node did what may cost the workload.
    pub meddled: bool,
    history: Vec<Api>,
    controllers: [Process; 2],
    agents: [Process; 2],
    owner: Process,
    random: Random,
    setup: Setup,
    fault_in: u64,
    now: i64,
    pace: i64,
    /// No new faults.
    calm: bool,
    log: String,
}

impl World {
    pub fn new(seed: u64, setup: Setup) -> Self {
        let api = Api::new(setup.owned);
        Self {
            history: vec![api.clone()],
            api,
            daemons: Daemons::default(),
            new_alive: false,
            new_restarted_before_end: false,
            adopted_amid_faults: false,
            source_killed: false,
            kill_pending: false,
            lost: false,
            meddled: false,
            controllers: Default::default(),
            agents: Default::default(),
            owner: Process::default(),
            random: Random::new(seed),
            setup,
            // Some cases have many faults, and some one or two.
            fault_in: [60, 200, 600, 2000][usize::try_from(seed % 4).unwrap_or_default()],
            now: 1000,
            pace: 1,
            calm: !setup.faults,
            log: String::new(),
        }
    }

    pub fn log(&self) -> &str {
        &self.log
    }

    pub fn run(&mut self) -> Result<String, String> {
        let wild = if self.setup.faults { 400 } else { 0 };
        for _ in 0..wild {
            self.step();
            self.check()?;
        }
        self.calm = true;
        self.daemons.cut = false;
        for step in 0..3000 {
            // What waits for a time-out gets there.
            self.pace = if step < 2000 { 1 } else { 10 };
            self.step();
            self.check()?;
            if self.api.record.step == Step::Ended && self.random.once_in(50) {
                break;
            }
        }
        // Whoever has something to tidy up has done so: nothing new comes by itself.
        for _ in 0..400 {
            self.step();
            self.check()?;
        }
        self.check_end()
    }

    pub fn source_alive(&self) -> bool {
        let frozen = matches!(
            self.daemons.source,
            SourcePhase::Frozen | SourcePhase::Committed | SourcePhase::Done
        );
        !frozen && !self.source_killed && !self.daemons.source_down
    }

    fn say(&mut self, text: &str) {
        let _ = writeln!(self.log, "{:>6} {text}", self.now);
    }

    fn step(&mut self) {
        if self.random.once_in(8) {
            self.now += self.pace;
        }
        match self.random.below(20) {
            0..=3 => self.controller(),
            4..=7 => self.agent(Side::Source),
            8..=11 => self.agent(Side::Target),
            12..=15 => self.daemon(),
            16 | 17 => self.kubelets(),
            18 => self.owner(),
            _ if !self.calm => self.fault(),
            _ => {}
        }
        self.follow_daemons();
        if self.history.last() != Some(&self.api) {
            self.history.push(self.api.clone());
        }
    }

    /// What a process sees: not older than what it saw, unless it is new.
    fn look(&mut self, seen: usize) -> usize {
        let newest = self.history.len() - 1;
        if self.calm || self.random.once_in(2) {
            return newest;
        }
        // Some caches are far behind.
        let longest = if self.random.once_in(6) { 40 } else { 6 };
        let lag = usize::try_from(self.random.below(longest)).unwrap_or_default();
        newest.saturating_sub(lag).max(seen)
    }

    fn controller(&mut self) {
        let which = usize::from(!self.calm && self.random.once_in(8));
        let seen = self.look(self.controllers[which].seen);
        self.controllers[which].seen = seen;
        let view = self.history[seen].clone();
        if view.gone {
            return;
        }
        let observed: Observed = view.observe(self.now, self.setup.owned);
        let decision: Decision = plan_broken(&observed, self.setup.broken);
        if let Some(record) = decision.record {
            // Compare-and-swap.
            if view.version == self.api.version && !self.fails() {
                self.say(&format!("record {:?} {:?}", record.step, record.why));
                self.api.record = record;
                self.api.version += 1;
            }
            return;
        }
        for action in decision.actions {
            if self.fails() {
                return;
            }
            self.say(&format!("controller {which}: {action:?}"));
            self.act(&action);
        }
    }

    /// A call that does not get through, or a process that ends right before it.
    fn fails(&mut self) -> bool {
        !self.calm && self.random.once_in(10)
    }

    fn act(&mut self, action: &Action) {
        match action {
            // One that is deleted takes no finalizer.
            Action::Hold => {
                self.api.held |= !self.api.gone && !self.api.deleting;
                self.api.version += 1;
            }
            Action::LetGo => {
                self.api.held = false;
                self.api.version += 1;
                self.api.gone = self.api.deleting;
            }
            Action::CreatePod { name, .. } => {
                if self.api.create(name, false, self.now)
                    && let Some(pod) = self.api.pods.values_mut().find(|pod| pod.name == *name)
                {
                    pod.held = true;
                }
            }
            Action::DeleteNew { uid, .. } => {
                if let Some(pod) = self.api.pods.get_mut(uid) {
                    pod.deleting = true;
                }
            }
            Action::Release { uid, .. } => self.pod(uid, |pod| pod.held = false),
            Action::SetRestored { uid, .. } => self.pod(uid, |pod| pod.restored = true),
            Action::MarkSource => self.pod(SOURCE, |pod| pod.marked = true),
            Action::Adopt { uid, .. } => {
                self.adopted_amid_faults |= !self.calm;
                self.pod(uid, |pod| pod.owned = true);
            }
            Action::DeleteSource => self.remove_source(),
            // No pod here is evicted.
            Action::EndEviction => {}
        }
    }

    fn pod(&mut self, uid: &str, change: impl FnOnce(&mut Pod)) {
        if let Some(pod) = self.api.pods.get_mut(uid) {
            change(pod);
        }
    }

    /// The object goes at once, and the kubelet kills.
    fn remove_source(&mut self) {
        if self.api.pods.remove(SOURCE).is_some() {
            self.kill_source();
        }
    }

    fn kill_source(&mut self) {
        match self.daemons.source {
            SourcePhase::Frozen | SourcePhase::Committed => self.kill_pending = true,
            SourcePhase::Done => {}
            _ => {
                self.source_killed = true;
                self.lost = true;
                self.daemons.fail(Side::Source);
            }
        }
    }

    fn agent(&mut self, side: Side) {
        if self.daemons.is_down(side) {
            return;
        }
        let index = usize::from(side == Side::Target);
        let seen = self.look(self.agents[index].seen);
        self.agents[index].seen = seen;
        let view = &self.history[seen];
        if view.gone {
            return;
        }
        let orders = Orders {
            step: view.record.step,
            proceed: view.record.proceed,
            fenced: view.record.fenced,
            new_uid: view.record.new_uid.clone(),
        };
        if orders.step == Step::Waiting {
            return;
        }
        let known = self.daemons.known(side);
        if let Some(call) = orders::next(side, &orders, known.as_ref()) {
            if self.fails() {
                return;
            }
            let refuse = call == Call::Migrate && !self.calm && self.random.once_in(30);
            self.say(&format!("agent {side:?}: {call:?}"));
            self.daemons.call(side, &call, refuse);
            self.follow_daemons();
        }
        let aborting = matches!(orders.step, Step::Aborting | Step::Ended);
        let mut report = self.daemons.report(side, self.now, aborting);
        let placing = matches!(orders.step, Step::Placing | Step::Moving);
        report.prepared = placing.then(|| NEW_NAME.to_owned());
        if self.fails() {
            return;
        }
        match side {
            Side::Source => self.api.source_report = Some(report),
            Side::Target => self.api.target_report = Some(report),
        }
        self.api.version += 1;
    }

    fn daemon(&mut self) {
        let waiting = self.api.new_pod();
        let waiting = waiting.filter(|pod| pod.bound && !pod.deleting && !pod.running);
        let waiting = waiting.map(|pod| pod.uid.clone());
        let before = (self.daemons.source, self.daemons.target);
        let choices = if self.calm { 11 } else { 12 };
        // When it is calm it gives up what hangs, and that takes it longer than all else.
        let first = match self.random.below(choices) {
            10 if self.random.once_in(10) => 11,
            choice => choice,
        };
        // Most often they do what they can: a move is to get to its end while there are faults.
        let tries = if self.random.once_in(4) { 1 } else { 11 };
        for index in 0..tries {
            let choice = if first == 11 {
                11
            } else {
                (first + index) % 11
            };
            self.daemons.step(choice, waiting.as_deref());
            let after = (self.daemons.source, self.daemons.target);
            if before != after {
                self.say(&format!("daemons {after:?}"));
                return;
            }
        }
    }

    /// Whatever the daemons did shows in processes.
    fn follow_daemons(&mut self) {
        if self.kill_pending && self.daemons.source == SourcePhase::Aborted {
            self.kill_pending = false;
            self.source_killed = true;
            self.lost = true;
        }
        let uid = self.daemons.expected.clone().unwrap_or_default();
        if self.daemons.target == TargetPhase::Lost {
            self.new_alive = false;
            self.pod(&uid, |pod| (pod.running, pod.ready) = (false, false));
            return;
        }
        let taken = matches!(
            self.daemons.target,
            TargetPhase::Running | TargetPhase::Done
        );
        if !taken || self.daemons.target_down {
            return;
        }
        if let Some(pod) = self.api.pods.get_mut(&uid)
            && !pod.running
            && !pod.deleting
        {
            pod.running = true;
            self.new_alive = true;
        }
    }

    fn kubelets(&mut self) {
        let gone = self.api.gone;
        // Whoever collects what has lost its owner.
        for pod in self.api.pods.values_mut() {
            pod.deleting |= pod.held && gone;
        }
        let frozen = !self.source_alive();
        if let Some(pod) = self.api.pods.get_mut(SOURCE)
            && frozen
            && self.random.once_in(3)
        {
            pod.ready = false;
        }
        if let Some(pod) = self.api.pods.get(SOURCE)
            && pod.deleting
        {
            self.remove_source();
        }
        if self.daemons.target_down {
            return;
        }
        let full = !self.calm && self.random.once_in(40);
        let Some(pod) = self.api.pods.values_mut().find(|pod| pod.name == NEW_NAME) else {
            return;
        };
        if pod.deleting {
            let uid = pod.uid.clone();
            self.api.pods.remove(&uid);
            if self.new_alive {
                self.new_alive = false;
                self.lost = true;
            }
            if self.daemons.expected.as_deref() == Some(&uid) {
                self.daemons.fail(Side::Target);
            }
            return;
        }
        if !pod.bound {
            pod.unschedulable = full;
            pod.bound = !full;
        }
        if pod.running && pod.restored {
            pod.ready = true;
        }
    }

    fn owner(&mut self) {
        let seen = self.look(self.owner.seen);
        self.owner.seen = seen;
        if !self.setup.owned {
            return;
        }
        match self.history[seen].own() {
            Owner::Content => {}
            // It knows what it has created itself.
            Owner::Create => {
                if self.api.create("other", true, self.now) {
                    self.say("the owner makes another pod");
                }
            }
            Owner::Delete(uid) => {
                self.say(&format!("the owner deletes {uid}"));
                self.pod(&uid, |pod| pod.deleting = true);
            }
        }
    }

    fn fault(&mut self) {
        let choice = self.random.below(self.fault_in);
        if 37 < choice {
            return;
        }
        self.say(&format!("fault {choice}"));
        match choice {
            0 => self.api.cancel = true,
            1 => {
                self.api.deleting = true;
                self.api.gone = !self.api.held;
                if self.api.gone && self.api.record.step == Step::Waiting {
                    // It is as if there had been none.
                    self.api.gone = false;
                }
            }
            2 => self.meddle(SOURCE),
            3 => {
                let uid = self.api.new_pod().map(|pod| pod.uid.clone());
                self.meddle(&uid.unwrap_or_default());
            }
            4..=8 => self.daemons.fail(Side::Source),
            9..=13 => {
                // What ran there is not anywhere else any more.
                self.meddled |= self.daemons.target == TargetPhase::Running;
                self.daemons.fail(Side::Target);
            }
            14 if self.random.once_in(4) => self.lose(Side::Source),
            15 if self.random.once_in(4) => self.lose(Side::Target),
            16 => self.api.outdated = true,
            17 => self.api.cordoned = !self.api.cordoned,
            18..=22 => self.controllers[0].seen = self.history.len().saturating_sub(3),
            23 => self.crash_new(),
            24..=30 => self.now += 40,
            31 if self.daemons.source_down => self.taint(Side::Source),
            32 if self.daemons.target_down => self.taint(Side::Target),
            33 | 34 => self.daemons.cut = true,
            35 => self.daemons.cut = false,
            36 => self.forget(Side::Source),
            37 => self.forget(Side::Target),
            _ => return,
        }
        self.api.version += 1;
    }

    fn meddle(&mut self, uid: &str) {
        if self.api.pods.contains_key(uid) {
            self.meddled = true;
            self.pod(uid, |pod| pod.deleting = true);
        }
    }

    fn lose(&mut self, side: Side) {
        self.meddled = true;
        match side {
            Side::Source => self.daemons.source_down = true,
            Side::Target => {
                self.daemons.target_down = true;
                self.new_alive = false;
            }
        }
    }

    /// The object of a node goes, and the node runs on.
    fn forget(&mut self, side: Side) {
        if !self.api.absent.contains(&side) {
            self.api.absent.push(side);
        }
    }

    fn taint(&mut self, side: Side) {
        if !self.api.down.contains(&side) {
            self.api.down.push(side);
        }
    }

    /// The new pod's container ends, and is started anew: cold, as any that was restored once.
    fn crash_new(&mut self) {
        let alive = self.new_alive;
        let ended = self.api.record.step == Step::Ended;
        if let Some(pod) = self.api.pods.values_mut().find(|pod| pod.name == NEW_NAME)
            && alive
        {
            pod.restarted = true;
            pod.ready = false;
            self.new_restarted_before_end |= !ended;
        }
    }
}
