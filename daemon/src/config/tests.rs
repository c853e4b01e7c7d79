use expect_test::{Expect, expect};

use super::*;
use crate::telemetry::Chain;

/// Resolves a file with two flags that every daemon needs.
fn resolve(file: &str, flags: &[&str]) -> Result<Config, ConfigError> {
    let flags = [&["pageferryd"], flags].concat();
    let args = <DaemonArgs as clap::Parser>::try_parse_from(flags).unwrap();
    Config::resolve(file.parse().unwrap(), &args, Path::new("/opt/bin"))
}

fn check_refused(file: &str, expect: &Expect) {
    let error = resolve(file, &["--node", "a", "--listen", "10.0.0.1:7440"]).unwrap_err();
    expect.assert_eq(&Chain(&error).to_string());
}

#[test]
fn everything_but_the_name_and_the_address_has_a_default() {
    let config = resolve("", &["--node", "a", "--listen", "10.0.0.1:7440"]).unwrap();
    expect![[r#"
        Config {
            node: NodeName(
                "a",
            ),
            listen: 10.0.0.1:7440,
            state_dir: "/var/lib/pageferry",
            run_dir: "/run/pageferry",
            tls: TlsFiles {
                authority: "/etc/pageferry/ca.pem",
                certificate: "/etc/pageferry/node.pem",
                key: "/etc/pageferry/node.key",
            },
            peers: {},
            bridge: None,
            parking: Auto,
            postcopy: false,
            criu: "criu",
            view_library: "/usr/lib/pageferry/libcriu_view.so",
            stand_in: "/opt/bin/pageferry-criu",
            tracer: true,
            pager: "/opt/bin/pageferry-pager",
            limits: Limits {
                incoming_max: 4,
                outgoing_max: 4,
                lanes: 2,
                eager_memory_max: 268435456,
            },
            migrate: MigrateDefaults {
                downtime_max: 300ms,
                rounds_max: 30,
                timeout: 3600s,
                frozen_max: None,
            },
        }
    "#]]
    .assert_debug_eq(&config);
}

const FULL: &str = r#"
    node = "a"
    listen = "10.0.0.1:7440"
    state_dir = "/s"
    run_dir = "/r"
    postcopy = true
    [tls]
    ca = "/t/ca"
    certificate = "/t/crt"
    key = "/t/key"
    [[peer]]
    name = "b"
    address = "10.0.0.2:7440"
    [[peer]]
    name = "c"
    address = "[fd00::3]:7440"
    [network]
    bridge = "br0"
    parking = "capture"
    [criu]
    path = "/c"
    view_library = "/v"
    stand_in = "/i"
    tracer = true
    [pager]
    path = ""
    [limits]
    incoming_max = 1
    outgoing_max = 2
    lanes = 3
    eager_memory_max = "1MiB"
    [migrate]
    downtime_max = "50ms"
    rounds_max = 7
    timeout = "10m"
    frozen_max = "3s"
"#;

#[test]
fn a_file_may_say_everything() {
    let config = resolve(FULL, &[]).unwrap();
    assert_eq!(config.peers.len(), 2);
    assert_eq!(config.bridge.as_deref(), Some("br0"));
    assert_eq!(config.parking, Parking::Capture);
    assert!(config.postcopy);
    assert_eq!(config.pager, Path::new("/opt/bin/pageferry-pager"));
    assert_eq!(config.limits.lanes, 3);
    assert_eq!(config.migrate.timeout, Duration::from_secs(600));
    assert_eq!(config.migrate.frozen_max, Some(Duration::from_secs(3)));
    assert_eq!(config.api_socket(), Path::new("/r/api.sock"));
}

#[test]
fn a_flag_wins_over_the_file() {
    let flags = [
        "--node=z",
        "--listen=1.2.3.4:5",
        "--state-dir=/fs",
        "--run-dir=/fr",
        "--tls-ca=/fa",
        "--tls-certificate=/fc",
        "--tls-key=/fk",
        "--peer=b=9.9.9.9:9",
        "--bridge=fb",
        "--parking=off",
        "--postcopy=false",
        "--criu=/fcriu",
        "--criu-view-library=/fv",
        "--criu-stand-in=/fi",
        "--criu-tracer=false",
        "--pager=/fp",
        "--incoming-max=11",
        "--outgoing-max=12",
        "--lanes=8",
        "--eager-memory-max=13B",
        "--downtime-max=15s",
        "--rounds-max=16",
        "--timeout=17s",
        "--frozen-max=18s",
    ];
    let by_file = resolve(FULL, &[]).unwrap();
    let by_flag = resolve(FULL, &flags).unwrap();
    // Every line of the one differs from the other, but for what cannot.
    let lines = |config: &Config| {
        let text = format!("{config:#?}");
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    let same: Vec<_> = lines(&by_file)
        .into_iter()
        .zip(lines(&by_flag))
        .filter(|(file, flag)| file == flag && file.contains(':') && !file.ends_with(['{', '(']))
        .map(|(file, _)| file)
        .collect();
    assert_eq!(same, ["        ): [fd00::3]:7440,"]);
}

#[test]
fn an_unknown_key_is_refused_with_the_nearest_one() {
    check_refused(
        "[limits]\nincomming_max = 3",
        &expect![
            "configuration key limits.incomming_max is not known: did you mean limits.incoming_max?"
        ],
    );
    check_refused(
        "stat_dir = '/x'",
        &expect!["configuration key stat_dir is not known: did you mean state_dir?"],
    );
    check_refused(
        "[[peer]]\nname = 'b'\naddress = '1.1.1.1:1'\nport = 3",
        &expect!["configuration key peer.port is not known"],
    );
    check_refused(
        "[metrics]\nlisten = 'x'",
        &expect!["configuration key metrics is not known"],
    );
}

#[test]
fn a_missing_key_is_named_with_its_flag() {
    let error = resolve("node = 'a'", &[]).unwrap_err();
    expect!["configuration key listen is missing: set it in the file, or give --listen"]
        .assert_eq(&error.to_string());
}

#[test]
fn a_wrong_value_is_refused_by_its_key() {
    check_refused(
        "node = 'A b'",
        &expect![[
            r#"configuration key node has a wrong value: node name "A b" is not 1 to 63 characters of a-z, 0-9 and -"#
        ]],
    );
    check_refused(
        "listen = 7440",
        &expect!["configuration key listen must be a string, and is integer"],
    );
    check_refused(
        "[migrate]\ndowntime_max = '300'",
        &expect![[
            r#"configuration key migrate.downtime_max has a wrong value: "300" has no unit: write it like 300ms, 10s or 1h30m"#
        ]],
    );
    check_refused(
        "[migrate]\ntimeout = '0s'",
        &expect!["configuration key migrate.timeout must be above zero"],
    );
    check_refused(
        "[migrate]\nfrozen_max = '0ms'",
        &expect!["configuration key migrate.frozen_max must be above zero"],
    );
    check_refused(
        "[limits]\nlanes = 9",
        &expect!["configuration key limits.lanes must be 1 to 8, and is 9"],
    );
    check_refused(
        "[limits]\nlanes = -1",
        &expect!["configuration key limits.lanes must be 1 to 8, and is -1"],
    );
    check_refused(
        "limits = 3",
        &expect!["configuration key limits must be a section [...], and is integer"],
    );
    check_refused(
        "peer = ['b']",
        &expect!["configuration key peer must be sections [[...]], and is string"],
    );
    check_refused(
        "state_dir = 'x/y'",
        &expect!["configuration key state_dir must be an absolute path, and is x/y"],
    );
}

#[test]
fn a_peer_is_somebody_else_and_listed_once() {
    let peer = |name| format!("[[peer]]\nname = '{name}'\naddress = '1.1.1.1:1'\n");
    check_refused(
        &peer("a"),
        &expect!["configuration key peer.name: a is this node itself"],
    );
    check_refused(
        &[peer("b"), peer("b")].concat(),
        &expect!["configuration key peer.name: b is listed twice"],
    );
}

#[test]
fn a_file_that_was_named_must_exist() {
    let args = DaemonArgs {
        config: Some("/nonexistent/pageferryd.toml".into()),
        ..DaemonArgs::default()
    };
    let error = Config::load(&args).unwrap_err();
    assert!(matches!(error, ConfigError::Read { .. }), "{error}");
}

#[test]
fn a_file_that_is_not_toml_says_where() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    std::fs::write(&path, "node = \n").unwrap();
    let args = DaemonArgs {
        config: Some(path),
        ..DaemonArgs::default()
    };
    let error = Config::load(&args).unwrap_err();
    assert!(Chain(&error).to_string().contains("line 1"), "{error}");
}
