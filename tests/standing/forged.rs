//! A TCP segment that comes before those its connection has yet to send.

use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, sendto, socket,
};

use crate::support::Netns;
use crate::support::calls::set_option;

const URG_PSH_ACK: u8 = 0x38;
/// From `linux/tcp.h`: which queue's next sequence number TCP_QUEUE_SEQ is, and the end of a repair
/// that sends nothing.
const RECV_QUEUE: libc::c_int = 1;
const SEND_QUEUE: libc::c_int = 2;
const REPAIR_OFF_NO_WP: libc::c_int = -1;

/// Sends one urgent byte in the name of `stream`, `gap` bytes after what it has sent last: as if
/// the segments between were lost.
pub fn urgent_behind_a_gap(netns: &Netns, stream: &TcpStream, gap: u32) {
    let (SocketAddr::V4(from), SocketAddr::V4(to)) =
        (stream.local_addr().unwrap(), stream.peer_addr().unwrap())
    else {
        panic!("IPv4 only");
    };
    set(stream, libc::TCP_REPAIR, 1);
    let [seq, ack] = [SEND_QUEUE, RECV_QUEUE].map(|queue| {
        set(stream, libc::TCP_REPAIR_QUEUE, queue);
        get(stream, libc::TCP_QUEUE_SEQ)
    });
    set(stream, libc::TCP_REPAIR, REPAIR_OFF_NO_WP);

    let mut segment = Vec::new();
    segment.extend(from.port().to_be_bytes());
    segment.extend(to.port().to_be_bytes());
    segment.extend(seq.wrapping_add(gap).to_be_bytes());
    segment.extend(ack.to_be_bytes());
    // Five words of header, a window, no checksum yet, and the first byte is the urgent one.
    segment.extend([5 << 4, URG_PSH_ACK, 2, 0, 0, 0, 0, 1]);
    segment.push(b'!');
    let sum = checksum(*from.ip(), *to.ip(), &segment);
    segment[16..18].copy_from_slice(&sum.to_be_bytes());

    let raw = netns.enter(|| {
        let (kind, protocol) = (SockType::Raw, SockProtocol::Tcp);
        socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, protocol).unwrap()
    });
    let to = SockaddrIn::from(to);
    let sent = sendto(raw.as_raw_fd(), &segment, &to, MsgFlags::empty()).unwrap();
    assert_eq!(sent, segment.len());
}

/// The checksum of TCP over its pseudo-header and the segment (RFC 9293, 3.1).
fn checksum(from: Ipv4Addr, to: Ipv4Addr, segment: &[u8]) -> u16 {
    let mut bytes = [from.octets(), to.octets()].concat();
    bytes.extend([0, libc::IPPROTO_TCP as u8]);
    bytes.extend((segment.len() as u16).to_be_bytes());
    bytes.extend(segment);
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let sum: u32 = bytes.chunks(2).map(word).sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !((folded & 0xffff) + (folded >> 16)) as u16
}

fn set(stream: &TcpStream, option: libc::c_int, value: libc::c_int) {
    set_option(stream, libc::IPPROTO_TCP, option, value).unwrap();
}

fn get(stream: &TcpStream, option: libc::c_int) -> u32 {
    let mut value: u32 = 0;
    let mut length = size_of::<u32>() as libc::socklen_t;
    let (fd, place) = (stream.as_raw_fd(), (&raw mut value).cast());
    // SAFETY: there is room for the length given until the call returns.
    let result = unsafe { libc::getsockopt(fd, libc::IPPROTO_TCP, option, place, &raw mut length) };
    Errno::result(result).unwrap();
    value
}
