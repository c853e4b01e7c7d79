//! The commands, carried out.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use pageferry_api::control_client::ControlClient;
use pageferry_api::{
    self as schema, AbortRequest, ExpectRequest, ForgetRequest, ListRequest, MigrateRequest,
    ProceedRequest, ResolveRequest, ShowRequest, Status, WatchRequest,
};
use pageferry_proto::migration::handoff::Side;
use serde::Serialize;
use tokio::time::{Instant, timeout_at};
use tonic::Streaming;
use tonic::transport::Channel;

use super::args::{CaCommand, Cli, Command, Engine, MigrateArgs, OneArgs, SetupArgs};
use super::ca;
use super::client::{self, CallError};
use super::output::{self, Known, Listed, Moved};
use super::progress::Shown;
use super::setup::{self, kubernetes};
use crate::config::units::Span;
use crate::telemetry::Chain;

/// Carries `cli` out; the code is what the process exits with.
pub async fn run(cli: Cli) -> ExitCode {
    match carry_out(cli).await {
        Ok(code) => code,
        Err(error) => {
            complain(&Chain(&error).to_string());
            exit_code(&error)
        }
    }
}

async fn carry_out(cli: Cli) -> Result<ExitCode, CallError> {
    let command = match cli.command {
        Command::Ca(command) => return Ok(certificates(&command)),
        Command::Setup(arguments) => return Ok(set_up(&arguments)),
        other => other,
    };
    if let Command::Migrate(arguments) = command {
        return Ok(migrate(&cli.socket, arguments).await);
    }
    let mut daemon = client::connect(&cli.socket).await?;
    match command {
        Command::List(arguments) => {
            let all = arguments.all;
            let known = daemon.list(ListRequest { all }).await?.into_inner();
            if arguments.json {
                say_json(&Listed::of(&known));
            } else {
                say(&output::list(&known));
            }
        }
        Command::Show(arguments) => {
            let request = ShowRequest {
                id: arguments.id.to_string(),
            };
            let status = daemon.show(request).await?.into_inner();
            if arguments.json {
                say_json(&Known::of(&status));
            } else if status.r#final && status.role() == schema::Side::Source {
                say(&output::summary(&status));
            } else {
                say(&output::line(&status));
            }
        }
        Command::Watch(arguments) => return watch(daemon, &arguments).await,
        Command::Abort { id } => return abort(daemon, &id.to_string()).await,
        Command::Forget { id, sure } => {
            let id = id.to_string();
            daemon
                .forget(ForgetRequest {
                    id: id.clone(),
                    sure,
                })
                .await?;
            say(&format!("{id} is forgotten"));
        }
        Command::Proceed { id } => {
            let request = ProceedRequest { id: id.to_string() };
            daemon.proceed(request).await?;
            say(&format!("{id} goes on"));
        }
        Command::Expect { id, pod } => {
            let request = ExpectRequest {
                id: id.to_string(),
                pod_uid: pod.to_string(),
            };
            daemon.expect(request).await?;
            say(&format!("{id} comes as pod {pod}"));
        }
        Command::Resolve { id, fenced } => {
            resolve(daemon, id.to_string(), Side::from(fenced)).await?;
        }
        // They were carried out above.
        Command::Ca(_) | Command::Migrate(_) | Command::Setup(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Tells that a side is dead.
async fn resolve(
    mut daemon: ControlClient<Channel>,
    id: String,
    fenced: Side,
) -> Result<(), CallError> {
    let fenced = match fenced {
        Side::Source => schema::Side::Source,
        Side::Target => schema::Side::Target,
    };
    let told = format!("told: see `pageferry show {id}` for what comes of it");
    let request = ResolveRequest {
        id,
        fenced: fenced.into(),
    };
    daemon.resolve(request).await?;
    say(&told);
    Ok(())
}

async fn migrate(socket: &std::path::Path, arguments: MigrateArgs) -> ExitCode {
    let (workload, to) = (arguments.workload.to_string(), arguments.to.to_string());
    let (json, detach) = (arguments.json, arguments.detach);
    let mut id = None;
    let ended = async {
        let mut daemon = client::connect(socket).await?;
        let started = daemon.migrate(request(arguments)).await?.into_inner();
        id = Some(started.id.clone());
        if detach {
            return Ok(None);
        }
        // What every other command asks for.
        tell(&format!("migration {}", started.id));
        to_its_end(daemon, &started.id).await.map(Some)
    };
    match ended.await {
        Ok(None) => {
            say(id.as_deref().unwrap_or_default());
            ExitCode::SUCCESS
        }
        Ok(Some(status)) => {
            if json {
                say_json(&Moved::of(&status));
            } else {
                say(&output::summary(&status));
            }
            if status.moved {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => {
            if json {
                say_json(&Moved::failed(id, workload, to, &error));
            }
            complain(&Chain(&error).to_string());
            exit_code(&error)
        }
    }
}

fn request(arguments: MigrateArgs) -> MigrateRequest {
    let micros = |span: Span| u64::try_from(span.0.as_micros()).unwrap_or(u64::MAX);
    MigrateRequest {
        workload: arguments.workload.to_string(),
        to: arguments.to.to_string(),
        downtime_max_us: arguments.downtime_max.map(micros),
        timeout_us: arguments.timeout.map(micros),
        rounds_max: arguments.rounds_max,
        shared_paths: arguments.shared,
        copied_paths: arguments.copy,
        hold: arguments.hold,
        mode: arguments.mode.map(|mode| mode.to_string()),
        on_timeout: arguments.on_timeout.map(|what| what.to_string()),
        verify: arguments.verify,
        force_eager: arguments.force_eager,
        force_cpu: arguments.force_cpu,
        force_ipc: arguments.force_ipc,
        frozen_max_us: arguments.frozen_max.map(micros),
        id: arguments.id.map(|id| id.to_string()),
        join_network: arguments.join_network.map(|name| name.to_string()),
    }
}

/// Follows a migration and those started in its place, and gives it up when interrupted; a second
/// interrupt leaves it alone.
async fn to_its_end(mut daemon: ControlClient<Channel>, id: &str) -> Result<Status, CallError> {
    let mut id = id.to_owned();
    let mut statuses = daemon
        .watch(WatchRequest { id: id.clone() })
        .await?
        .into_inner();
    let mut shown = Shown::new();
    let mut asked = false;
    let last = loop {
        tokio::select! {
            status = next(&mut statuses) => {
                let status = status?;
                shown.show(&status);
                if status.r#final && status.successor.is_empty() {
                    break status;
                }
                if status.r#final {
                    id = status.successor;
                    let request = WatchRequest { id: id.clone() };
                    statuses = daemon.watch(request).await?.into_inner();
                }
            }
            Ok(()) = tokio::signal::ctrl_c() => {
                if std::mem::replace(&mut asked, true) {
                    return Err(CallError::Interrupted { id });
                }
                let answer = daemon.abort(AbortRequest { id: id.clone() }).await;
                complain(&match answer {
                    Ok(_) => "giving up; interrupt again to leave without waiting".to_owned(),
                    Err(status) => CallError::from(status).to_string(),
                });
            }
        }
    };
    shown.end();
    Ok(last)
}

/// Asks to give a migration up, waits for a while, and tells what came of it.
async fn abort(mut daemon: ControlClient<Channel>, id: &str) -> Result<ExitCode, CallError> {
    let id = || id.to_owned();
    let before = daemon.show(ShowRequest { id: id() }).await?.into_inner();
    if before.r#final {
        complain(&format!("it is over already: {}", output::line(&before)));
        return Ok(ExitCode::FAILURE);
    }
    daemon.abort(AbortRequest { id: id() }).await?;
    let mut statuses = daemon.watch(WatchRequest { id: id() }).await?.into_inner();
    let deadline = Instant::now() + ABORT_PATIENCE;
    let last = loop {
        match timeout_at(deadline, next(&mut statuses)).await {
            Ok(status) => {
                let status = status?;
                if status.r#final {
                    break status;
                }
            }
            Err(_) => {
                let now = daemon.show(ShowRequest { id: id() }).await?.into_inner();
                say(&format!(
                    "asked, and not over yet ({}): `pageferry watch {}` tells its end",
                    output::line(&now),
                    id()
                ));
                return Ok(ExitCode::SUCCESS);
            }
        }
    };
    match last.role() {
        schema::Side::Source => say(&output::summary(&last)),
        schema::Side::Target | schema::Side::Unspecified => say(&output::line(&last)),
    }
    // It came too late to be heeded.
    Ok(if last.moved {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    })
}

