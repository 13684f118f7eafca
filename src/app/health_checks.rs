//! The thread that checks whether replicas of upstreams are healthy.

use super::server_thread::{ServerThread, single_thread_runtime};
use crate::proxy::State;
use crate::server::RunState;
use std::future::pending;
use std::sync::Arc;
use tokio_rustls::rustls::ClientConfig;

/// Starts the thread. It checks the replicas of the config in force until the gateway stops.
pub(super) fn start(state: Arc<State>, tls: Arc<ClientConfig>) -> anyhow::Result<ServerThread> {
    ServerThread::spawn("health checks", single_thread_runtime()?, move |mut run_state| async move {
        let mut reloads = state.reloads();
        loop {
            // Before the snapshot is read, so that no reload is missed.
            reloads.mark_unchanged();
            let snapshot = state.current();
            let checks = async {
                snapshot.check_replicas(&tls).await;
                // There is nothing to check.
                pending::<()>().await;
            };
            tokio::select! {
                biased;
                // An error means that the sender was dropped, which also ends the thread.
                _ = run_state.wait_for(|state| *state == RunState::Stopped) => return Ok(0),
                changed = reloads.changed() => if changed.is_err() { return Ok(0) },
                () = checks => {}
            }
        }
    })
}
