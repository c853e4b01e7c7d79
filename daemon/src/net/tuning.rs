//! Every number of the transport, and the physics that chose it.
//!
//! # The budget
//!
//! The link to fill is 10 Gbit/s with a round trip of 10 ms: 12.5 MB are in flight when it is
//! full. A migration has two lanes unless it is told otherwise, so a lane offers 9 MiB.
//! What a lane may hold is also what it may cost: one receive window at the target, one send
//! window at the source, allocated only while data is on its way.
//!
//! # Where the time goes
//!
//! Seconds of processor time per GiB that does not compress, over a veth pair with packets of 1470
//! bytes, on a 2-core virtual machine (AMD EPYC with VAES) that was busy with other work too:
//!
//! | where | source | target |
//! |---|---|---|
//! | `sendmsg`, 10 packets each, up to the queue of the target's socket | 0.70 | 0.08 |
//! | `recvmmsg` | 0.02 | 0.24 |
//! | copies: pages to parcel to packets; datagram to packets to parcel | 0.57 | 0.30 |
//! | `process_vm_readv`; `pwritev` into the store, half of it new pages | 0.47 | 0.60 |
//! | QUIC's own books | 0.3 | 0.25 |
//! | AES-128-GCM | 0.20 | 0.19 |
//! | crc32 | 0.05 | 0.07 |
//!
//! Nothing of it waits: two processors are the limit, and of what remains most is per byte or per
//! packet of 1500. New pages cost up to 2 s more where the host of a virtual machine has to find
//! the memory first. LZ4 takes 2.5 s per GiB of text, and 0.2 of pages that are half zero.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::CubicConfig;
use quinn::{AckFrequencyConfig, EndpointConfig, MtuDiscoveryConfig, TransportConfig, VarInt};
use quinn_proto::HashedConnectionIdGenerator;

use super::tls::Resets;

/// The transport of a target's connections: the source opens streams, the target none.
pub(super) fn accepting() -> Arc<TransportConfig> {
    let mut transport = transport();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(CONTROL_STREAMS))
        .max_concurrent_uni_streams(VarInt::from_u32(DATA_STREAMS));
    Arc::new(transport)
}

/// The transport of a source's connections: nobody may open a stream to us.
pub(super) fn dialling() -> Arc<TransportConfig> {
    let mut transport = transport();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .max_concurrent_uni_streams(VarInt::from_u32(0));
    Arc::new(transport)
}

fn transport() -> TransportConfig {
    let mut discovery = MtuDiscoveryConfig::default();
    discovery
        .upper_bound(PAYLOAD_BYTES_MAX)
        .interval(DISCOVERY_INTERVAL);
    let mut congestion = CubicConfig::default();
    congestion.initial_window(INITIAL_WINDOW_BYTES);
    let mut acks = AckFrequencyConfig::default();
    acks.ack_eliciting_threshold(VarInt::from_u32(ACK_PACKETS));

    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW_BYTES))
        .receive_window(VarInt::from_u32(LANE_WINDOW_BYTES))
        .send_window(u64::from(LANE_WINDOW_BYTES))
        // Streams are sent in the order they were written: a parcel that is complete can be
        // decoded, eight that are half there cannot.
        .send_fairness(false)
        .initial_rtt(INITIAL_RTT)
        .mtu_discovery_config(Some(discovery))
        .ack_frequency_config(Some(acks))
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_MS_MAX).into()))
        .keep_alive_interval(Some(KEEP_ALIVE))
        // Nothing of ours is a datagram.
        .datagram_receive_buffer_size(None)
        .congestion_controller_factory(Arc::new(congestion))
        .enable_segmentation_offload(true);
    transport
}

/// The endpoint's side of the largest datagram: what we are ready to receive.
pub(super) fn endpoint() -> EndpointConfig {
    sized(EndpointConfig::default())
}

/// The same for an endpoint that peers come back to after a restart.
pub(super) fn listening_endpoint(resets: Resets) -> EndpointConfig {
    let mut endpoint = EndpointConfig::new(resets.tokens);
    endpoint.cid_generator(move || {
        Box::new(HashedConnectionIdGenerator::from_key(resets.connection_ids))
    });
    sized(endpoint)
}