async fn watch(
    mut daemon: ControlClient<Channel>,
    arguments: &OneArgs,
) -> Result<ExitCode, CallError> {
    let request = WatchRequest {
        id: arguments.id.to_string(),
    };
    let mut statuses = daemon.watch(request).await?.into_inner();
    let mut shown = Shown::new();
    loop {
        let status = next(&mut statuses).await?;
        if arguments.json {
            say_json(&Known::of(&status));
        } else {
            shown.show(&status);
        }
        if !status.r#final {
            continue;
        }
        shown.end();
        if !arguments.json && status.role() == schema::Side::Source {
            say(&output::summary(&status));
        }
        return Ok(if status.moved {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        });
    }
}

/// The next status; a stream that ends before its migration does is a daemon that went away.
async fn next(statuses: &mut Streaming<Status>) -> Result<Status, CallError> {
    let gone = || tonic::Status::unavailable("the stream of statuses ended early");
    Ok(statuses.message().await?.ok_or_else(gone)?)
}

fn set_up(arguments: &SetupArgs) -> ExitCode {
    let systemd = || Path::new("/run/systemd/system").is_dir();
    let usual = || systemd().then(|| "systemctl restart containerd".to_owned());
    let how = kubernetes::How {
        config: arguments.config.clone(),
        restart: arguments.restart.clone().or_else(usual),
    };
    let done = match (arguments.engine, arguments.check, arguments.remove) {
        (Engine::Containerd, true, _) => setup::check(),
        (Engine::Containerd, _, true) => setup::remove(),
        (Engine::Containerd, ..) => setup::install(),
        (Engine::Kubernetes, true, _) => kubernetes::check(&how),
        (Engine::Kubernetes, _, true) => kubernetes::remove(&how),
        (Engine::Kubernetes, ..) => kubernetes::install(&how),
    };
    match done {
        Ok(text) => {
            say(&text);
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(&Chain(&error).to_string());
            ExitCode::FAILURE
        }
    }
}

