//! `parking`: what comes for a workload while it stands still reaches it, wherever it runs then.
//!
//! Each part compares the ways of keeping it in one run: off (dropped, as before there was any),
//! capture (closed ports, and a look at the bridge) and auto (a program at the port). `few` is auto
//! alone, for a test.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::faults::Stopped;
use super::report::{Report, percentile};
use super::settings::{Settings, other};
use crate::client::datagrams::{Datagrams, Seen};
use crate::client::http::Requests;
use crate::client::probe::Prober;
use crate::lab::Lab;
use crate::lab::daemon::DaemonPlan;
use crate::lab::init::SHARED;
use crate::lab::inside::in_network;
use crate::lab::network::{CLIENT_ADDRESS, PREFIX, ip};
use crate::mover::outcome::{Move, millis, round};
use crate::mover::pageferry::{Migration, Pageferry, SETTLE_TIME_MAX, show, wait_settled};
use crate::mover::{MoveOptions, Mover, Order};
use crate::workload::case::{CaseWorkload, DATAGRAMS, LINES, UNREAD};
use crate::workload::{Workload, nginx};

/// A part, which `--only` names.
type Part = (&'static str, fn(&mut Lab, &mut Report) -> Result<()>);

const PARTS: [Part; 6] = [
    ("few", few),
    ("gap", gap),
    ("ipv6", ipv6),
    ("syn", syn),
    ("rollback", rollback),
    ("bound", bound),
];

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    settings.need_pageferry("parking is about what stock CRIU does not have")?;
    let only = settings.only.as_deref();
    let wanted = PARTS
        .iter()
        .filter(|(name, _)| only.map_or(*name != "few", |only| only == *name));
    let wanted: Vec<&Part> = wanted.collect();
    ensure!(!wanted.is_empty(), "there is no such part");
    let mut lab = settings.lab(2)?;
    for (name, part) in wanted {
        if let Err(error) = part(&mut lab, report) {
            report.fail(format!("{name}: {error:#}"));
        }
        wait_settled(&lab, SETTLE_TIME_MAX)?;
    }
    Ok(())
}

/// How what comes is kept, and what may be lost of it all the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Means {
    Off,
    Capture,
    Auto,
}

impl Means {
    const ALL: [Self; 3] = [Self::Off, Self::Capture, Self::Auto];

    fn name(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Capture => "capture",
            Self::Auto => "auto",
        }
    }

    /// How often it is moved, to compare how long that takes.
    fn moves(self) -> usize {
        match self {
            Self::Off | Self::Capture => MOVES_FEW,
            Self::Auto => MOVES,
        }
    }

    fn set(self, lab: &mut Lab) -> Result<()> {
        lab.restart_daemons(&DaemonPlan {
            parking: self.name(),
            ..DaemonPlan::default()
        })
    }
}

/// The echo server, its clients, and what they see.
struct Session {
    case: CaseWorkload,
    at: String,
    clients: Clients,
}

struct Clients {
    prober: Prober,
    at_once: Datagrams,
    unread: Datagrams,
    counters: Counters,
}

/// Counters of the client's kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counters {
    timeouts: u64,
    /// Segments that were sent again, after a time-out or to probe for a loss.
    resent: u64,
    resets: u64,
}

impl Session {
    fn start(lab: &mut Lab, six: bool) -> Result<Self> {
        let case = CaseWorkload::start(lab, "a", "echo")?;
        let address = match six {
            false => IpAddr::V4(case.workload.link.address),
            true => IpAddr::V6(give_ipv6(lab, &case.workload)?),
        };
        let clients = Clients::start(&lab.client.net, address)?;
        let at = "a".to_owned();
        Ok(Self { case, at, clients })
    }

    /// Moves it so often, there and back.
    fn moves(&mut self, lab: &Lab, count: usize, report: &mut Report) -> Result<Vec<Move>> {
        let mut all = Vec::new();
        for _ in 0..count {
            let to = other(&self.at).to_owned();
            let begun = Instant::now();
            let order = Order {
                workload: &self.case.workload,
                from: &self.at,
                to: &to,
                options: &options(),
            };
            let outcome = Pageferry.move_workload(lab, &order)?;
            let pid = outcome.pid_at_target();
            let Some(mut one) = outcome.moved else {
                let (code, text) = outcome.error.unwrap_or_default();
                bail!("{} -> {to}: {code}: {text}", self.at);
            };
            self.case.workload.pid = pid.unwrap_or(self.case.workload.pid);
            self.at = to;
            one.blackout_ms = Some(millis(self.clients.blackout_since(begun)?));
            self.clients.at_once.wait_for_answers(ANSWERS_AROUND)?;
            report.push(one.clone());
            all.push(one);
            wait_settled(lab, SETTLE_TIME_MAX)?;
        }
        Ok(all)
    }

