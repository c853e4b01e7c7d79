use std::collections::BTreeMap;
use std::fs;

use openmetrics_parser::openmetrics::parse_openmetrics;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::*;

const EDGES: [u64; 3] = [50, 1_000, 100_000];

fn metrics() -> Metrics {
    Metrics::new(&EDGES)
}

/// Everything has happened once.
fn busy() -> Metrics {
    let metrics = metrics();
    let millis = |millis| Some(Duration::from_millis(millis));
    metrics.ended(Side::Source, None);
    metrics.ended(Side::Target, Some(ErrorCode::CriuFailed));
    metrics.refused(ErrorCode::IoUring);
    let parts = Parts {
        freeze: millis(2),
        final_round: millis(8),
        restore: millis(7),
        commit: millis(1),
        handoff: millis(4),
    };
    metrics.left(&parts, Duration::from_secs(3));
    metrics.blackout(Duration::from_millis(23));
    metrics.sent(8192, 700);
    metrics.rounds(3, 1);
    let paths = Paths {
        zero: 5,
        raw: 6,
        lz4: 7,
    };
    metrics.pages_sent(paths);
    metrics.pages_received(paths);
    metrics.received(700);
    metrics.filled(&Filled {
        took: Duration::from_millis(900),
        pages: 100,
        faults: 9,
        faults_by_time: &[4, 3, 1, 1],
        fault_time: Duration::from_millis(130),
    });
    metrics.frames_kept(4, 1);
    metrics.frames_given(4);
    metrics
}

fn standing() -> Standing {
    Standing {
        migrations: vec![
            (Side::Source, Phase::Copying),
            (Side::Source, Phase::Copying),
            (Side::Target, Phase::Running),
        ],
        promised_bytes: 1 << 30,
        stored_bytes: 1 << 20,
        journals: 12,
        answers: 3,
        outcomes: 5,
        journal_bytes: 4096,
    }
}

/// Each metric's name, as `# HELP` has it, with what kind it is and its help.
fn families(text: &str) -> BTreeMap<String, (String, String)> {
    let rest = |line: &str, what: &str| {
        let (name, rest) = line.strip_prefix(what)?.split_once(' ')?;
        Some((name.to_owned(), rest.to_owned()))
    };
    let helps: BTreeMap<_, _> = text
        .lines()
        .filter_map(|line| rest(line, "# HELP "))
        .collect();
    let kinds = text.lines().filter_map(|line| rest(line, "# TYPE "));
    let both = kinds.map(|(name, kind)| {
        let help = helps[&name].clone();
        (name, (kind, help))
    });
    both.collect()
}

#[test]
fn a_parser_of_the_standard_takes_all_of_it() {
    for (metrics, standing) in [(metrics(), Standing::default()), (busy(), standing())] {
        let text = metrics.text(&standing);
        let parsed = parse_openmetrics(&text);
        let parsed = parsed.unwrap_or_else(|error| panic!("{error:?}\n{text}"));
        let known: Vec<&String> = parsed.families.keys().collect();
        assert_eq!(known.len(), families(&text).len(), "{known:?}");
        assert!(text.ends_with("# EOF\n"));
    }
}

#[test]
fn what_happened_is_told() {
    let text = busy().text(&standing());
    for line in [
        "pageferryd_migrations_ended_total{role=\"source\",result=\"moved\"} 1",
        "pageferryd_migrations_ended_total{role=\"source\",result=\"failed\"} 0",
        "pageferryd_migration_failures_total{code=\"criu-failed\"} 1",
        "pageferryd_refusals_total{code=\"io-uring\"} 1",
        "pageferryd_refusals_total{code=\"pid-taken\"} 0",
        "pageferryd_downtime_seconds_count 1",
        "pageferryd_downtime_seconds_bucket{le=\"0.02\"} 0",
        "pageferryd_downtime_seconds_bucket{le=\"0.03\"} 1",
        "pageferryd_downtime_part_seconds_sum{part=\"restore\"} 0.007",
        "pageferryd_blackout_seconds_bucket{le=\"0.03\"} 1",
        "pageferryd_sent_bytes_total 8192",
        "pageferryd_sent_wire_bytes_total 700",
        "pageferryd_received_wire_bytes_total 700",
        "pageferryd_rounds_total 3",
        "pageferryd_freezes_given_up_total 1",
        "pageferryd_sent_pages_total{path=\"lz4\"} 7",
        "pageferryd_received_pages_total{path=\"zero\"} 5",
        "pageferryd_filled_pages_total{path=\"fault\"} 9",
        "pageferryd_filled_pages_total{path=\"fill\"} 91",
        "pageferryd_fault_seconds_count 9",
        "pageferryd_fault_seconds_bucket{le=\"0.00005\"} 4",
        "pageferryd_fault_seconds_bucket{le=\"0.001\"} 7",
        "pageferryd_fault_seconds_bucket{le=\"+Inf\"} 9",
        "pageferryd_parked_frames_total{fate=\"lost\"} 1",
        "pageferryd_migrations{role=\"source\",phase=\"copying\"} 2",
        "pageferryd_migrations{role=\"target\",phase=\"running\"} 1",
        "pageferryd_migrations{role=\"target\",phase=\"ready\"} 0",
        "pageferryd_promised_bytes 1073741824",
        "pageferryd_stored_bytes 1048576",
        "pageferryd_journals{kind=\"outcome\"} 5",
        "pageferryd_journal_bytes 4096",
    ] {
        assert!(text.lines().any(|one| one == line), "{line}:\n{text}");
    }
}

