//! The UDP sockets under the endpoints.
//!
//! quinn hands up to ten packets to the kernel at once, whatever their size. The kernel takes
//! one UDP datagram's worth, 64 KiB, and refuses more with `EMSGSIZE`, which quinn takes for the
//! answer to a probe of the path and ignores: with packets above 6550 bytes every full batch is
//! lost in silence. So [`Socket`] sends a batch that is too large in two parts.

use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use nix::sys::socket::{getsockopt, setsockopt, sockopt};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, TokioRuntime, UdpPoller};

/// A UDP socket that takes batches of any size.
#[derive(Debug)]
struct Socket {
    inner: Arc<dyn AsyncUdpSocket>,
}

/// A bound UDP socket with buffers for a burst, as part of the tokio runtime.
pub(super) fn bind(local: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let socket = std::net::UdpSocket::bind(local)?;
    // Forcing needs CAP_NET_ADMIN and ignores net.core.[rw]mem_max; the plain option is cut to
    // it without an error. Either way a smaller buffer costs retransmissions, not correctness.
    if setsockopt(&socket, sockopt::RcvBufForce, &BUFFER_BYTES).is_err() {
        setsockopt(&socket, sockopt::RcvBuf, &BUFFER_BYTES)?;
    }
    if setsockopt(&socket, sockopt::SndBufForce, &BUFFER_BYTES).is_err() {
        setsockopt(&socket, sockopt::SndBuf, &BUFFER_BYTES)?;
    }
    // The kernel reports twice of what it granted: half is for its own accounting.
    let granted = getsockopt(&socket, sockopt::RcvBuf)? / 2;
    if granted < BUFFER_BYTES {
        tracing::debug!(granted, wanted = BUFFER_BYTES, "small UDP receive buffer");
    }
    let inner = TokioRuntime.wrap_udp_socket(socket)?;
    Ok(Arc::new(Socket { inner }))
}

impl AsyncUdpSocket for Socket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Arc::clone(&self.inner).create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let Some(segment) = transmit.segment_size else {
            return self.inner.try_send(transmit);
        };
        let batch = (BATCH_BYTES_MAX / segment).max(1) * segment;
        // If a later part would block, quinn sends the whole again, and the peer's QUIC drops
        // what it has seen.
        transmit.contents.chunks(batch).try_for_each(|contents| {
            self.inner.try_send(&Transmit {
                destination: transmit.destination,
                ecn: transmit.ecn,
                contents,
                segment_size: (segment < contents.len()).then_some(segment),
                src_ip: transmit.src_ip,
            })
        })
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.inner.poll_recv(cx, buffers, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}

/// Kernel buffer of a UDP socket, each way: 8 MiB hold what 10 Gbit/s brings in 6 ms, which is
/// how long a busy machine may leave a runnable thread waiting.
const BUFFER_BYTES: usize = 8 << 20;

/// Most bytes of one segmented send: the payload of the largest IPv4 datagram.
const BATCH_BYTES_MAX: usize = 65_535 - 20 - 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_batch_larger_than_a_datagram_is_sent_whole() {
        const SEGMENT: usize = 8972;
        let receiver = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        receiver
            .set_read_timeout(Some(std::time::Duration::from_secs(60)))
            .unwrap();
        let sender = bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let contents: Vec<u8> = (0..10u8).flat_map(|n| [n; SEGMENT]).collect();
        let transmit = Transmit {
            destination: receiver.local_addr().unwrap(),
            ecn: None,
            contents: &contents,
            segment_size: Some(SEGMENT),
            src_ip: None,
        };
        // A new socket blocks until the runtime has heard from the kernel.
        let mut poller = Arc::clone(&sender).create_io_poller();
        loop {
            std::future::poll_fn(|cx| poller.as_mut().poll_writable(cx))
                .await
                .unwrap();
            match sender.try_send(&transmit) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                sent => break sent.unwrap(),
            }
        }
        let mut buffer = vec![0; 1 << 16];
        for n in 0..10u8 {
            let length = receiver.recv(&mut buffer).unwrap();
            assert_eq!(buffer[..length], [n; SEGMENT]);
        }
    }
}
