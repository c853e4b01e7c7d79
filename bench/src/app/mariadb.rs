//! MariaDB under inserts: every acknowledged row is there, with its contents, and no other.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::user::Home;
use super::{App, Proof, Seen};
use crate::client::lines::Program;
use crate::client::steady::{Asker, Steady};
use crate::content::Generator;
use crate::lab::Lab;
use crate::lab::inside::Inside;
use crate::lab::network::tool;
use crate::workload::{Workload, WorkloadPlan};

/// MariaDB and who inserts.
#[derive(Debug)]
struct Mariadb {
    workload: Workload,
    load: Steady<Inserter>,
}

pub fn start(lab: &mut Lab, node: &str) -> Result<Box<dyn App>> {
    let home = Home::make(lab, "mariadb", "mysql")?;
    let data = format!("--datadir={}/data", home.path);
    home.command(lab, "mariadb-install-db")?
        .args([
            "--no-defaults",
            &data,
            "--skip-test-db",
            "--skip-name-resolve",
            // It need not find its own address.
            "--force",
        ])
        .arg("--auth-root-authentication-method=normal")
        .run()?;
    let mut arguments = vec!["/usr/sbin/mariadbd".to_owned()];
    arguments.extend(SETTINGS.map(str::to_owned));
    arguments.push(data);
    arguments.push(format!("--socket={}/socket", home.path));
    arguments.push(format!("--pid-file={}/pid", home.path));
    arguments.push(format!("--log-error={}/log", home.path));
    arguments.push(format!("--tmpdir={}", home.path));
    let plan = WorkloadPlan {
        name: "mariadb".to_owned(),
        arguments,
        own_pid_mnt: false,
        uid: Some(home.uid),
    };
    let workload = Workload::start(lab, node, &plan)?;
    workload.wait_until_it_listens(lab, PORT)?;
    client(lab, &workload)?.args(["-e", TABLE]).run()?;
    let inserter = |number| -> Result<Inserter> {
        Ok(Inserter {
            // What it is answered is printed at once.
            mariadb: Program::start(client(lab, &workload)?.args(["--unbuffered", "lab"]))?,
            number,
            generator: Generator(number + 1),
            rows: 0,
            sum: 0,
        })
    };
    let inserters = (0..CLIENTS).map(inserter).collect::<Result<Vec<_>>>()?;
    let load = Steady::start(inserters, PERIOD)?;
    Ok(Box::new(Mariadb { workload, load }))
}

/// The command line client, in the lab's client network, with the files of node a.
fn client(lab: &Lab, workload: &Workload) -> Result<Inside> {
    let command = tool(lab.node("a")?, &lab.client.net, "mariadb")?;
    let address = format!("--host={}", workload.link.address);
    let quiet = ["--batch", "--skip-column-names", "--skip-reconnect"];
    Ok(command
        .args(["--no-defaults", &address, "--user=root", "--skip-ssl"])
        .args(quiet))
}

impl App for Mariadb {
    fn workload(&mut self) -> &mut Workload {
        &mut self.workload
    }

    fn before_move(&mut self, _: &Lab) -> Result<()> {
        self.load.wait_for_answers(ANSWERS_AROUND)?;
        self.load.mark();
        Ok(())
    }

    fn after_move(&mut self) -> Result<Seen> {
        self.load.wait_for_answers(ANSWERS_AROUND)?;
        Ok(self.load.window().into())
    }

    fn prove(self: Box<Self>, lab: &Lab) -> Result<Proof> {
        let (inserters, mut wrong) = self.load.finish();
        let found = client(lab, &self.workload)?
            .args(["lab", "-e", SUMS])
            .run()?;
        let found: Vec<String> = found.lines().map(str::to_owned).collect();
        let expected: Vec<String> = inserters.iter().map(Inserter::summary).collect();
        if found != expected {
            wrong.push(format!("rows of clients are {found:?}, not {expected:?}"));
        }
        let check = ["lab", "-e", "CHECK TABLE rows_of EXTENDED"];
        let check = client(lab, &self.workload)?.args(check).run()?;
        if !check.trim_end().ends_with("OK") {
            wrong.push(format!("the table is {}", check.trim_end()));
        }
        let rows: u64 = inserters.iter().map(|inserter| inserter.rows).sum();
        let sum = inserters.iter().fold(0, |sum, inserter| sum ^ inserter.sum);
        Ok(Proof {
            text: format!("{rows} acknowledged rows are there and no other, checksum {sum:016x}"),
            wrong,
        })
    }
}

/// A connection that inserts rows of its own.
#[derive(Debug)]
struct Inserter {
    mariadb: Program,
    number: u64,
    generator: Generator,
    rows: u64,
    /// Of the rows' words, by exclusive or.
    sum: u64,
}

impl Asker for Inserter {
    fn ask(&mut self) -> Result<()> {
        let (client, row, word) = (self.number, self.rows, self.generator.next_number());
        let insert = format!(
            "INSERT INTO rows_of VALUES ({client}, {row}, {word}, REPEAT(HEX({word}), 30)) \
             RETURNING number;\n"
        );
        let answer = self.mariadb.ask(insert.as_bytes())?;
        ensure!(
            answer == row.to_string(),
            "row {row} was answered {answer:?}"
        );
        self.rows += 1;
        self.sum ^= word;
        Ok(())
    }
}

impl Inserter {
    /// As [`SUMS`] says it: client, rows, the last of them, checksum, rows whose text is wrong.
    fn summary(&self) -> String {
        let Self {
            number, rows, sum, ..
        } = self;
        format!("{number}\t{rows}\t{}\t{sum}\t0", rows.saturating_sub(1))
    }
}

const SETTINGS: [&str; 10] = [
    // Must be the first.
    "--no-defaults",
    "--bind-address=0.0.0.0",
    "--skip-name-resolve",
    "--skip-grant-tables",
    "--skip-ssl",
    "--innodb-buffer-pool-size=64M",
    // Direct I/O and its like write memory behind the page tables.
    "--innodb-use-native-aio=0",
    "--innodb-data-file-buffering=1",
    "--innodb-log-file-buffering=1",
    "--innodb-log-file-size=32M",
];
const TABLE: &str = "CREATE DATABASE lab; CREATE TABLE lab.rows_of (\
    client INT, number BIGINT, word BIGINT UNSIGNED, text TEXT, PRIMARY KEY (client, number)) \
    ENGINE=InnoDB";
const SUMS: &str = "SELECT client, COUNT(*), MAX(number), BIT_XOR(word), \
    SUM(text <> REPEAT(HEX(word), 30)) FROM rows_of GROUP BY client ORDER BY client";
const PORT: u16 = 3306;
const CLIENTS: u64 = 4;
const PERIOD: Duration = Duration::from_millis(2);
const ANSWERS_AROUND: u64 = 50;
