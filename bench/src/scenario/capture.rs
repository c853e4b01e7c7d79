//! `capture`: what is on the wire while a workload moves.
//!
//! A capture at every port of the switch. No TCP reset of the workload may occur, and from the
//! first frame by which the target answers for the workload's address, the source must not any
//! more. Somebody asks for the address all the time, so that a wrong answer would be given.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use super::report::Report;
use super::session::Session;
use super::settings::{Settings, other};
use crate::client::load::{Dataset, LoadPlan};
use crate::lab::Lab;
use crate::lab::inside::in_network;
use crate::lab::network::{CLIENT_ADDRESS, mac_of, tool};
use crate::mover::MoveOptions;
use crate::sys;

/// The scenario.
pub fn run(settings: &Settings, report: &mut Report) -> Result<()> {
    let mut lab = settings.lab(2)?;
    let dataset = Dataset::first_row(DATA_BYTES);
    let load = LoadPlan::first_row();
    let mut session = Session::start(&mut lab, settings.mover, "a", dataset, load)?;
    let address = session.workload.link.address;
    let capture = Capture::start(&lab)?;
    let mut moves = Vec::new();
    let result = asking(&lab, address.octets(), || -> Result<()> {
        for _ in 0..MOVES {
            let (from, to) = (session.at.clone(), other(&session.at));
            let begun = SystemTime::now();
            if !session.move_to(&lab, to, &MoveOptions::default(), report)? {
                break;
            }
            session.wait_for_writes(WRITES_AROUND)?;
            moves.push(Window {
                from,
                to: to.to_owned(),
                begun,
                ended: SystemTime::now(),
            });
        }
        Ok(())
    });
    let frames = capture.finish(&lab)?;
    result?;
    judge(&frames, &moves, &address.to_string(), report);
    session.finish(report)?;
    Ok(())
}

/// A move as far as the capture is concerned.
struct Window {
    from: String,
    to: String,
    begun: SystemTime,
    ended: SystemTime,
}

/// A line of tcpdump: the time, the switch port it came in by, and the rest.
#[derive(Debug, PartialEq)]
struct Frame {
    time: f64,
    port: String,
    text: String,
}

struct Capture {
    child: Child,
}

impl Capture {
    fn start(lab: &Lab) -> Result<Self> {
        let path = lab.folder.logs().join("capture.txt");
        let output = File::create(&path).context("creating the capture's file")?;
        let filter = "arp or (tcp[tcpflags] & tcp-rst != 0)";
        let arguments = [
            "-i",
            "any",
            "-Q",
            "in",
            "-n",
            "-tt",
            "-l",
            "--immediate-mode",
            filter,
        ];
        let command = tool(lab.node("a")?, &lab.switch.net, "tcpdump")?.args(arguments);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(Stdio::piped())
            .spawn()?;
        // It says "listening on" once it captures.
        let stderr = child
            .stderr
            .take()
            .context("stderr was just asked to be a pipe")?;
        let mut lines = BufReader::new(stderr).lines();
        let listening = lines.by_ref().map_while(std::result::Result::ok);
        ensure!(
            listening
                .into_iter()
                .any(|line| line.contains("listening on")),
            "tcpdump does not start"
        );
        Ok(Self { child })
    }

    /// Ends the capture; what came in by the nodes' ports.
    fn finish(mut self, lab: &Lab) -> Result<Vec<Frame>> {
        let pid = i32::try_from(self.child.id()).context("the kernel's pids are ints")?;
        // SIGTERM lets it write what it has.
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGTERM)?;
        self.child.wait().context("waiting for tcpdump")?;
        let text = std::fs::read_to_string(lab.folder.logs().join("capture.txt"))?;
        Ok(text.lines().filter_map(parse_frame).collect())
    }
}

/// "1700000000.123456 node-a P   ARP, Reply 10.90.0.101 is-at …"
fn parse_frame(line: &str) -> Option<Frame> {
    let (time, rest) = line.split_once(' ')?;
    let (port, rest) = rest.trim_start().split_once(' ')?;
    let (way, text) = rest.trim_start().split_once(' ')?;
    // To us, to all, to many, to somebody else: all came in, only "Out" did not.
    if !["In", "B", "M", "P"].contains(&way) {
        return None;
    }
    let text = text.trim_start();
    Some(Frame {
        time: time.parse().ok()?,
        port: port.to_owned(),
        text: text.to_owned(),
    })
}