fn sized(mut endpoint: EndpointConfig) -> EndpointConfig {
    endpoint
        .max_udp_payload_size(PAYLOAD_BYTES_MAX)
        .expect("the constant is above the minimum of 1200");
    endpoint
}

/// Where to dial from: the address we listen on, so that a peer sees one address of ours, or
/// any address of the right family if it cannot be used towards `peer`.
pub(super) fn dial_from(listen: IpAddr, peer: IpAddr) -> SocketAddr {
    let any: IpAddr = match peer {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    // A loopback address reaches nothing but loopback.
    let usable = listen.is_ipv4() == peer.is_ipv4() && listen.is_loopback() == peer.is_loopback();
    SocketAddr::new(if usable { listen } else { any }, 0)
}

/// Data streams a peer may have open on one lane. More would not fill the link better, only
/// leave more half-sent parcels behind when a lane breaks.
pub const DATA_STREAMS: u32 = 8;

/// Bidirectional streams a peer may have open on one lane: the control stream, or, on a lane
/// that is not the first, the greeting.
pub(super) const CONTROL_STREAMS: u32 = 1;

/// Bytes one stream may have in flight, or received and not read: 1 MiB, so that a lane is
/// filled by its streams together and none starves the others.
pub(super) const STREAM_WINDOW_BYTES: u32 = 1 << 20;

/// Bytes one lane may have in flight, or received and not read: 9 MiB, two lanes of which
/// cover the 12.5 MB of the budget.
///
/// It is the sum of the stream windows, never less: were it less, streams that nobody reads
/// yet could hold all of it while the one that is being read waits for credit, for ever.
pub const LANE_WINDOW_BYTES: u32 = (DATA_STREAMS + CONTROL_STREAMS) * STREAM_WINDOW_BYTES;

/// Largest UDP payload that discovery tries, and that we receive: jumbo frames of 9000 bytes
/// less 20 of IPv4 and 8 of UDP. Every connection starts at 1200, which any path carries.
///
/// The receive buffers of an endpoint are 32 x 64 payloads of this size, 18 MiB of address
/// space, of which at most 32 x 64 KiB are ever touched: a coalesced datagram is no longer.
pub(super) const PAYLOAD_BYTES_MAX: u16 = 9000 - 20 - 8;

/// How often a path is probed for larger packets after the first time: never within a migration,
/// since what the path carries does not change under it.
const DISCOVERY_INTERVAL: Duration = Duration::from_secs(24 * 60 * 60);

/// Bytes in flight before the first acknowledgement: 128 KiB, the usual ten packets (RFC 6928)
/// at jumbo size, and a millisecond of 1 Gbit/s, which the queue of any switch takes.
///
/// The usual 14 720 bytes are less than two jumbo packets, and then quinn 0.11 deadlocks: a
/// receiver whose window is taken up by a probe that was lost may send nothing that wants an
/// acknowledgement, such as new credit, and withholds the acknowledgements that would go with
/// it, for which the sender waits.
const INITIAL_WINDOW_BYTES: u64 = 128 << 10;

/// Packets a receiver may take before it must acknowledge: four coalesced reads. An acknowledgement
/// costs both nodes as much as a packet of data; a lost packet is still noticed at once, because
/// what arrives out of order is acknowledged at once.
const ACK_PACKETS: u32 = 40;

/// Assumed round trip until one was measured. RFC 9002 has 333 ms for the whole Internet; nodes
/// of one cluster are nearer, and a lost first packet should not cost a second.
const INITIAL_RTT: Duration = Duration::from_millis(50);

/// A lane with nothing to say says so this often, so that a dead peer is seen in a pause: a daemon
/// that was restarted answers the next packet with a reset.
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// Silence after which a peer is lost, in milliseconds. Long enough for a node that is out of
/// breath; a workload may be frozen meanwhile, so not longer.
const IDLE_MS_MAX: u32 = 10_000;

const _: () = assert!(LANE_WINDOW_BYTES >= DATA_STREAMS * STREAM_WINDOW_BYTES);