    /// Ends it; what its clients have seen.
    fn finish(self, lab: &Lab) -> Result<([Seen; 2], Counters)> {
        let seen = self.clients.finish(&lab.client.net);
        self.case.workload.kill(lab)?;
        seen
    }
}

impl Clients {
    fn start(net: &OwnedFd, address: IpAddr) -> Result<Self> {
        Ok(Self {
            prober: Prober::start(net, (address, LINES).into(), b"ping\n")?,
            at_once: Datagrams::start(net, (address, DATAGRAMS).into(), PER_SECOND)?,
            unread: Datagrams::start(net, (address, UNREAD).into(), PER_SECOND)?,
            counters: Counters::read(net)?,
        })
    }

    fn blackout_since(&self, begun: Instant) -> Result<Duration> {
        let answers = self
            .prober
            .wait_for_answer_after(Instant::now(), ANSWER_MAX);
        ensure!(answers, "the prober has no answer");
        Ok(self.prober.longest_silence_since(begun))
    }

    fn finish(self, net: &OwnedFd) -> Result<([Seen; 2], Counters)> {
        let counters = Counters::read(net)?.since(self.counters);
        let seen = [self.at_once.finish()?, self.unread.finish()?];
        if let Some(reason) = self.prober.finish() {
            bail!("broken: {reason}");
        }
        Ok((seen, counters))
    }
}

impl Counters {
    fn read(net: impl AsFd) -> Result<Self> {
        let read = |name| std::fs::read_to_string(format!("/proc/thread-self/net/{name}"));
        let (extended, common) = in_network(net, || (read("netstat"), read("snmp")))?;
        let common = common.context("snmp")?;
        Ok(Self {
            timeouts: counter(&extended.context("netstat")?, "TcpExt:", "TCPTimeouts")?,
            resent: counter(&common, "Tcp:", "RetransSegs")?,
            resets: counter(&common, "Tcp:", "EstabResets")?,
        })
    }

    const fn since(self, before: Self) -> Self {
        Self {
            timeouts: self.timeouts - before.timeouts,
            resent: self.resent - before.resent,
            resets: self.resets - before.resets,
        }
    }
}

/// A number of a table that has a line of names, and a line of numbers.
fn counter(text: &str, table: &str, name: &str) -> Result<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix(table));
    let (names, values) = (
        lines.next().unwrap_or_default(),
        lines.next().unwrap_or_default(),
    );
    let mut all = names.split_whitespace().zip(values.split_whitespace());
    let value = all.find_map(|(found, value)| (found == name).then_some(value));
    let value = value.with_context(|| format!("the kernel counts no {name}"))?;
    value.parse().with_context(|| format!("{name}: {value}"))
}

/// As `gap` and `ipv6`, with a few moves of auto.
fn few(lab: &mut Lab, report: &mut Report) -> Result<()> {
    for (six, what) in [(false, "IPv4"), (true, "IPv6")] {
        let mut session = Session::start(lab, six)?;
        let moved = session.moves(lab, MOVES_FEW, report);
        let seen = session.finish(lab)?;
        tell(Means::Auto, what, (&moved?, &seen), report);
    }
    Ok(())
}

/// TCP asked once in a millisecond, and datagrams at 1,000 a second, with each of the means.
fn gap(lab: &mut Lab, report: &mut Report) -> Result<()> {
    for means in Means::ALL {
        means.set(lab)?;
        let mut session = Session::start(lab, false)?;
        let moved = session.moves(lab, means.moves(), report);
        let seen = session.finish(lab)?;
        tell(means, "IPv4", (&moved?, &seen), report);
    }
    Ok(())
}

/// The same over IPv6.
fn ipv6(lab: &mut Lab, report: &mut Report) -> Result<()> {
    for means in [Means::Off, Means::Auto] {
        means.set(lab)?;
        let mut session = Session::start(lab, true)?;
        let moved = session.moves(lab, MOVES_FEW, report);
        let seen = session.finish(lab)?;
        tell(means, "IPv6", (&moved?, &seen), report);
    }
    Ok(())
}

