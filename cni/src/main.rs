//! `pageferry-ipam`: see the library beside it.

#![forbid(unsafe_code)]

use std::env;
use std::io::{self, Read, Write};
use std::net::Ipv4Addr;
use std::process::ExitCode;

use pageferry_ipam::{Failure, Folders, Request, act, release};

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        [] => serve(),
        ["release", address] => give_back(address),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

/// One request of a network plugin.
fn serve() -> ExitCode {
    let mut input = Vec::new();
    let read = io::stdin().lock().take(INPUT_MAX).read_to_end(&mut input);
    let variable = |name: &str| env::var(name).ok();
    if variable("CNI_COMMAND").is_none() {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    }
    // What cannot be read is no configuration.
    let request = read.map_or_else(
        |_| Request::read(variable, b""),
        |_| Request::read(variable, &input),
    );
    let version = request.as_ref().map_or("", Request::version).to_owned();
    let (output, code) = match request.and_then(|request| act(&request)) {
        Ok(outcome) => {
            if let Some(trouble) = outcome.trouble {
                eprintln!("pageferry-ipam: giving back what came back: {trouble}");
            }
            (outcome.output, ExitCode::SUCCESS)
        }
        Err(failure) => (explain(&failure, &version), ExitCode::FAILURE),
    };
    match io::stdout().lock().write_all(&output) {
        Ok(()) => code,
        Err(_) => ExitCode::FAILURE,
    }
}

fn explain(failure: &Failure, version: &str) -> Vec<u8> {
    let version = if version.is_empty() { "1.1.0" } else { version };
    format!("{}\n", failure.object(version)).into_bytes()
}

fn give_back(address: &str) -> ExitCode {
    let Ok(address) = address.parse::<Ipv4Addr>() else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match release(&Folders::of_node(), address) {
        Ok(true) => println!("{address} is this node's again"),
        Ok(false) => println!("{address} was not away"),
        Err(failure) => {
            eprintln!("pageferry-ipam: {failure}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

const USAGE: &str = "\
pageferry-ipam is started by CNI's network plugins, as the ipam of their configuration.
Usage: pageferry-ipam release ADDRESS
  Gives an address back to this node's range whose pod has moved away, and is gone.";
/// Configurations have a few kilobytes.
const INPUT_MAX: u64 = 16 << 20; // 16 MiB
