//! As migrators do that go by a disk: dump to files, pack them (tar), compress them (zstd), send
//! them over TLS, unpack them, restore from files.
//!
//! Every program is the real one, and each works while the others do: one pipe from node to node.
//! Here the disk is memory (a tmpfs), which is to the advantage of this way.

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::child::wait_for;
use super::criu::{Ends, Passage};
use super::images::FOLDER;
use super::outcome::Outcome;
use super::{Mover, Order};
use crate::lab::Lab;
use crate::lab::node::Node;

/// Moves by `criu dump`, `tar | zstd | socat` and `criu restore`.
#[derive(Clone, Copy, Debug)]
pub struct DiskTar;

impl Mover for DiskTar {
    fn name(&self) -> &'static str {
        "disk-tar-zstd-tls"
    }

    fn needs_daemons(&self) -> bool {
        false
    }

    fn unfit(&self, lab: &Lab) -> Result<Option<String>> {
        let node = lab.nodes.first().context("a lab has at least one node")?;
        let lacks = |program: &&str| !node.path(format!("/usr/bin/{program}")).exists();
        let lacks = ["socat", "tar", "zstd"].into_iter().find(lacks);
        Ok(lacks.map(|program| format!("the nodes have no {program}")))
    }

    fn move_workload(&self, lab: &Lab, order: &Order<'_>) -> Result<Outcome> {
        let mut passage = Passage::begin(lab, order)?;
        certify(passage.source, passage.target)?;
        let mut receiver = receive(passage.target)?;
        passage.close()?;
        if let Err(error) = passage.dump(&[]) {
            let _ = receiver.kill();
            let _ = receiver.wait();
            return passage.give_up("criu-dump", &error);
        }
        let dumped = Instant::now();
        send(passage.source, passage.target)?;
        let complete = wait_for(&mut receiver, "the receiver of the archive", END_TIME_MAX)?;
        ensure!(complete, "the receiver of the archive failed");
        let copied = Instant::now();
        passage.restore(&[])?;
        let ends = Ends {
            dumped,
            copied,
            restored: Instant::now(),
        };
        // The benchmark counts what is on the link; this one only knows it afterwards.
        Ok(Outcome::moved(passage.open("disk", 0, &ends)?))
    }

    fn wait_settled(&self, _: &Lab, _: Duration) -> Result<()> {
        // It has nothing left to do when it returns.
        Ok(())
    }
}

/// A certificate of the target's own, which the source trusts.
fn certify(source: &Node, target: &Node) -> Result<()> {
    let made = rcgen::generate_simple_self_signed(vec![NAME.to_owned()]);
    let made = made.context("making a certificate")?;
    let certificate = made.cert.pem();
    fs::write(source.path(CERTIFICATE), &certificate).context("writing a certificate")?;
    fs::write(target.path(CERTIFICATE), certificate).context("writing a certificate")?;
    fs::write(target.path(KEY), made.signing_key.serialize_pem()).context("writing a key")
}

fn receive(target: &Node) -> Result<Child> {
    let script = format!(
        "socat -u OPENSSL-LISTEN:{PORT},reuseaddr,cert={CERTIFICATE},key={KEY},verify=0 STDOUT \
         | zstd -d -q -c | tar -C {FOLDER} -x -f -"
    );
    pipe(target, &script)?.spawn()
}

fn send(source: &Node, target: &Node) -> Result<()> {
    // The receiver began before the dump, and is only just being started in the worst case.
    let script = format!(
        "tar -C {FOLDER} -c -f - . | zstd -1 -T2 -q -c \
         | socat -u STDIN OPENSSL:{}:{PORT},cafile={CERTIFICATE},commonname={NAME},retry=100,\
         interval=0.02",
        target.address()
    );
    let child = pipe(source, &script)?.stderr(Stdio::piped()).spawn()?;
    let output = child.wait_with_output().context("sending the archive")?;
    ensure!(
        output.status.success(),
        "sending the archive: {}",
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(())
}

/// A pipe of programs of which none may fail.
fn pipe(node: &Node, script: &str) -> Result<crate::lab::inside::Inside> {
    let script = format!("set -o pipefail; {script}");
    let command = node.command("bash")?.args(["-ec", &script]);
    Ok(command.stdin(Stdio::null()))
}

const PORT: u16 = 7444;
const NAME: &str = "target";
const CERTIFICATE: &str = "/tmp/archive.pem";
const KEY: &str = "/tmp/archive.key";
/// After the sender has ended, what is under way is in pipes.
const END_TIME_MAX: Duration = Duration::from_secs(60);