/// Says what was seen, and what of it is wrong.
fn tell(
    means: Means,
    what: &str,
    (moved, (seen, counters)): (&[Move], &([Seen; 2], Counters)),
    report: &mut Report,
) {
    let name = means.name();
    let downtimes: Vec<f64> = moved.iter().map(|one| one.downtime_ms).collect();
    let blackouts: Vec<f64> = moved.iter().filter_map(|one| one.blackout_ms).collect();
    let percents: &[usize] = if moved.is_empty() { &[] } else { &[50, 99] };
    for &percent in percents {
        let [down, black] = [&downtimes, &blackouts].map(|all| round(percentile(all, percent)));
        report.figure(&format!("{what}, {name}: downtime p{percent} ms"), down);
        report.figure(&format!("{what}, {name}: blackout p{percent} ms"), black);
    }
    report.figure(&format!("{what}, {name}: TCP time-outs"), counters.timeouts);
    report.figure(&format!("{what}, {name}: TCP sent again"), counters.resent);
    for (how, seen) in ["read at once", "left unread"].iter().zip(seen) {
        let figures = [
            ("sent", seen.sent()),
            ("lost", seen.lost()),
            ("doubled", seen.doubled),
            ("out of order", seen.disordered),
            ("refused", seen.refused),
        ];
        for (figure, count) in figures {
            report.figure(&format!("{what}, {name}: datagrams {how}, {figure}"), count);
        }
        let may_lose = means != Means::Auto;
        let wrong = [
            ("doubled", seen.doubled),
            ("refused", seen.refused),
            ("lost", if may_lose { 0 } else { seen.lost() }),
            ("out of order", if may_lose { 0 } else { seen.disordered }),
        ];
        for (what, count) in wrong.into_iter().filter(|(_, count)| 0 < *count) {
            report.fail(format!("{name}: {count} datagrams {how} {what}"));
        }
    }
    if 0 < counters.resets {
        report.fail(format!("{name}: {} connections reset", counters.resets));
    }
    // What stands still for so long is sent again anyway.
    let long = downtimes.iter().filter(|ms| RESENT_AFTER_MS < **ms).count() as u64;
    if means == Means::Auto && long < counters.resent {
        let resent = counters.resent;
        report.fail(format!("{name}: TCP has sent {resent} segments again"));
    }
    report.print_figures(&format!("{what}, parking {name}"));
}

/// New connections, 200 a second.
fn syn(lab: &mut Lab, report: &mut Report) -> Result<()> {
    for means in Means::ALL {
        means.set(lab)?;
        let mut workload = nginx::start(lab, "a")?;
        let target = SocketAddr::from((workload.link.address, nginx::PORT));
        let requests = Requests::start(&lab.client.net, target, CONNECTIONS_PER_SECOND)?;
        ensure!(requests.wait_for_answers(1), "nginx does not answer");
        let before = Counters::read(&lab.client.net)?;
        let mut at = "a";
        let (mut slowest, mut silences) = (Vec::new(), Vec::new());
        for _ in 0..MOVES_FEW {
            requests.mark();
            let order = Order {
                workload: &workload,
                from: at,
                to: other(at),
                options: &options(),
            };
            let outcome = Pageferry.move_workload(lab, &order)?;
            workload.pid = outcome.pid_at_target().unwrap_or(workload.pid);
            let Some(one) = outcome.moved else {
                let (code, text) = outcome.error.unwrap_or_default();
                bail!("{code}: {text}");
            };
            at = other(at);
            ensure!(
                requests.wait_for_answers(ANSWERS_SYN),
                "nginx answers no more"
            );
            slowest.push(millis(requests.slowest()));
            silences.push(millis(requests.silence()));
            report.push(one);
            wait_settled(lab, SETTLE_TIME_MAX)?;
        }
        let counters = Counters::read(&lab.client.net)?.since(before);
        let seen = requests.finish()?;
        let name = means.name();
        report.figure(&format!("{name}: connections"), seen.answers + seen.failed);
        report.figure(
            &format!("{name}: answers after more than 500 ms"),
            seen.late,
        );
        report.figure(&format!("{name}: TCP time-outs"), counters.timeouts);
        report.figure(&format!("{name}: TCP sent again"), counters.resent);
        report.figure(
            &format!("{name}: longest silence p50 ms"),
            percentile(&silences, 50),
        );
        report.figure(
            &format!("{name}: slowest answer p50 ms"),
            percentile(&slowest, 50),
        );
        report.print_figures(&format!("new connections, parking {name}"));
        for failure in seen.failures {
            report.fail(format!("{name}: {failure}"));
        }
        if means == Means::Auto && 0 < seen.late {
            report.fail(format!(
                "{name}: {} connections began a second late",
                seen.late
            ));
        }
        workload.kill(lab)?;
    }
    Ok(())
}

/// A freeze that ends at its source, under load: the target's CRIU does not restore.
fn rollback(lab: &mut Lab, report: &mut Report) -> Result<()> {
    for means in Means::ALL {
        means.set(lab)?;
        let session = Session::start(lab, false)?;
        let begun = Instant::now();
        freeze_and_stay(lab, &session.case.workload, |_| Ok(()))?;
        let blackout = millis(session.clients.blackout_since(begun)?);
        session.clients.at_once.wait_for_answers(ANSWERS_AROUND)?;
        let seen = session.finish(lab)?;
        let name = format!("rollback, {}: blackout ms", means.name());
        report.figure(&name, round(blackout));
        tell(means, "rollback", (&[], &seen), report);
    }
    Ok(())
}

