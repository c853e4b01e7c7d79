//! nginx of the node image as a workload: a master and two workers.
//!
//! It answers `/echo/N` with a body that says N, and `/blob` with a file of the shared folder.

use std::fs;

use anyhow::{Context, Result};

use super::{Workload, WorkloadPlan};
use crate::lab::Lab;

/// Where it listens.
pub const PORT: u16 = 80;

/// The program.
pub const PROGRAM: &str = "/usr/sbin/nginx";

/// What it serves, and how it is configured: on the storage that nodes share.
pub const FOLDER: &str = "/srv/shared/nginx";

/// Bytes of the file that it serves.
pub const BLOB_BYTES: usize = 48 << 10; // 48 KiB

/// Byte `index` of that file.
pub fn blob_byte(index: usize) -> u8 {
    // Of a period that no page or segment has.
    u8::try_from(index % 251).unwrap_or_default()
}

/// The body of `/echo/NUMBER`.
pub fn echo(number: u64) -> String {
    format!("you asked for /echo/{number}\n").repeat(ECHO_LINES)
}

/// Starts it at a node and waits until it listens.
pub fn start(lab: &mut Lab, node: &str) -> Result<Workload> {
    start_as(lab, |lab, arguments| {
        let plan = WorkloadPlan {
            name: "nginx".to_owned(),
            arguments,
            own_pid_mnt: false,
            uid: None,
        };
        Workload::start(lab, node, &plan)
    })
}

/// As [`start`]; `launch` starts it with its arguments, where [`FOLDER`] is as at the node.
pub fn start_as(
    lab: &mut Lab,
    launch: impl FnOnce(&mut Lab, Vec<String>) -> Result<Workload>,
) -> Result<Workload> {
    write_files(lab)?;
    let configuration = format!("{FOLDER}/nginx.conf");
    let arguments = [PROGRAM, "-c", &configuration];
    let workload = launch(lab, arguments.map(str::to_owned).to_vec())?;
    workload.wait_until_it_listens(lab, PORT)?;
    Ok(workload)
}

/// Writes what it serves, `blob`, and how it is configured, `nginx.conf`, to [`FOLDER`].
pub fn write_files(lab: &Lab) -> Result<()> {
    let folder = lab.folder.shared().join("nginx");
    fs::create_dir_all(&folder).context("creating nginx's folder")?;
    let blob: Vec<u8> = (0..BLOB_BYTES).map(blob_byte).collect();
    fs::write(folder.join("blob"), blob).context("writing what nginx serves")?;
    fs::write(folder.join("nginx.conf"), configuration()).context("configuring nginx")
}

/// Nothing is written to a folder of one node alone, but for the temporary folders that nginx makes
/// at its start and does not use here.
fn configuration() -> String {
    let line = "you asked for $uri\\n".repeat(ECHO_LINES);
    format!(
        "daemon off;
         user www-data;
         worker_processes 2;
         error_log /dev/null;
         pid {FOLDER}/pid;
         events {{ worker_connections 8192; }}
         http {{
             access_log off;
             default_type application/octet-stream;
             keepalive_timeout 0;
             server {{
                 listen {PORT} backlog=1024;
                 location /echo/ {{ return 200 \"{line}\"; }}
                 location = /blob {{ root {FOLDER}; }}
             }}
         }}
        "
    )
}

/// 2 KiB or so: nginx takes no longer text.
const ECHO_LINES: usize = 100;
