//! The connection of the old process to the new one, for requests that the old process still serves.

use super::frame;
use crate::ledger::{FromSuccessor, SuccessorLine, ToSuccessor};
use crate::server::{self, RunState};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, watch};

/// Sends messages and receives replies until the gateway stops. Sends the pending messages before it returns.
///
/// # Errors
/// The socket cannot be used.
pub(crate) async fn run(
    stream: UnixStream,
    line: Arc<SuccessorLine>,
    mut messages: mpsc::UnboundedReceiver<ToSuccessor>,
    mut run_state: watch::Receiver<RunState>,
) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    let (reader, mut writer) = tokio::net::UnixStream::from_std(stream)?.into_split();
    let replies = tokio::spawn(receive(reader, line));
    loop {
        tokio::select! {
            biased;
            message = messages.recv() => match message {
                Some(message) => send(&mut writer, &message).await,
                None => break,
            },
            () = server::stopped(&mut run_state) => break,
        }
    }
    replies.abort();
    Ok(())
}

async fn send(writer: &mut OwnedWriteHalf, message: &ToSuccessor) {
    let Ok(bytes) = frame::encode(message) else { return };
    // An error means that the new process has ended, which `receive` reports.
    let _ = writer.write_all(&bytes).await;
}

async fn receive(mut reader: OwnedReadHalf, line: Arc<SuccessorLine>) {
    while let Ok(reply) = frame::receive::<FromSuccessor>(&mut reader).await {
        line.on_reply(reply);
    }
    line.on_close();
    tracing::error!(
        "the process that replaced this one has ended: requests in flight here end, new ones are refused"
    );
}