#[test]
fn nothing_new_appears_under_load() {
    let names = |text: &str| -> Vec<String> {
        let series = text.lines().filter(|line| !line.starts_with('#'));
        let name = |line: &str| line.rsplit_once(' ').map(|(name, _)| name.to_owned());
        let mut all: Vec<String> = series.filter_map(name).collect();
        all.sort();
        all
    };
    let idle = names(&metrics().text(&Standing::default()));
    assert_eq!(idle, names(&busy().text(&standing())));
    // Bounded: two hundred codes, and a few dozen others.
    assert!(idle.len() < 500, "{}", idle.len());
}

#[test]
fn what_waits_is_counted_while_it_does() {
    let metrics = metrics();
    let depth = |name: &str| {
        let text = metrics.text(&Standing::default());
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.expect("it is there").to_owned()
    };
    let (one, two) = (metrics.queued(100), metrics.queued(50));
    let stream = metrics.receiving();
    assert_eq!(depth("pageferryd_send_queue_bytes"), "150");
    assert_eq!(depth("pageferryd_receiving_streams"), "1");
    drop((one, stream));
    assert_eq!(depth("pageferryd_send_queue_bytes"), "50");
    assert_eq!(depth("pageferryd_receiving_streams"), "0");
    drop(two);
    assert_eq!(depth("pageferryd_send_queue_bytes"), "0");
}

/// The catalogue is a table: `name`, kind, labels, what it is.
#[test]
fn the_catalogue_has_every_metric_and_no_other() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/README.md");
    let document = fs::read_to_string(path).expect("the document");
    let row = |line: &str| {
        let mut cells = line.strip_prefix("| `pageferryd_")?.split(" | ");
        let name = format!("pageferryd_{}", cells.next()?.strip_suffix('`')?);
        let (kind, labels) = (cells.next()?.to_owned(), cells.next()?.to_owned());
        let help = cells.next()?.trim_end_matches(" |").to_owned();
        Some((name, (kind, labels, help)))
    };
    let written: BTreeMap<_, _> = document.lines().filter_map(row).collect();
    let text = busy().text(&standing());
    let told = families(&text);
    for (name, (kind, help)) in &told {
        let Some((in_table, labels, what)) = written.get(name) else {
            panic!("deploy/README.md lacks {name}");
        };
        assert_eq!(in_table, kind, "{name}");
        let plain = help.trim_end_matches('.');
        assert_eq!(what, plain, "{name}");
        for label in labels_of(&text, name) {
            assert!(labels.contains(&format!("`{label}`")), "{name}: {label}");
        }
    }
    for name in written.keys() {
        assert!(told.contains_key(name), "there is no {name}");
    }
}

/// The labels of a metric's series, without those of the format.
fn labels_of(text: &str, name: &str) -> Vec<String> {
    let rest = |line: &str| {
        let rest = line.strip_prefix(name)?;
        // Of this metric, and not of one whose name is longer.
        let (suffix, rest) = rest.split_once('{')?;
        let known = ["", "_total", "_bucket", "_sum", "_count", "_info"];
        known.contains(&suffix).then(|| rest.to_owned())
    };
    let of_line = |rest: String| {
        let inside = rest.split('}').next().unwrap_or_default().to_owned();
        let keys = inside.split(',').filter_map(|pair| pair.split('=').next());
        keys.map(str::to_owned).collect::<Vec<_>>()
    };
    let mut all: Vec<String> = text.lines().filter_map(rest).flat_map(of_line).collect();
    all.sort();
    all.dedup();
    all.retain(|label| label != "le");
    all
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("it listens");
    let ask = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
    stream.write_all(ask.as_bytes()).await.expect("it is heard");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("an answer");
    answer
}

use std::net::SocketAddr;

#[tokio::test]
async fn they_are_served_at_one_path() {
    let any = "127.0.0.1:0".parse().expect("an address");
    let ask = || async { standing() };
    let (address, serving) = serve(any, busy(), ask).await.expect("it listens");
    let answer = get(address, "/metrics").await;
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.contains("application/openmetrics-text"), "{head}");
    assert!(
        body.contains("pageferryd_promised_bytes 1073741824"),
        "{body}"
    );
    assert!(get(address, "/").await.starts_with("HTTP/1.1 404"));
    let taken = serve(address, metrics(), ask)
        .await
        .expect_err("it is taken");
    assert!(taken.to_string().contains(&address.to_string()), "{taken}");
    serving.abort();
}

#[tokio::test]
async fn more_than_a_few_at_once_are_told_to_come_again() {
    let (go, wait) = tokio::sync::watch::channel(false);
    let (came, mut comes) = tokio::sync::mpsc::unbounded_channel();
    let ask = move || {
        let (mut wait, came) = (wait.clone(), came.clone());
        async move {
            came.send(()).expect("the test counts");
            wait.wait_for(|go| *go).await.expect("the test says so");
            Standing::default()
        }
    };
    let any = "127.0.0.1:0".parse().expect("an address");
    let (address, serving) = serve(any, metrics(), ask).await.expect("it listens");
    let waiting: Vec<_> = (0..4)
        .map(|_| tokio::spawn(async move { get(address, "/metrics").await }))
        .collect();
    for _ in &waiting {
        comes.recv().await.expect("it is asked");
    }
    assert!(get(address, "/metrics").await.starts_with("HTTP/1.1 503"));
    go.send_replace(true);
    for one in waiting {
        assert!(
            one.await
                .expect("it is answered")
                .starts_with("HTTP/1.1 200")
        );
    }
    serving.abort();
}
