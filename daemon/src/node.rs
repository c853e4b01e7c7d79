//! The composition root: the only place where the parts of a daemon are made and joined.
//!
//! Order matters at the start: what this node can do is asked before the journals are read, the
//! journals are read before anybody can connect, and the control socket opens last, so that whoever
//! reaches it finds a daemon that knows all its migrations.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use criu_glue::probe::Capabilities;
use nix::unistd::{AccessFlags, access};
use pageferry_cgroup::freezer::FreezerRoot;
use pageferry_cgroup::hierarchies::Hierarchies;
use pageferry_ipam::Folders;
use pageferry_pages::track::Support;
use pageferry_proto::migration::policy::Policy;
use tokio::signal::unix::{SignalKind, signal};

use crate::api;
use crate::config::Config;
use crate::config::parking::Parking;
use crate::link::hold::Holds;
use crate::link::park::Means;
use crate::link::route;
use crate::migration::journal::Journals;
use crate::migration::registry::{Registry, RegistryParts};
use crate::migration::source::site::SourceNode;
use crate::migration::target::admission::Ledger;
use crate::migration::target::folders::Shelf;
use crate::migration::target::site::TargetNode;
use crate::net::endpoint::{Endpoint, EndpointConfig};
use crate::net::lanes::Listener;
use crate::net::tls::Credentials;
use crate::runtime::{detached, kind, memory};

/// How often engines are told what they could not be told before.
const SETTLE_EVERY: Duration = Duration::from_secs(1);

/// How often routes are looked for that lead to pods which are not there any more.
const SWEEP_EVERY: Duration = Duration::from_secs(60);

/// Runs a daemon until it is told to stop by SIGTERM or SIGINT. Migrations under way are not waited
/// for: their journals let the next daemon go on with them.
pub async fn run(config: Config) -> anyhow::Result<()> {
    let migrations = make_migrations(&config)?;
    raise_descriptor_limit();
    let support = Support::probe().context("this node cannot be a source or a target")?;
    let freezers = FreezerRoot::detect().context("this node cannot freeze workloads")?;
    let hierarchies = Hierarchies::detect().context("this node's cgroups cannot be found")?;
    let criu_version = probe_criu(&config).await?;
    check_stand_in(&config.stand_in)?;
    let workers = std::thread::available_parallelism().map_or(2, std::num::NonZero::get);
    let endpoint = Arc::new(endpoint_of(&config)?);
    let shelf = Shelf::new(config.folders_dir());
    kind::go_on_ending();
    let journals = Journals::open(&config.journal_dir()).context("opening the journals")?;
    let registry = Registry::recover(RegistryParts {
        source: SourceNode {
            criu: config.criu.clone(),
            view_library: config.view_library.clone(),
            stand_in: config.stand_in.clone(),
            tracer: config.tracer,
            criu_version,
            migrations: migrations.clone(),
            freezers: freezers.clone(),
            hierarchies: hierarchies.clone(),
            support,
            workers,
            eager_memory_max: config.limits.eager_memory_max,
            keep: shelf.keep(),
            parking: means(config.parking),
            postcopy: config.postcopy,
        },
        target: TargetNode {
            criu: config.criu.clone(),
            view_library: config.view_library.clone(),
            stand_in: config.stand_in.clone(),
            criu_version,
            pager: config.pager.clone(),
            migrations,
            freezers,
            memory: memory_of(hierarchies.clone()),
            hierarchies,
            bridge: config.bridge.clone(),
            holds: Holds::default(),
            shelf,
            workers,
            parks: config.parking != Parking::Off,
            drains: config.postcopy,
        },
        endpoint: Arc::clone(&endpoint),
        journals,
        lanes: config.limits.lanes,
        incoming_max: config.limits.incoming_max,
        outgoing_max: config.limits.outgoing_max,
    })
    .await
    .context("reading the journals")?;
    let defaults = defaults(&config);
    let listener = Listener::start(endpoint);
    let control = api::LocalControl::new(config.node.clone(), registry.clone(), defaults);
    let served = api::serve(&config.api_socket(), control).context("opening the control socket")?;
    tracing::info!(node = %config.node, listen = %config.listen, peers = config.peers.len(),
        socket = %config.api_socket().display(), "ready");
    let upkeep = tokio::spawn(async { tokio::join!(settle_what_is_left(), sweep_routes()) });
    let told = accept_until_told_to_stop(listener, &registry).await;
    upkeep.abort();
    told?;
    tracing::info!("stopping");
    registry.give_up().await;
    served.stop().await;
    Ok(())
}

/// The folder in which each migration has one of its own.
fn make_migrations(config: &Config) -> anyhow::Result<PathBuf> {
    let migrations = config.run_dir.join("migrations");
    let made = fs::create_dir_all(&migrations);
    made.with_context(|| format!("creating {}", migrations.display()))?;
    Ok(migrations)
}

fn means(parking: Parking) -> Means {
    match parking {
        Parking::Auto => Means::Auto,
        Parking::Capture => Means::Capture,
        Parking::Off => Means::Off,
    }
}