/// More comes than is kept: what is more is lost, and nothing else.
fn bound(lab: &mut Lab, report: &mut Report) -> Result<()> {
    Means::Auto.set(lab)?;
    let session = Session::start(lab, false)?;
    let target = SocketAddr::from((session.case.workload.link.address, UNREAD));
    let flood = |lab: &Lab| {
        let flooded = in_network(&lab.client.net, || -> std::io::Result<()> {
            let socket = std::net::UdpSocket::bind("0.0.0.0:0")?;
            for _ in 0..FLOOD {
                // What is answered to it, later, is nobody's.
                let _ = socket.send_to(b"more", target);
            }
            Ok(())
        })?;
        flooded.context("more than is kept")
    };
    freeze_and_stay(lab, &session.case.workload, flood)?;
    session.clients.at_once.wait_for_answers(ANSWERS_AROUND)?;
    session.clients.blackout_since(Instant::now())?;
    let ([at_once, _], counters) = session.finish(lab)?;
    report.figure("bound: datagrams of others", FLOOD);
    report.figure("bound: datagrams lost", at_once.lost());
    report.figure("bound: datagrams doubled", at_once.doubled);
    report.figure("bound: connections reset", counters.resets);
    report.print_figures("parking at its bound");
    ensure!(
        at_once.doubled == 0 && counters.resets == 0,
        "doubled or reset"
    );
    Ok(())
}

/// Freezes the workload for a move that cannot be, does something meanwhile, and waits until it
/// runs where it was.
fn freeze_and_stay(
    lab: &mut Lab,
    workload: &Workload,
    meanwhile: impl FnOnce(&Lab) -> Result<()>,
) -> Result<()> {
    let number = workload.number;
    let id = format!("{:016x}{number:016x}", std::process::id());
    let flags = MoveOptions {
        id: Some(id.clone()),
        hold: true,
        frozen_max: Some(FROZEN_MAX.to_owned()),
        ..options()
    };
    let migration = Migration::start(lab.node("a")?, &workload.name(), "b", &flags)?;
    let deadline = Instant::now() + ANSWER_MAX;
    while show(lab.node("a")?, &id)?["holding"] != true {
        ensure!(Instant::now() < deadline, "the source does not hold");
        std::thread::sleep(POLL);
    }
    let mut stopped = Stopped::default();
    stopped.stop_first(lab, "b", "criu")?;
    lab.node("a")?
        .command("pageferry")?
        .args(["proceed", &id])
        .run()?;
    meanwhile(lab)?;
    let outcome = migration.finish()?;
    drop(stopped);
    let (code, text) = outcome.error.unwrap_or_default();
    ensure!(
        code == "frozen-too-long",
        "it ended otherwise: {code}: {text}"
    );
    Ok(())
}

/// Gives the workload and the client an address of IPv6 each.
fn give_ipv6(lab: &Lab, workload: &Workload) -> Result<Ipv6Addr> {
    let node = lab.node("a")?;
    let inner = node.network_of(workload.pid)?;
    let own = workload.link.address.to_ipv6_mapped().segments()[7];
    let address = |last: u16| Ipv6Addr::new(0xfd90, 0, 0, 0, 0, 0, 0, last);
    let client = address(CLIENT_ADDRESS.to_ipv6_mapped().segments()[7]);
    for (net, address) in [(&inner, address(own)), (&lab.client.net, client)] {
        ip(node, net, &[], |_| {
            format!("addr replace {address}/{} dev eth0 nodad\n", PREFIX + 40)
        })?;
    }
    Ok(address(own))
}

fn options() -> MoveOptions {
    MoveOptions {
        shared: vec![SHARED.to_owned()],
        ..MoveOptions::default()
    }
}

const MOVES: usize = 20;
const MOVES_FEW: usize = 4;
const PER_SECOND: u32 = 1000;
const CONNECTIONS_PER_SECOND: u32 = 200;
/// A quarter of a second.
const ANSWERS_AROUND: usize = 250;
const ANSWERS_SYN: u64 = 100;
/// TCP's shortest time-out, but for what the clients' own processors take.
const RESENT_AFTER_MS: f64 = 150.0;
const ANSWER_MAX: Duration = Duration::from_secs(20);
const POLL: Duration = Duration::from_millis(5);
const FROZEN_MAX: &str = "150ms";
/// A few times what is kept.
const FLOOD: usize = 40_000;