fn certificates(command: &CaCommand) -> ExitCode {
    let issued = match command {
        CaCommand::Init(ca) => ca::init(&ca.dir, ca.force),
        CaCommand::Issue { node, ca } => ca::issue(&ca.dir, node, ca.force),
    };
    match issued {
        Ok(issued) => {
            for file in [&issued.certificate, &issued.key] {
                say(&file.display().to_string());
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            complain(&Chain(&error).to_string());
            ExitCode::FAILURE
        }
    }
}

fn exit_code(error: &CallError) -> ExitCode {
    match error {
        CallError::Unreachable { .. } | CallError::Lost(_) => ExitCode::from(UNREACHABLE),
        CallError::Refused { code, .. } if code == "invalid-argument" => ExitCode::from(USAGE),
        CallError::Interrupted { .. } | CallError::Refused { .. } => ExitCode::FAILURE,
    }
}

fn say(text: &str) {
    // A reader that has gone away wants no more.
    drop(writeln!(io::stdout(), "{text}"));
}

fn say_json(object: &impl Serialize) {
    say(&serde_json::to_string(object).expect("plain structs have a JSON form"));
}

fn complain(text: &str) {
    tell(&format!("pageferry: {text}"));
}

/// What is no result.
fn tell(text: &str) {
    // There is nobody to tell that stderr is closed.
    drop(writeln!(io::stderr(), "{text}"));
}

/// How long `abort` waits for the end of what it asked to give up.
const ABORT_PATIENCE: Duration = Duration::from_secs(10);

/// Exit code of wrong usage, which is clap's too.
const USAGE: u8 = 2;

/// Exit code of a daemon that cannot be reached, or went away.
const UNREACHABLE: u8 = 3;
