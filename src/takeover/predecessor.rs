//! The new process serves the messages of the old one: it reserves, extends and settles in its own counters.

use super::frame;
use crate::ledger::{
    Account, Accounts, Backend, Demand, FromSuccessor, LeftNoRoom, Progress, Reservation, ToSuccessor,
};
use crate::quota::{Amounts, Subject};
use crate::server::{self, RunState};
use std::collections::HashMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::io::AsyncWriteExt as _;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{mpsc, watch};
use tokio::task::AbortHandle;

/// Requests of the old process, by their ids.
struct Predecessor {
    accounts: Arc<Accounts>,
    requests: Mutex<HashMap<u64, Request>>,
    replies: mpsc::UnboundedSender<FromSuccessor>,
}

enum Request {
    /// Waits for room.
    Waiting(AbortHandle),
    /// Dropping the reservation charges it in full.
    InFlight(Box<Reservation>),
    /// A task moves the reservation to another upstream. The request may end meanwhile.
    Moving(Option<End>),
}

/// How a request of the old process has ended.
struct End {
    caller: Option<String>,
    spent: Amounts,
    is_complete: bool,
}

impl End {
    fn settle(self, reservation: Reservation) {
        reservation.settle_as(self.caller.map(Arc::from), self.spent, self.is_complete);
    }
}

/// Serves the messages of the old process until that process ends or this one stops. Then it charges the unsettled
/// requests of the old process in full. `stream` is `None` if the old process has already ended.
///
/// # Errors
/// The socket cannot be used.
pub(crate) async fn serve(
    stream: Option<UnixStream>,
    accounts: Arc<Accounts>,
    mut run_state: watch::Receiver<RunState>,
) -> io::Result<()> {
    if let Some(stream) = stream {
        stream.set_nonblocking(true)?;
        let (mut reader, writer) = tokio::net::UnixStream::from_std(stream)?.into_split();
        let (replies, receiver) = mpsc::unbounded_channel();
        let writing = tokio::spawn(write(writer, receiver));
        let predecessor =
            Arc::new(Predecessor { accounts: accounts.clone(), requests: Mutex::default(), replies });
        let serving = async {
            while let Ok(message) = frame::receive(&mut reader).await {
                predecessor.serve(message);
            }
        };
        tokio::select! {
            () = serving => {}
            () = server::stopped(&mut run_state) => {}
        }
        predecessor.end();
        writing.abort();
    }
    accounts.all().iter().for_each(|(_, account)| account.end_takeover());
    Ok(())
}

async fn write(mut writer: OwnedWriteHalf, mut replies: mpsc::UnboundedReceiver<FromSuccessor>) {
    while let Some(reply) = replies.recv().await {
        let Ok(bytes) = frame::encode(&reply) else { continue };
        if writer.write_all(&bytes).await.is_err() {
            return;
        }
    }
}

impl Predecessor {
    fn serve(self: &Arc<Self>, message: ToSuccessor) {
        match message {
            reserve @ ToSuccessor::Reserve { .. } => self.begin(reserve),
            ToSuccessor::Cancel { id } => match self.take(id) {
                Some(Request::Waiting(task)) => task.abort(),
                Some(Request::InFlight(reservation)) => {
                    reservation.settle_as(None, Amounts::default(), false);
                }
                Some(Request::Moving(_)) | None => {}
            },
            moving @ ToSuccessor::Move { .. } => self.begin_move(moving),
            ToSuccessor::Adopt { id, environment, model, grant } => {
                if let Some(account) = self.accounts.of(&environment) {
                    self.insert(id, Request::InFlight(Box::new(account.adopt(&model, &grant))));
                }
            }
            ToSuccessor::Progress { id, spent } => self.progress(id, spent),
            ToSuccessor::Settle { id, caller, spent, is_complete } => {
                let end = End { caller, spent, is_complete };
                match self.take(id) {
                    Some(Request::InFlight(reservation)) => end.settle(*reservation),
                    Some(Request::Moving(_)) => self.insert(id, Request::Moving(Some(end))),
                    Some(Request::Waiting(_)) | None => {}
                }
            }
            ToSuccessor::Commit { id, environment } => {
                let (this, account) = (self.clone(), self.accounts.of(&environment));
                tokio::spawn(async move {
                    if let Some(account) = account {
                        account.commit().await;
                    }
                    this.reply(FromSuccessor::Committed { id });
                });
            }
            ToSuccessor::Audit { entries } => {
                entries.into_iter().for_each(|entry| self.accounts.audit().push(entry));
                self.accounts.all().iter().for_each(|(_, account)| account.notify_store(false));
            }
            ToSuccessor::Usage { environment, rows } => {
                if let Some(account) = self.accounts.of(&environment) {
                    account.add_usage(&rows);
                }
            }
        }
    }

