//! PostgreSQL under pgbench: no transaction fails, and all sums agree.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStderr, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::user::Home;
use super::{App, Proof, Seen};
use crate::client::lines::Program;
use crate::client::steady::{Asker, Steady};
use crate::lab::Lab;
use crate::lab::inside::Inside;
use crate::lab::network::tool;
use crate::workload::{Workload, WorkloadPlan};

/// PostgreSQL, a pgbench for each move, and who asks it all the time.
#[derive(Debug)]
struct Postgresql {
    workload: Workload,
    home: Home,
    load: Steady<Watcher>,
    bench: Option<Bench>,
    /// Transactions that pgbench says were processed.
    transactions: u64,
}

pub fn start(lab: &mut Lab, node: &str) -> Result<Box<dyn App>> {
    let home = Home::make(lab, "postgresql", "postgres")?;
    let data = format!("{}/data", home.path);
    // Files on the shared storage, not in the node's /dev/shm.
    let settings = "dynamic_shared_memory_type = mmap\n";
    start_as(lab, home, (&data, settings), |lab, uid, program| {
        let plan = WorkloadPlan {
            name: "postgresql".to_owned(),
            arguments: vec![program, "-D".to_owned(), data.clone()],
            own_pid_mnt: false,
            uid: Some(uid),
        };
        Workload::start(lab, node, &plan)
    })
}

/// Starts it with its files in the folder `data` of node a, and `settings` besides its own.
/// `launch` starts the program as a user.
pub fn start_as(
    lab: &mut Lab,
    home: Home,
    (data, settings): (&str, &str),
    launch: impl FnOnce(&mut Lab, u32, String) -> Result<Workload>,
) -> Result<Box<dyn App>> {
    let programs = programs(lab)?;
    home.command(lab, &format!("{programs}/initdb"))?
        .args(["-D", data, "--auth=trust", "--no-locale", "--encoding=UTF8"])
        .args(["--username=postgres", "--no-sync"])
        .run()?;
    let folder = lab.node("a")?.path(data);
    let settings = format!("{SETTINGS}{settings}");
    fs::write(folder.join("postgresql.conf"), settings).context("configuring PostgreSQL")?;
    fs::write(folder.join("pg_hba.conf"), "host all all 0.0.0.0/0 trust\n")
        .context("configuring PostgreSQL")?;
    let workload = launch(lab, home.uid, format!("{programs}/postgres"))?;
    workload.wait_until_it_listens(lab, PORT)?;
    let initialise = ["-i", "-q", "-s", SCALE, "postgres"];
    client(lab, &workload, "pgbench")?.args(initialise).run()?;
    let psql = client(lab, &workload, "psql")?.args(["-qAt", "postgres"]);
    let watcher = Watcher {
        psql: Program::start(psql)?,
        number: 0,
    };
    let load = Steady::start(vec![watcher], PERIOD)?;
    Ok(Box::new(Postgresql {
        workload,
        home,
        load,
        bench: None,
        transactions: 0,
    }))
}

/// Where the node has the programs of the server: a folder that its version names.
pub fn programs(lab: &Lab) -> Result<String> {
    let versions = "/usr/lib/postgresql";
    let found = fs::read_dir(lab.node("a")?.path(versions)).context("looking for PostgreSQL")?;
    let version = found
        .flatten()
        .next()
        .context("the nodes have no PostgreSQL")?;
    Ok(format!(
        "{versions}/{}/bin",
        version.file_name().to_string_lossy()
    ))
}

/// A client program of the server, in the lab's client network, with the files of node a.
fn client(lab: &Lab, workload: &Workload, program: &str) -> Result<Inside> {
    let command = tool(lab.node("a")?, &lab.client.net, program)?;
    let address = workload.link.address.to_string();
    Ok(command.args(["-h", &address, "-U", "postgres"]))
}

impl App for Postgresql {
    fn workload(&mut self) -> &mut Workload {
        &mut self.workload
    }

    fn before_move(&mut self, lab: &Lab) -> Result<()> {
        self.bench = Some(Bench::start(lab, &self.workload, &self.home)?);
        self.load.wait_for_answers(1)?;
        self.load.mark();
        Ok(())
    }

    fn after_move(&mut self) -> Result<Seen> {
        let bench = self.bench.take().context("pgbench was not started")?;
        let (transactions, slowest) = bench.finish(&self.home)?;
        self.transactions += transactions;
        self.load.wait_for_answers(1)?;
        let mut seen = Seen::from(self.load.window());
        seen.pause = seen.pause.max(slowest);
        Ok(seen)
    }

