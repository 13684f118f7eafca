//! A reservation, which settles itself when it is dropped.

use super::Account;
use super::demand::{Admission, Backend, Demand, Grant, NoRoom, Progress, Settlement};
use crate::quota::{Amounts, QuotaStatus, Required, Subject};
use std::sync::Arc;

/// Room held for one request in the quotas of its environment and of its upstream. Dropping it settles the charge in all of
/// them with the last amounts observed. These are zero until the request is sent to the upstream.
#[derive(Debug)]
#[must_use = "dropping a reservation settles it at once"]
pub struct Reservation(pub(super) Box<HeldRoom>);

/// The fields of a reservation. A request passes its reservation through many functions, so they are boxed.
#[derive(Debug)]
pub(super) struct HeldRoom {
    pub(super) account: Arc<Account>,
    pub(super) grant: Option<Box<Grant>>,
    /// The part that the upstream's quotas hold. `None`: it has no limits, or another process has the counters.
    upstream: Option<UpstreamPart>,
    /// Index of the upstream in the backends of the demand.
    pub(super) backend: usize,
    /// The caller and the model.
    pub(super) subject: (Option<Arc<str>>, Box<str>),
    pub(super) generates: bool,
    pub(super) settlement: Settlement,
    pub(super) standing: [Option<QuotaStatus>; 4],
    clamped_to: Option<u64>,
    would_deny: Option<Box<NoRoom>>,
    /// The reservation must survive a crash of the process.
    is_durable: bool,
    /// The commit that will contain the reservation. `None` after the wait for it.
    commit: Option<u64>,
}

/// The part of a reservation that the quotas of an upstream hold.
#[derive(Debug)]
pub(super) struct UpstreamPart {
    pub(super) account: Arc<Account>,
    /// The model, by the name that is sent to the upstream.
    pub(super) model: Box<str>,
    pub(super) grant: Box<Grant>,
}

impl UpstreamPart {
    /// `None`: the upstream has no limits.
    fn new(backend: &Backend<'_>, grant: Option<Box<Grant>>) -> Option<Self> {
        let (account, grant) = (backend.account?.clone(), grant?);
        Some(Self { account, model: backend.model.into(), grant })
    }

    /// Releases the held amounts and charges the spent ones.
    fn settle(self, settlement: Settlement) {
        let Self { account, model, grant } = self;
        let subject = Subject { caller: None, model: &model };
        account.engine.settle(subject, grant, settlement);
        account.notify_released();
    }
}

/// A reservation in the process that has taken the counters over.
pub(super) struct ElsewhereReservation {
    pub(super) grant: Box<Grant>,
    pub(super) backend: usize,
    pub(super) standing: [Option<QuotaStatus>; 4],
    pub(super) clamped_to: Option<u64>,
    pub(super) would_deny: Option<Box<NoRoom>>,
}

/// Making reservations.
impl Reservation {
    pub(super) fn new(
        account: &Arc<Account>,
        demand: &Demand<'_>,
        admission: Admission,
        backend: usize,
        commit: Option<u64>,
    ) -> Self {
        let Admission { grant, upstream, clamped_to, would_deny, standing, .. } = admission;
        let part = demand.backends.get(backend).and_then(|one| UpstreamPart::new(one, upstream));
        Self(Box::new(HeldRoom {
            account: account.clone(),
            grant: Some(grant),
            upstream: part,
            backend,
            subject: (demand.subject.caller.cloned(), demand.subject.model.into()),
            generates: demand.generates,
            settlement: Settlement::default(),
            standing,
            clamped_to,
            would_deny,
            is_durable: commit.is_some(),
            commit,
        }))
    }

    /// A reservation that another process holds.
    pub(super) fn elsewhere(
        account: &Arc<Account>,
        demand: &Demand<'_>,
        reservation: ElsewhereReservation,
    ) -> Self {
        let ElsewhereReservation { grant, backend, standing, clamped_to, would_deny } = reservation;
        let is_durable = account.persistence.is_some();
        let admission = Admission { grant, upstream: None, clamped_to, would_deny, standing, is_durable };
        let mut reservation = Self::new(account, demand, admission, backend, None);
        reservation.0.is_durable = is_durable;
        reservation
    }

    /// A request of the process that this one replaces.
    pub(super) fn adopted(account: &Arc<Account>, model: &str, grant: Grant) -> Self {
        Self(Box::new(HeldRoom {
            account: account.clone(),
            settlement: Settlement { spent: grant.reserved, is_complete: false },
            grant: Some(Box::new(grant)),
            upstream: None,
            backend: 0,
            subject: (None, model.into()),
            generates: true,
            standing: [None; 4],
            clamped_to: None,
            would_deny: None,
            is_durable: account.persistence.is_some(),
            commit: None,
        }))
    }
}

/// The upstream.
impl Reservation {
    /// The upstream that has room: its index in the backends of the demand.
    pub fn backend(&self) -> usize {
        self.0.backend
    }

    /// Moves the reservation to another upstream. `index`: its index in the backends of the demand. Reserves the same amounts
    /// in its quotas, and then releases those of the upstream before, which is charged nothing. The part of the environment
    /// stays. Returns when the move is durable, if a quota requires that.
    ///
    /// # Errors
    /// The other upstream has no room. The reservation stays as it is.
    pub async fn move_to(&mut self, index: usize, backend: &Backend<'_>) -> Result<(), NoRoom> {
        loop {
            if self.0.account.handover.has_left() {
                // Boxed, so that the future of every request does not contain it.
                let successor = Box::pin(self.0.account.handover.outcome()).await;
                if let Some(successor) = successor {
                    return Box::pin(self.move_elsewhere(&successor, index, backend)).await;
                }
            }
            match self.move_here(index, backend).await {
                // The account has left since.
                Err(NoRoom::Unavailable) if self.0.account.handover.has_left() => {}
                done => return done,
            }
        }
    }

