//! A copy loop on tokio-uring: each direction a task that reads into its buffer and writes it.
//!
//! Fair because it is the plain use of the library, with what helps it: a buffer of 64 KiB for
//! each direction, as in the larger tokio row, that is allocated once for a connection; a queue
//! that takes the requests of all connections of a turn; and the ring's flags for one thread.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::rc::Rc;

use tokio_uring::buf::BoundedBuf;
use tokio_uring::net::{TcpListener, TcpStream};

/// Size of the buffer of each direction.
const BUFFER_BYTES: usize = 64 << 10;

/// Requests that can be collected before they must be handed to the kernel.
const SQ_ENTRIES: u32 = 1024;

pub(super) fn relay(listener: std::net::TcpListener, target: SocketAddr) -> io::Result<()> {
    let mut ring = tokio_uring::uring_builder();
    ring.setup_single_issuer().setup_coop_taskrun();
    tokio_uring::builder().entries(SQ_ENTRIES).uring_builder(&ring).start(async move {
        let listener = TcpListener::from_std(listener);
        loop {
            let (client, _) = listener.accept().await?;
            tokio_uring::spawn(forward(client, target));
        }
    })
}

async fn forward(client: TcpStream, target: SocketAddr) -> io::Result<()> {
    let target = TcpStream::connect(target).await?;
    target.set_nodelay(true)?;
    let (client, target) = (Rc::new(client), Rc::new(target));
    tokio_uring::spawn(half(Rc::clone(&client), Rc::clone(&target)));
    half(target, client).await;
    Ok(())
}

/// Moves one direction to its end. A failure ends the other direction, too: it wakes up to find
/// that its sockets are shut down.
async fn half(source: Rc<TcpStream>, sink: Rc<TcpStream>) {
    let outcome = copy(&source, &sink).await;
    // It fails when the peer has reset the connection, which reading tells as well.
    let _ = sink.shutdown(if outcome.is_ok() { Shutdown::Write } else { Shutdown::Both });
    if outcome.is_err() {
        let _ = source.shutdown(Shutdown::Both);
    }
}

async fn copy(source: &TcpStream, sink: &TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let (count, whole) = source.read(buffer).await;
        let count = count?;
        if count == 0 {
            return Ok(());
        }
        let (written, part) = sink.write_all(whole.slice(..count)).await;
        written?;
        buffer = part.into_inner();
    }
}
