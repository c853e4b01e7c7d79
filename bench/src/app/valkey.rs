//! Valkey with an append-only file: every acknowledged write is there, and the file replays to the
//! same data set.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use super::user::Home;
use super::{App, Proof, Seen};
use crate::client::load::{Dataset, Load, LoadPlan};
use crate::client::probe::Prober;
use crate::client::resp::{ANSWER_TIME_MAX, Connection, Reply};
use crate::client::verify;
use crate::content::Content;
use crate::lab::Lab;
use crate::workload::{Workload, WorkloadPlan, redis};

/// Valkey and who writes to it. It speaks as Redis does, at the same port.
#[derive(Debug)]
struct Valkey {
    workload: Workload,
    load: Load,
    prober: Prober,
    /// When the last window began.
    marked: Instant,
    /// As old as the others: reading back happens on a connection that lived through it all.
    connection: Connection,
}

pub fn start(lab: &mut Lab, node: &str) -> Result<Box<dyn App>> {
    let home = Home::make(lab, "valkey", "valkey")?;
    let mut arguments = vec!["/usr/bin/valkey-server".to_owned()];
    let settings = [
        ["--dir", &home.path],
        ["--appendonly", "yes"],
        ["--appendfsync", "everysec"],
        ["--save", ""],
        // No child that rewrites the file: forks that save are a case of `memory`.
        ["--auto-aof-rewrite-percentage", "0"],
        ["--bind", "0.0.0.0"],
        ["--protected-mode", "no"],
        // For its digest.
        ["--enable-debug-command", "yes"],
    ];
    arguments.extend(settings.into_iter().flatten().map(str::to_owned));
    let plan = WorkloadPlan {
        name: "valkey".to_owned(),
        arguments,
        own_pid_mnt: false,
        uid: Some(home.uid),
    };
    let workload = redis::start(lab, node, &plan)?;
    let (net, address) = (&lab.client.net, workload.link.address);
    let mut connection = Connection::open(net, address)?;
    DATASET.populate(&mut connection)?;
    let logs = lab.folder.logs().join(format!("load-{}", workload.number));
    std::fs::create_dir_all(&logs).context("creating the folder of the load's logs")?;
    Ok(Box::new(Valkey {
        load: Load::start(net, address, DATASET, LOAD, &logs)?,
        prober: Prober::redis(net, address)?,
        marked: Instant::now(),
        workload,
        connection,
    }))
}

impl Valkey {
    fn wait_for_writes(&self) -> Result<()> {
        let wanted = self.load.writes() + WRITES_AROUND;
        let deadline = Instant::now() + ANSWER_TIME_MAX;
        while self.load.writes() < wanted {
            ensure!(Instant::now() < deadline, "the load came to a stop");
            let answered = self
                .prober
                .wait_for_answer_after(Instant::now(), ANSWER_TIME_MAX);
            ensure!(answered, "the prober has no answer");
        }
        Ok(())
    }
}

impl App for Valkey {
    fn workload(&mut self) -> &mut Workload {
        &mut self.workload
    }

    fn before_move(&mut self, _: &Lab) -> Result<()> {
        self.wait_for_writes()?;
        self.load.mark();
        self.marked = Instant::now();
        Ok(())
    }

    fn after_move(&mut self) -> Result<Seen> {
        self.wait_for_writes()?;
        Ok(Seen {
            blackout: self.prober.longest_silence_since(self.marked),
            pause: self.load.longest_wait(),
        })
    }

    fn prove(self: Box<Self>, _: &Lab) -> Result<Proof> {
        let Self {
            load,
            prober,
            mut connection,
            ..
        } = *self;
        let written = load.finish();
        let mut wrong: Vec<String> = written.broken().map(str::to_owned).collect();
        wrong.extend(prober.finish());
        let verdict = verify::verify(&mut connection, &written)?;
        if verdict.lost_acks > 0 {
            wrong.push(format!(
                "{} acknowledged writes are lost",
                verdict.lost_acks
            ));
        }
        wrong.extend(verdict.findings);
        let digest = call(&mut connection, &[b"DEBUG", b"DIGEST"])?;
        // Writes the file's end, forgets all, and reads the file.
        call(&mut connection, &[b"DEBUG", b"LOADAOF"])?;
        let replayed = call(&mut connection, &[b"DEBUG", b"DIGEST"])?;
        if digest != replayed {
            wrong.push(format!("the file replays to {replayed}, not to {digest}"));
        }
        let (writes, keys) = (written.writes, verdict.keys_read);
        Ok(Proof {
            text: format!(
                "{writes} writes acknowledged, {keys} keys read back, the append-only file replays \
                 to {replayed}"
            ),
            wrong,
        })
    }
}

fn call(connection: &mut Connection, words: &[&[u8]]) -> Result<String> {
    match connection.call(words).context("asking Valkey")? {
        Reply::Simple(word) => Ok(word),
        other => bail!("Valkey answered {other:?}"),
    }
}

/// 64 MiB, of which a quarter is written.
const DATASET: Dataset = Dataset {
    keys: 65_536,
    hot_keys: 16_384,
    value_bytes: 1024,
    content: Content::Random,
};
/// 4 MB/s in the append-only file.
const LOAD: LoadPlan = LoadPlan {
    connections: 4,
    values_per_second: Some(4000),
    pipeline: 1,
};
/// A quarter of a second.
const WRITES_AROUND: u64 = 1000;