/// Asks for an address over and over while `work` is done.
fn asking<T>(lab: &Lab, address: [u8; 4], work: impl FnOnce() -> T) -> T {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let ask = || {
                while !stop.load(Ordering::Relaxed) {
                    let from = (mac_of(CLIENT_ADDRESS), CLIENT_ADDRESS.octets());
                    // A full queue loses a question; the next one comes soon.
                    let _ = sys::send_arp_request("eth0", from, address);
                    thread::sleep(ASK_EVERY);
                }
            };
            if let Err(error) = in_network(&lab.client.net, ask) {
                eprintln!("lab: asking for addresses: {error:#}");
            }
        });
        let result = work();
        stop.store(true, Ordering::Relaxed);
        result
    })
}

fn judge(frames: &[Frame], moves: &[Window], address: &str, report: &mut Report) {
    let resets = frames
        .iter()
        .filter(|f| f.text.contains("Flags [R") && f.text.contains(address));
    for frame in resets {
        report.fail(format!("a reset came in by {}: {}", frame.port, frame.text));
    }
    let mut answers = 0;
    for (number, window) in moves.iter().enumerate() {
        let own: Vec<&Frame> = frames
            .iter()
            .filter(|f| speaks_for(f, window, address))
            .collect();
        answers += own.len();
        if let Some(text) = wrong_side(&own, window) {
            report.fail(format!("move {}: {text}", number + 1));
        }
    }
    report.figure("ARP answers and announcements seen", answers);
    report.figure("moves captured", moves.len());
    if answers == 0 {
        report.fail("the capture saw no ARP answer at all");
    }
}

/// True for ARP by which somebody claims the workload's address during a move.
fn speaks_for(frame: &Frame, window: &Window, address: &str) -> bool {
    let answer = format!("Reply {address} is-at");
    let announcement = format!("tell {address},");
    let during = frame.time >= seconds(window.begun) && frame.time <= seconds(window.ended);
    during && (frame.text.contains(&answer) || frame.text.contains(&announcement))
}

/// From the first word of the target on the source must be silent, and the target must speak.
fn wrong_side(frames: &[&Frame], window: &Window) -> Option<String> {
    let (source, target) = (
        format!("node-{}", window.from),
        format!("node-{}", window.to),
    );
    let first = frames.iter().find(|frame| frame.port == target);
    let Some(first) = first else {
        return Some(format!("{target} never spoke for the address"));
    };
    let late = frames
        .iter()
        .find(|frame| frame.port == source && frame.time > first.time)?;
    let after = (late.time - first.time) * 1e3;
    Some(format!(
        "{source} spoke for the address {after:.3} ms after {target}: {}",
        late.text
    ))
}

fn seconds(time: SystemTime) -> f64 {
    time.duration_since(UNIX_EPOCH)
        .map_or(0.0, |duration| duration.as_secs_f64())
}

const DATA_BYTES: u64 = 128 << 20; // 128 MiB
const MOVES: usize = 5;
const WRITES_AROUND: u64 = 3_000;
const ASK_EVERY: Duration = Duration::from_millis(2);

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(time: f64, port: &str) -> Frame {
        Frame {
            time,
            port: port.to_owned(),
            text: "Reply 10.90.0.101 is-at x".to_owned(),
        }
    }

    fn window() -> Window {
        let (begun, ended) = (UNIX_EPOCH, UNIX_EPOCH + Duration::from_secs(9));
        Window {
            from: "a".to_owned(),
            to: "b".to_owned(),
            begun,
            ended,
        }
    }

    #[test]
    fn lines_of_the_capture_are_read() {
        let line = "1700000000.5 node-a P   ARP, Reply 10.90.0.101 is-at 02:00:0a:5a:00:65, \
                    length 28";
        let read = parse_frame(line).unwrap();
        assert_eq!((read.time, read.port.as_str()), (1_700_000_000.5, "node-a"));
        assert!(read.text.starts_with("ARP, Reply 10.90.0.101 is-at"));
    }

    #[test]
    fn the_source_may_not_answer_after_the_target() {
        let good = [frame(1.0, "node-a"), frame(2.0, "node-b")];
        let bad = [frame(1.0, "node-b"), frame(2.0, "node-a")];
        assert_eq!(
            wrong_side(&good.iter().collect::<Vec<_>>(), &window()),
            None
        );
        assert!(wrong_side(&bad.iter().collect::<Vec<_>>(), &window()).is_some());
        assert!(wrong_side(&[], &window()).is_some());
    }
}
