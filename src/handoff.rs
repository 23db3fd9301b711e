//! What crosses the sockets between two processes: messages of one byte, with sockets.
//!
//! A channel is a SOCK_SEQPACKET socketpair, so a message and its descriptors arrive together or
//! not at all, and the death of one end is seen at once at the other.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixCredentials, recv, recvmsg,
    sendmsg, socketpair,
};

/// Most descriptors the kernel passes in a message (SCM_MAX_FD).
pub const MAX_SOCKETS: usize = 253;

/// What a message says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Message {
    /// Connector: set up, and able to forward.
    Ready = b'R',
    /// Listener: here is the listening socket.
    Listener = b'L',
    /// Listener: connections will come by the workers' own channels.
    Start = b'S',
    /// Connector: connections are accepted from now on.
    Accepting = b'A',
    /// Listener: accepted connections.
    Connections = b'C',
    /// Worker: there is room for more of them.
    Room = b'O',
    /// Listener: accept no more, and end with the last connection.
    Drain = b'D',
    /// Listener: the same, and the clients who wait are another program's as well.
    Leave = b'V',
    /// Listener: end all connections, then the process.
    Stop = b'T',
}

impl Message {
    fn from_byte(byte: u8) -> Option<Message> {
        let all = [
            Message::Ready,
            Message::Listener,
            Message::Start,
            Message::Accepting,
            Message::Connections,
            Message::Room,
            Message::Drain,
            Message::Leave,
            Message::Stop,
        ];
        all.into_iter().find(|&message| message as u8 == byte)
    }
}

/// A message as it arrived.
#[derive(Debug)]
pub struct Received {
    /// What it says.
    pub message: Message,
    /// The sockets that came with it.
    pub sockets: Vec<OwnedFd>,
}

/// One end of a socketpair.
#[derive(Debug)]
pub struct Channel {
    fd: OwnedFd,
}

impl Channel {
    /// Two connected ends, blocking.
    pub fn pair() -> Result<(Channel, Channel), Errno> {
        let (a, b) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        Ok((Channel { fd: a }, Channel { fd: b }))
    }

    /// Sends a message with up to [`MAX_SOCKETS`] sockets. Without waiting: EAGAIN, ENOBUFS and
    /// ETOOMANYREFS mean "later"; EPIPE, that the other process is gone.
    pub fn send(&self, message: Message, sockets: &[BorrowedFd<'_>]) -> Result<(), Errno> {
        let raw: Vec<RawFd> = sockets.iter().map(|socket| socket.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control = if raw.is_empty() { &[][..] } else { &rights[..] };
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        let byte = [message as u8];
        sendmsg::<()>(self.fd.as_raw_fd(), &[IoSlice::new(&byte)], control, flags, None).map(drop)
    }

    /// The next message; `None` when the other end is closed. Without waiting: EAGAIN if there is
    /// none; EMFILE if this process has no room for its sockets, and it is still there; EBADMSG if
    /// it is none of ours.
    pub fn receive(&self) -> Result<Option<Received>, Errno> {
        match self.receive_next() {
            // The other end was closed before it had read all. That is told first, and once; what
            // it has sent comes then.
            Err(Errno::ECONNRESET) => self.receive_next(),
            result => result,
        }
    }

    fn receive_next(&self) -> Result<Option<Received>, Errno> {
        let mut byte = [0];
        let mut iov = [IoSliceMut::new(&mut byte)];
        let mut space = cmsg_space!([RawFd; MAX_SOCKETS], UnixCredentials);
        // Looked at first: a message whose sockets do not all fit in loses the others when it is
        // taken (tests/kernel/passing.rs). To look gives sockets, too.
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_PEEK;
        let seen = recvmsg::<()>(self.fd.as_raw_fd(), &mut iov, Some(&mut space), flags)?;
        let (length, flags) = (seen.bytes, seen.flags);
        let mut sockets = Vec::new();
        for fd in descriptors(&space) {
            sockets.push(crate::sys::own(fd)?);
        }
        // There was space for all that can come, also for credentials that somebody asked for.
        if flags.contains(MsgFlags::MSG_CTRUNC) {
            return Err(Errno::EMFILE);
        }
        recv(self.fd.as_raw_fd(), &mut byte, MsgFlags::MSG_DONTWAIT)?;
        if length == 0 {
            return Ok(None);
        }
        let message = Message::from_byte(byte[0]).ok_or(Errno::EBADMSG)?;
        Ok(Some(Received { message, sockets }))
    }
}

/// The descriptors in what came with a message. By hand: nix gives none of them when others were
/// lost (MSG_CTRUNC), and those that have arrived would be open for ever.
fn descriptors(mut control: &[u8]) -> Vec<RawFd> {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    let mut found = Vec::new();
    // A buffer that is not used up ends in zeroes.
    while let Some((length, rest)) = control.split_first_chunk()
        && let length @ HEADER.. = usize::from_ne_bytes(*length).min(control.len())
    {
        let words = |bytes: &[u8]| -> Vec<i32> {
            let word = |word: &[u8]| i32::from_ne_bytes([word[0], word[1], word[2], word[3]]);
            bytes.chunks_exact(size_of::<RawFd>()).map(word).collect()
        };
        if words(&rest[..8]) == [libc::SOL_SOCKET, libc::SCM_RIGHTS] {
            found.extend(words(&control[HEADER..length]));
        }
        let next = length.next_multiple_of(size_of::<usize>());
        control = control.get(next..).unwrap_or_default();
    }
    found
}

/// An end that was come by otherwise: a connected SOCK_SEQPACKET socket.
impl From<OwnedFd> for Channel {
    fn from(fd: OwnedFd) -> Self {
        Self { fd }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRef<OwnedFd> for Channel {
    fn as_ref(&self) -> &OwnedFd {
        &self.fd
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::unistd::pipe;

    #[test]
    fn sockets_arrive_with_their_message() {
        let (here, there) = Channel::pair().expect("socketpair");
        assert_eq!(there.receive().expect_err("nothing was sent"), Errno::EAGAIN);
        let (read, write) = pipe().expect("pipe");
        here.send(Message::Connections, &[read.as_fd(), write.as_fd()]).expect("send");
        let received = there.receive().expect("receive").expect("a message");
        assert_eq!(received.message, Message::Connections);
        assert_eq!(received.sockets.len(), 2);
        drop(here);
        assert!(there.receive().expect("receive").is_none());
    }

    #[test]
    fn the_last_message_of_an_end_that_has_not_heard_all_arrives() {
        let (here, there) = Channel::pair().expect("socketpair");
        there.send(Message::Room, &[]).expect("send");
        here.send(Message::Stop, &[]).expect("send");
        drop(here);
        let received = there.receive().expect("receive").expect("a message");
        assert_eq!(received.message, Message::Stop);
        assert!(there.receive().expect("receive").is_none());
    }

    #[test]
    fn a_foreign_message_is_refused() {
        let (here, there) = Channel::pair().expect("socketpair");
        nix::unistd::write(here.as_fd(), b"?").expect("write");
        assert_eq!(there.receive().expect_err("no message of ours"), Errno::EBADMSG);
    }
}
