//! tokio's `copy_bidirectional`: what netns_tcp_bridge does with the connections it accepts.
//!
//! Fair because it is tokio used as its documentation says: a task for each connection on a
//! current-thread runtime. netns_tcp_bridge uses buffers of 8 KiB, tokio's default, which are
//! small for bulk; so there is a row with 64 KiB, too.

use std::io;
use std::net::SocketAddr;

use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};

/// `bytes`: size of the buffer of each direction of each connection.
pub(super) fn relay(
    listener: std::net::TcpListener,
    target: SocketAddr,
    bytes: usize,
) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build()?;
    listener.set_nonblocking(true)?;
    runtime.block_on(async move {
        let listener = TcpListener::from_std(listener)?;
        loop {
            let (mut client, _) = listener.accept().await?;
            tokio::spawn(async move {
                let mut target = TcpStream::connect(target).await?;
                target.set_nodelay(true)?;
                copy_bidirectional_with_sizes(&mut client, &mut target, bytes, bytes).await
            });
        }
    })
}
