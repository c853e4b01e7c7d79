//! `pageferry-criu`, linked to as `criu`: see the library beside it. Linked to as `tar`, for the
//! CRIU that it becomes: see [`tar`].

mod sys;
mod tar;

use std::convert::Infallible;
use std::env;
use std::ffi::OsString;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use criu_gate::{DESCRIPTORS_MAX, HELLO, Instructions, PACKET_MAX, PROGRAM, SOCKET, TAR, Value};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, connect, sendmsg, socket,
};

/// It says nothing of what went wrong: whoever holds the gate knows, and standard error may be the
/// container's.
fn main() -> ExitCode {
    let Err(_) = run();
    ExitCode::FAILURE
}

fn run() -> io::Result<Infallible> {
    let arguments: Vec<OsString> = env::args_os().collect();
    if let Some((name, rest)) = arguments.split_first()
        && name == TAR
    {
        return Err(tar::run(rest));
    }
    let number = match &arguments[..] {
        [_, mode, number] if mode == "swrk" => number.to_str().and_then(|text| text.parse().ok()),
        _ => None,
    };
    let number = number.ok_or(io::ErrorKind::InvalidInput)?;
    let runtime = sys::inherited(number).ok_or(io::ErrorKind::InvalidInput)?;
    let path = env::var_os("PATH").unwrap_or_default();
    let folder = folder(arguments.first(), &path).ok_or(io::ErrorKind::NotFound)?;
    let gate = dial(&folder.join(SOCKET))?;
    let rights = [runtime.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&rights)];
    let hello = [IoSlice::new(HELLO)];
    sendmsg::<()>(
        gate.as_raw_fd(),
        &hello,
        &rights,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    wait(gate.as_fd(), runtime)?;
    let (packet, descriptors) = sys::receive(&gate, PACKET_MAX, DESCRIPTORS_MAX)?;
    drop(gate);
    let instructions = Instructions::decode(&packet).map_err(io::Error::other)?;
    if descriptors.len() != instructions.descriptors() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    become_criu(&instructions, descriptors, number)
}

/// Where this program was found: there the gate is, too. Of the environment only `PATH` arrives
/// from every runtime.
fn folder(name: Option<&OsString>, path: &OsString) -> Option<PathBuf> {
    let named = name.map(Path::new).and_then(Path::parent);
    if let Some(folder) = named.filter(|folder| folder.is_absolute()) {
        return Some(folder.to_owned());
    }
    env::split_paths(path).find(|folder| folder.join(PROGRAM).exists())
}

fn dial(path: &Path) -> io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::Unix, SockType::SeqPacket);
    let gate = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    connect(gate.as_raw_fd(), &UnixAddr::new(path)?)?;
    Ok(gate)
}

/// Waits until the gate says something, or closes. A runtime that has ended needs no CRIU.
fn wait(gate: BorrowedFd<'_>, runtime: BorrowedFd<'_>) -> io::Result<()> {
    loop {
        // Of the runtime only its end is heard: what it says is for others.
        let mut both = [
            PollFd::new(gate, PollFlags::POLLIN),
            PollFd::new(runtime, PollFlags::empty()),
        ];
        poll(&mut both, PollTimeout::NONE)?;
        let [gate, runtime] = both.map(|one| one.revents().is_some_and(|seen| !seen.is_empty()));
        if gate {
            return Ok(());
        }
        if runtime {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
    }
}

fn become_criu(
    instructions: &Instructions,
    descriptors: Vec<OwnedFd>,
    number: i32,
) -> io::Result<Infallible> {
    let mut descriptors = descriptors.into_iter();
    let socket = descriptors.next().ok_or(io::ErrorKind::InvalidData)?;
    for namespace in descriptors.by_ref().take(instructions.namespaces) {
        setns(namespace, CloneFlags::empty())?;
    }
    if !instructions.huge_pages {
        sys::no_huge_pages()?;
    }
    let mut command = Command::new(&instructions.program);
    command
        .arg0(PROGRAM)
        .args(["--no-default-config", "swrk", &number.to_string()])
        .env_clear();
    let kept: Vec<OwnedFd> = descriptors.collect();
    kept.iter().try_for_each(sys::keep)?;
    let mut numbers = kept.iter().map(|kept| kept.as_raw_fd().to_string());
    for (name, value) in &instructions.environment {
        match value {
            Value::Text(text) => command.env(name, text),
            Value::Descriptor => command.env(name, numbers.next().unwrap_or_default()),
        };
    }
    sys::put_at(&socket, number)?;
    drop(socket);
    Err(command.exec())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_is_where_the_program_was_found() {
        let made = tempfile();
        std::fs::write(made.join(PROGRAM), "").expect("a folder");
        let path = |first: &str| OsString::from(format!("{first}:{}:/usr/sbin", made.display()));
        let by_path = path("/nowhere");
        assert_eq!(folder(Some(&PROGRAM.into()), &by_path), Some(made.clone()));
        let named = OsString::from("/elsewhere/criu");
        assert_eq!(folder(Some(&named), &by_path), Some("/elsewhere".into()));
        assert_eq!(folder(Some(&"criu".into()), &"/nowhere".into()), None);
        std::fs::remove_dir_all(made).expect("ours");
    }

    fn tempfile() -> PathBuf {
        let folder = env::temp_dir().join(format!("criu-gate-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for temporary files");
        folder
    }
}