    async fn move_here(&mut self, index: usize, backend: &Backend<'_>) -> Result<(), NoRoom> {
        let Some(grant) = &self.0.grant else { return Ok(()) };
        let required = Required { amounts: grant.reserved, generates: self.0.generates };
        let moved = match backend.account {
            None => None,
            Some(account) => {
                let before = self.0.upstream.as_mut();
                let before = before.filter(|before| Arc::ptr_eq(&before.account, account));
                Some(account.engine.try_back(backend.model, &required, before).await?)
            }
        };
        if moved.as_ref().is_some_and(|moved| moved.has_released) {
            self.0.upstream = None;
        }
        self.release_upstream();
        let is_durable = moved.as_ref().is_some_and(|moved| moved.is_durable);
        self.0.upstream = UpstreamPart::new(backend, moved.map(|moved| moved.grant));
        self.0.backend = index;
        let subject = Subject { caller: self.0.subject.0.as_ref(), model: &self.0.subject.1 };
        self.0.standing = self.0.account.standing(subject, &[*backend]);
        let store = self.0.account.persistence.as_deref().filter(|store| is_durable && store.is_writing());
        let commit = store.map(|store| store.commits().next());
        self.0.is_durable |= commit.is_some();
        self.0.account.notify_store(commit.is_some());
        if let Some(commit) = commit {
            self.0.account.wait_for_commit(commit).await;
        }
        Ok(())
    }

    /// Settles the part of the upstream, which is charged nothing.
    pub(super) fn release_upstream(&mut self) {
        if let Some(before) = self.0.upstream.take() {
            before.settle(Settlement::default());
        }
    }
}

/// The life of a reservation.
impl Reservation {
    /// Sets the amounts that the request has cost so far. The last amounts set are charged.
    pub fn observe(&mut self, spent: Amounts) {
        self.0.settlement.spent = spent;
    }

    /// Marks the answer as complete, so that its length is learned.
    pub fn mark_complete(&mut self) {
        self.0.settlement.is_complete = true;
    }

    /// The last amounts observed.
    pub fn spent(&self) -> Amounts {
        self.0.settlement.spent
    }

    /// Moves amounts that have certainly been used from held to spent, and extends the reservation of a long answer.
    pub fn progress(&mut self, spent: Amounts) -> Progress {
        let Some(grant) = &mut self.0.grant else { return Progress::Within };
        let before = grant.reserved();
        let upstream = self.0.upstream.as_mut();
        let progress = self.0.account.engine.progress(&self.0.subject.1, grant, spent, upstream);
        let has_grown = grant.reserved() != before;
        self.0.account.notify_released();
        if let Some(upstream) = &self.0.upstream {
            upstream.account.notify_released();
        }
        // No request waits for this commit, but a larger reservation should become durable soon.
        self.0.account.notify_store(self.0.is_durable && has_grown);
        progress
    }

    /// The maximum number of completion tokens that the request allows its answer.
    pub fn cap(&self) -> u64 {
        self.0.grant.as_deref().map_or(u64::MAX, Grant::cap)
    }

    /// When the answer has more completion tokens than this, `progress` must be called at once. With fewer tokens,
    /// occasional calls suffice.
    pub fn progress_threshold(&self) -> u64 {
        self.0.grant.as_deref().map_or(u64::MAX, Grant::progress_threshold)
    }

    /// Waits until the reservation would survive a crash, if one of its quotas requires that.
    pub async fn wait_until_durable(&mut self) {
        if let Some(commit) = self.0.commit.take() {
            self.0.account.wait_for_commit(commit).await;
        }
    }

    /// Settles the reservation. If a durable reservation used more than it reserved, the settlement must be
    /// durable before the caller gets the last bytes of the answer. The returned future waits for that.
    pub fn settle(self) -> Option<impl Future<Output = ()> + Send + 'static> {
        let spent = self.0.settlement.spent;
        let exceeds = spent.saturating_sub(self.reserved()) != Amounts::default();
        let account = (exceeds && self.0.is_durable).then(|| self.0.account.clone());
        drop(self);
        let account = account?;
        let commit = if account.handover.has_left() {
            None
        } else {
            let commit = account.persistence.as_ref().filter(|store| store.is_writing())?.commits().next();
            account.notify_store(true);
            Some(commit)
        };
        Some(async move {
            match commit {
                Some(commit) => account.wait_for_commit(commit).await,
                None => account.wait_for_commit_elsewhere().await,
            }
        })
    }

    /// The quotas of each kind right after this reservation, in the order of `Kind::ALL`.
    pub fn standing(&self) -> &[Option<QuotaStatus>; 4] {
        &self.0.standing
    }

    /// The lowered limit of completion tokens per completion, if the request was clamped.
    pub fn clamped_to(&self) -> Option<u64> {
        self.0.clamped_to
    }

    /// Why the request would have been denied if its quotas were enforced.
    pub fn would_deny(&self) -> Option<&NoRoom> {
        self.0.would_deny.as_deref()
    }

    /// Everything reserved so far.
    pub fn reserved(&self) -> Amounts {
        self.0.grant.as_deref().map_or_else(Amounts::default, Grant::reserved)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let Some(grant) = self.0.grant.take() else { return };
        let subject = Subject { caller: self.0.subject.0.as_ref(), model: &self.0.subject.1 };
        self.0.account.engine.settle(subject, grant, self.0.settlement);
        if let Some(upstream) = self.0.upstream.take() {
            upstream.settle(self.0.settlement);
        }
        self.0.account.notify_released();
        self.0.account.notify_store(false);
    }
}