    /// Reserves room for a request, which may wait for it.
    fn begin(self: &Arc<Self>, message: ToSuccessor) {
        let ToSuccessor::Reserve {
            id,
            environment,
            caller,
            model,
            prompt,
            generates,
            cap,
            completions,
            max_wait_ms,
            backends,
        } = message
        else {
            return;
        };
        let Some(account) = self.accounts.of(&environment) else {
            return self.reply(FromSuccessor::Denied { id, no_room: LeftNoRoom::Unavailable });
        };
        let this = self.clone();
        let task = tokio::spawn(async move {
            let caller = caller.map(Arc::from);
            let subject = Subject { caller: caller.as_ref(), model: &model };
            let upstreams: Vec<Option<Arc<Account>>> =
                backends.iter().map(|backend| this.accounts.of(backend.account.as_deref()?)).collect();
            let backends: Vec<Backend<'_>> = backends
                .iter()
                .zip(&upstreams)
                .map(|(backend, account)| Backend { account: account.as_ref(), model: &backend.model })
                .collect();
            let demand =
                Demand { subject, prompt, generates, cap, completions, backends: &backends, may_clamp: true };
            let reply = this.reserve(id, &account, &demand, Duration::from_millis(max_wait_ms)).await;
            this.reply(reply);
        });
        // The runtime has one thread, so the task has not begun yet.
        self.insert(id, Request::Waiting(task.abort_handle()));
    }

    async fn reserve(
        &self,
        id: u64,
        account: &Arc<Account>,
        demand: &Demand<'_>,
        max_wait: Duration,
    ) -> FromSuccessor {
        let mut reservation = match account.reserve(demand, max_wait).await {
            Ok(reservation) => reservation,
            Err(no_room) => {
                drop(self.take(id));
                return FromSuccessor::Denied { id, no_room: LeftNoRoom::of(&no_room) };
            }
        };
        reservation.wait_until_durable().await;
        let reply = FromSuccessor::Reserved {
            id,
            reserved: reservation.reserved(),
            cap: reservation.cap(),
            progress_threshold: reservation.progress_threshold(),
            clamped_to: reservation.clamped_to(),
            would_deny: reservation.would_deny().map(LeftNoRoom::of),
            standing: *reservation.standing(),
            backend: reservation.backend(),
        };
        reservation.observe(reservation.reserved());
        self.insert(id, Request::InFlight(Box::new(reservation)));
        reply
    }

    /// Moves a reservation to another upstream. That may wait for a commit of the store.
    fn begin_move(self: &Arc<Self>, message: ToSuccessor) {
        let ToSuccessor::Move { id, reservation, caller, generates, index, backend } = message else {
            return;
        };
        let Some(Request::InFlight(mut held)) = self.take(reservation) else {
            return self.reply(FromSuccessor::Denied { id, no_room: LeftNoRoom::Unavailable });
        };
        self.insert(reservation, Request::Moving(None));
        let this = self.clone();
        tokio::spawn(async move {
            let account = backend.account.as_deref().and_then(|name| this.accounts.of(name));
            let backend = Backend { account: account.as_ref(), model: &backend.model };
            let moved = held.move_as((caller.map(Arc::from), generates), index, &backend).await;
            let reply = match moved {
                Ok(()) => FromSuccessor::Moved { id, standing: *held.standing() },
                Err(no_room) => FromSuccessor::Denied { id, no_room: LeftNoRoom::of(&no_room) },
            };
            match this.take(reservation) {
                Some(Request::Moving(Some(end))) => end.settle(*held),
                Some(_) => this.insert(reservation, Request::InFlight(held)),
                // The old process has ended.
                None => drop(held),
            }
            this.reply(reply);
        });
    }

    fn progress(&self, id: u64, spent: Amounts) {
        let mut requests = self.requests.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(Request::InFlight(reservation)) = requests.get_mut(&id) else { return };
        let is_overrun = reservation.progress(spent) == Progress::Overrun;
        // If the old process ends now, the whole reservation of the stream is charged.
        reservation.observe(reservation.reserved());
        let (reserved, progress_threshold) = (reservation.reserved(), reservation.progress_threshold());
        drop(requests);
        self.reply(FromSuccessor::Progressed { id, is_overrun, reserved, progress_threshold });
    }

    /// Drops the waiting requests of the old process, which has ended, and charges the others in full.
    fn end(&self) {
        let requests = std::mem::take(&mut *self.requests.lock().unwrap_or_else(PoisonError::into_inner));
        for request in requests.into_values() {
            match request {
                Request::Waiting(task) => task.abort(),
                Request::InFlight(reservation) => drop(reservation),
                Request::Moving(_) => {}
            }
        }
    }

    fn insert(&self, id: u64, request: Request) {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).insert(id, request);
    }

    fn take(&self, id: u64) -> Option<Request> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner).remove(&id)
    }

    fn reply(&self, reply: FromSuccessor) {
        // An error means that the old process has ended.
        let _ = self.replies.send(reply);
    }
}
