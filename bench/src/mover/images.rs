//! CRIU's images between the nodes: two subcommands of `lab`, one at each node, so that what
//! copying costs is the nodes'.
//!
//! A file is the length of its name, its name, its own length (both u64, little endian), its bytes.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Component, Path};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::child::wait_for;
use crate::lab::node::Node;

/// Makes an empty folder for images at a node.
pub fn make_folder(node: &Node) -> Result<()> {
    clear(node)?;
    fs::create_dir(node.path(FOLDER)).context("creating the folder of images")
}

/// Takes a node's images away: they are in its memory.
pub fn clear(node: &Node) -> Result<()> {
    let images = node.path(FOLDER);
    if images.exists() {
        fs::remove_dir_all(&images).context("removing images")?;
    }
    Ok(())
}

/// Who waits for images at the target.
#[derive(Debug)]
pub struct Receiver(Child);

impl Receiver {
    /// Starts one, which listens when this returns.
    pub fn start(target: &Node, folder: &str) -> Result<Self> {
        let command = target.command(LAB)?.args(["receive-images", folder]);
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdout = child
            .stdout
            .take()
            .context("stdout was asked to be a pipe")?;
        let mut line = String::new();
        BufReader::new(stdout)
            .read_line(&mut line)
            .context("waiting for the receiver of images")?;
        ensure!(line == READY, "the receiver of images said {line:?}");
        Ok(Self(child))
    }

    /// Sends all files of the source's folder; how many bytes those were.
    pub fn take(mut self, source: &Node, target: &Node, folder: &str) -> Result<u64> {
        let address = target.address().to_string();
        let command = source.command(LAB)?.args(["send-images", folder, &address]);
        let printed = command.run().context("sending the images")?;
        let complete = wait_for(&mut self.0, "the receiver of images", TIME_MAX)?;
        ensure!(complete, "the receiver of images failed");
        let bytes = printed.trim().parse();
        bytes.with_context(|| format!("the sender of images said {printed:?}"))
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        // After a dump that failed it still listens.
        if matches!(self.0.try_wait(), Ok(None)) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// The subcommand `lab send-images`: prints how many bytes the files had.
pub fn send(folder: &Path, target: Ipv4Addr) -> Result<()> {
    let stream = TcpStream::connect((target, PORT)).context("connecting to the target")?;
    println!("{}", send_files(stream, folder)?);
    Ok(())
}

/// The subcommand `lab receive-images`.
pub fn receive(folder: &Path) -> Result<()> {
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT));
    let listener = TcpListener::bind(any).context("listening for images")?;
    print!("{READY}");
    io::stdout().flush().context("telling the lab")?;
    let (stream, _) = listener.accept().context("accepting the images")?;
    receive_files(stream, folder)
}

fn send_files(mut stream: TcpStream, folder: &Path) -> Result<u64> {
    let mut sent = 0;
    for entry in fs::read_dir(folder).context("listing the images")? {
        let path = entry?.path();
        if !path.is_file() {
            continue;
        }
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .context("an image's name")?;
        let mut file = File::open(&path)?;
        let length = file.metadata()?.len();
        stream.write_all(&(name.len() as u64).to_le_bytes())?;
        stream.write_all(name.as_bytes())?;
        stream.write_all(&length.to_le_bytes())?;
        sent += io::copy(&mut file, &mut stream).context("sending an image")?;
    }
    // The receiver closes when it has everything.
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new())?;
    Ok(sent)
}

fn receive_files(mut stream: TcpStream, folder: &Path) -> Result<()> {
    let mut number = [0; 8];
    while let Ok(()) = stream.read_exact(&mut number) {
        let length = usize::try_from(u64::from_le_bytes(number))?;
        ensure!(length <= NAME_MAX, "an image's name of {length} bytes");
        let mut name = vec![0; length];
        stream.read_exact(&mut name)?;
        stream.read_exact(&mut number)?;
        let length = u64::from_le_bytes(number);
        let name = Path::new(std::str::from_utf8(&name)?);
        let is_plain = matches!(
            name.components().collect::<Vec<_>>()[..],
            [Component::Normal(_)]
        );
        ensure!(is_plain, "an image is called {}", name.display());
        let mut file = File::create(folder.join(name))?;
        let copied = io::copy(&mut (&mut stream).take(length), &mut file)?;
        ensure!(copied == length, "the images ended early");
    }
    Ok(())
}

/// Where nodes have them: in memory, which is the fastest disk there is.
pub const FOLDER: &str = "/tmp/images";
const LAB: &str = "/usr/local/bin/lab";
const PORT: u16 = 7441;
const READY: &str = "listening\n";
const NAME_MAX: usize = 255;
/// After the sender has ended, what is under way is on the link at most.
const TIME_MAX: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_arrive_as_they_were_sent() {
        let [from, to] = [(); 2].map(|()| tempfile::tempdir().expect("a folder"));
        for (name, length) in [("pages-1.img", 1 << 20), ("empty.img", 0)] {
            fs::write(from.path().join(name), vec![7; length]).expect("an image");
        }
        let listener = TcpListener::bind("127.0.0.1:0").expect("listening");
        let address = listener.local_addr().expect("an address");
        let into = to.path().to_owned();
        let receiver = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a connection");
            receive_files(stream, &into)
        });
        let stream = TcpStream::connect(address).expect("connecting");
        assert_eq!(send_files(stream, from.path()).expect("sent"), 1 << 20);
        receiver.join().expect("no panic").expect("received");
        for name in ["pages-1.img", "empty.img"] {
            let [sent, came] = [&from, &to].map(|f| fs::read(f.path().join(name)).expect(name));
            assert!(sent == came, "{name}");
        }
    }
}