/// Tells engines, again and again, what they could not be told when it happened.
async fn settle_what_is_left() {
    loop {
        tokio::time::sleep(SETTLE_EVERY).await;
        if let Err(error) = detached::done("settle", kind::settle_left).await {
            tracing::warn!("{error}");
        }
    }
}

/// Deletes routes to addresses that have been given back, at once and again and again.
async fn sweep_routes() {
    loop {
        if let Err(error) = sweep_routes_once().await {
            tracing::warn!("routes to pods that have moved: {error:#}");
        }
        tokio::time::sleep(SWEEP_EVERY).await;
    }
}

/// Where pods' addresses are nobody's business, all routes stay.
async fn sweep_routes_once() -> anyhow::Result<()> {
    let led = tokio::time::timeout(SWEEP_EVERY, route::led()).await;
    let led = led.context("the kernel does not answer")??;
    if led.is_empty() {
        return Ok(());
    }
    // After that: an address is written down before this node leads there.
    let moved = detached::done("addresses", || Folders::of_node().moved());
    let Some(moved) = moved.await?? else {
        return Ok(());
    };
    for one in led {
        let address = one.address;
        if moved.contains(&address) {
            continue;
        }
        let ended = tokio::time::timeout(SWEEP_EVERY, one.end()).await;
        ended.context("the kernel does not answer")??;
        tracing::info!(%address, "no pod has moved with it: this node leads there as to others");
    }
    Ok(())
}

/// Where peers come, and from where they are met.
fn endpoint_of(config: &Config) -> anyhow::Result<Endpoint> {
    let credentials =
        Credentials::load(&config.tls, &config.node).context("loading certificates")?;
    let endpoint = Endpoint::bind(EndpointConfig {
        listen: config.listen,
        credentials,
        peers: config.peers.clone(),
    });
    endpoint.context("opening the QUIC endpoint")
}

/// What is left of this node's memory, and promised.
fn memory_of(hierarchies: Hierarchies) -> Ledger {
    Ledger::new(move || memory::rooms(&hierarchies))
}

/// How a workload moves of which nobody says more.
fn defaults(config: &Config) -> Policy {
    Policy {
        downtime_max: config.migrate.downtime_max,
        rounds_max: config.migrate.rounds_max,
        timeout: config.migrate.timeout,
        frozen_max: config.migrate.frozen_max,
        ..Policy::DEFAULT
    }
}

/// Takes in the sessions that other nodes open, until a signal to stop.
async fn accept_until_told_to_stop(
    mut listener: Listener,
    registry: &Registry,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("listening for signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listening for signals")?;
    loop {
        tokio::select! {
            session = listener.next() => match session {
                Some(session) => registry.accept(session).await,
                None => anyhow::bail!("the QUIC endpoint is closed"),
            },
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
    }
}

/// Asks CRIU what it is, which also writes its cache of kernel features: without it each start
/// costs 8 to 40 ms.
async fn probe_criu(config: &Config) -> anyhow::Result<u32> {
    let output = config.run_dir.join("criu-probe.out");
    let found = Capabilities::probe(&config.criu, Some(&config.view_library), &output).await;
    let found =
        found.with_context(|| format!("asking {} what it can do", config.criu.display()))?;
    let version = found.version;
    let number = |part: i32| u32::try_from(part).unwrap_or(0);
    anyhow::ensure!(
        version >= criu_glue::probe::VERSION_MIN,
        "criu {}.{} is too old: 4.2 or newer is needed",
        version.major,
        version.minor
    );
    let library = config.view_library.display();
    let seen = found.view.context("criu was not given its library")?;
    seen.with_context(|| format!("{} did not load {library}", config.criu.display()))?;
    anyhow::ensure!(
        found.features.lazy_pages,
        "criu or this kernel lacks lazy pages (userfaultfd)"
    );
    Ok(number(version.major) * 10_000 + number(version.minor) * 100 + number(version.sublevel))
}

/// Fails if container runtimes could not start what they are to find as CRIU: each would end in the
/// middle of its work.
pub fn check_stand_in(program: &Path) -> anyhow::Result<()> {
    let usable = access(program, AccessFlags::X_OK).map_err(std::io::Error::from);
    let usable = usable.and_then(|()| match program.is_file() {
        true => Ok(()),
        false => Err(std::io::Error::other("it is not a file")),
    });
    usable.with_context(|| {
        format!(
            "{} cannot be started, which container runtimes find as criu: install it with the \
             daemon, or say where it is (stand_in in [criu])",
            program.display()
        )
    })
}

/// A workload with many spaces needs a descriptor or two for each.
fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn what_runtimes_find_as_criu_can_be_started() {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("pageferry-criu");
        let refused = |why: &str| {
            let error = format!("{:#}", check_stand_in(&program).unwrap_err());
            assert!(
                error.contains("pageferry-criu") && error.contains(why),
                "{error}"
            );
        };
        refused("No such file");
        fs::write(&program, "").unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o644)).unwrap();
        refused("denied");
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        check_stand_in(&program).unwrap();
    }
}