    fn prove(self: Box<Self>, lab: &Lab) -> Result<Proof> {
        let (_, mut wrong) = self.load.finish();
        let sums = client(lab, &self.workload, "psql")?
            .args(["-qAt", "-F", " ", "-c", SUMS, "postgres"])
            .run()?;
        let sums: Vec<&str> = sums.split_whitespace().collect();
        let [rows, sum, rest @ ..] = sums.as_slice() else {
            anyhow::bail!("psql printed {sums:?}")
        };
        ensure!(rest.len() == 3, "psql printed {sums:?}");
        if rest.iter().any(|other| other != sum) {
            wrong.push(format!(
                "history has {sum}; accounts, branches, tellers have {rest:?}"
            ));
        }
        if *rows != self.transactions.to_string() {
            wrong.push(format!(
                "{rows} transactions are there, {} were acknowledged",
                self.transactions
            ));
        }
        Ok(Proof {
            text: format!("{rows} transactions, none failed, all sums are {sum}"),
            wrong,
        })
    }
}

/// A pgbench that is running.
#[derive(Debug)]
struct Bench {
    child: Child,
    complaints: BufReader<ChildStderr>,
}

impl Bench {
    /// Starts one and waits until its transactions flow.
    fn start(lab: &Lab, workload: &Workload, home: &Home) -> Result<Self> {
        let prefix = format!("--log-prefix={}/{LOG}", home.path);
        let mut child = client(lab, workload, "pgbench")?
            .args(["-n", "-c", "4", "-T", SECONDS, "-P", "1", "-l", &prefix])
            .arg("postgres")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let complaints = child
            .stderr
            .take()
            .context("stderr was asked to be a pipe")?;
        let mut bench = Self {
            child,
            complaints: BufReader::new(complaints),
        };
        let mut line = String::new();
        while !line.starts_with("progress:") {
            line.clear();
            let bytes = bench
                .complaints
                .read_line(&mut line)
                .context("hearing pgbench")?;
            ensure!(bytes > 0, "pgbench ended before it began");
        }
        Ok(bench)
    }

    /// Waits for its end: how many transactions were processed, and what the slowest took.
    fn finish(mut self, home: &Home) -> Result<(u64, Duration)> {
        let early = self.child.try_wait().context("watching pgbench")?;
        ensure!(
            early.is_none(),
            "the move took longer than the {SECONDS} s of pgbench"
        );
        let mut complaints = String::new();
        self.complaints
            .read_to_string(&mut complaints)
            .context("hearing pgbench")?;
        let output = self
            .child
            .wait_with_output()
            .context("waiting for pgbench")?;
        let printed = String::from_utf8_lossy(&output.stdout);
        ensure!(
            output.status.success(),
            "pgbench: {}: {complaints}",
            output.status
        );
        let number = |start: &str| {
            let line = printed.lines().find_map(|line| line.strip_prefix(start));
            let word = line.and_then(|rest| rest.split_whitespace().next());
            let number = word.and_then(|word| word.parse::<u64>().ok());
            number.with_context(|| format!("pgbench does not say its {start} {printed}"))
        };
        let failed = number("number of failed transactions:")?;
        ensure!(failed == 0, "{failed} transactions failed: {complaints}");
        Ok((
            number("number of transactions actually processed:")?,
            slowest(home)?,
        ))
    }
}

/// The slowest transaction that pgbench logged; takes the logs away.
fn slowest(home: &Home) -> Result<Duration> {
    let mut slowest = 0;
    for entry in fs::read_dir(&home.on_host).context("looking for pgbench's log")? {
        let path = entry.context("looking for pgbench's log")?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if !name.starts_with(LOG) {
            continue;
        }
        let log = BufReader::new(File::open(&path).context("opening pgbench's log")?);
        for line in log.lines() {
            let line = line.context("reading pgbench's log")?;
            // Client, number, microseconds.
            let took = line.split(' ').nth(2).and_then(|took| took.parse().ok());
            slowest = slowest.max(took.with_context(|| format!("pgbench logged {line:?}"))?);
        }
        fs::remove_file(&path).context("removing pgbench's log")?;
    }
    Ok(Duration::from_micros(slowest))
}

/// A connection that asks all the time.
#[derive(Debug)]
struct Watcher {
    psql: Program,
    number: u64,
}

impl Asker for Watcher {
    fn ask(&mut self) -> Result<()> {
        self.number += 1;
        let number = self.number.to_string();
        let answer = self.psql.ask(format!("SELECT {number};\n").as_bytes())?;
        ensure!(answer == number, "SELECT {number} was answered {answer:?}");
        Ok(())
    }
}

/// Small enough that what only the freeze copies is within the budget: shared memory.
const SETTINGS: &str = "\
listen_addresses = '*'
unix_socket_directories = ''
max_connections = 20
shared_buffers = 32MB
huge_pages = off
";
const SUMS: &str = "SELECT count(*), sum(delta), \
    (SELECT sum(abalance) FROM pgbench_accounts), \
    (SELECT sum(bbalance) FROM pgbench_branches), \
    (SELECT sum(tbalance) FROM pgbench_tellers) FROM pgbench_history";
const PORT: u16 = 5432;
/// 100,000 accounts each, 15 MB.
const SCALE: &str = "4";
/// How long pgbench runs around a move.
const SECONDS: &str = "8";
const LOG: &str = "pgbench";
const PERIOD: Duration = Duration::from_millis(1);
