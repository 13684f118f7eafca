//! Overrides that an administrator sets for all nodes. Redis has the limits and `enforce` in force, with their ends, and the
//! text that describes who set them and why.

use super::Replica;
use super::session::value;
use crate::clock::Timestamp;
use crate::ledger::overrides::{EnforceOverride, LimitChange, OverrideOrigin, QuotaKey};
use crate::quota::Quota;
use crate::redis::{EnforceMark, NewLimit, OverrideMark, ScriptCommand, ScriptReply, Verdict};
use serde_json::{Value, json};

/// The parts of an origin that Redis does not need.
fn to_text(origin: &OverrideOrigin) -> String {
    let OverrideOrigin { by, since, reason, .. } = origin;
    json!({"by": by, "since": since.0, "reason": reason}).to_string()
}

fn from_text(bytes: &[u8], until: Option<Timestamp>) -> Option<OverrideOrigin> {
    let value: Value = serde_json::from_slice(bytes).ok()?;
    let text = |name: &str| value[name].as_str().map(str::to_owned);
    let since = Timestamp(value["since"].as_i64()?);
    Some(OverrideOrigin { by: text("by")?, since, until, reason: text("reason") })
}

impl Replica {
    /// The command that sets the limit of each quota that matches the key. To remove overrides, it also names quotas that
    /// only have one, and are not in the config now. `None`: no quota matches.
    pub(in crate::ledger) fn limit_command(
        &mut self,
        own: Timestamp,
        key: QuotaKey<'_>,
        change: Option<&LimitChange>,
    ) -> Option<ScriptCommand> {
        self.set_command_time(own);
        let of_quota = |(index, quota): (usize, &Quota)| {
            let (limit, burst) =
                change.map_or((quota.limit, quota.capacity()), |change| (change.limit, change.burst));
            (index, NewLimit { limit, burst: quota.with_limit(limit, burst).capacity() })
        };
        let overrides = &self.local.overrides;
        let mut changes: Vec<_> = overrides.matching(key).map(of_quota).collect();
        if change.is_none() {
            let known: Vec<usize> = changes.iter().map(|(cell, _)| *cell).collect();
            changes.extend(overrides.overridden(key).filter(|(cell, _)| !known.contains(cell)).map(of_quota));
        }
        let mark = change.map_or(OverrideMark::None, |change| OverrideMark::until(change.origin.until));
        let origin = change.map(|change| to_text(&change.origin)).unwrap_or_default();
        (!changes.is_empty()).then(|| self.commands.limit(mark, &origin, &changes))
    }

    /// The command that sets whether quotas are enforced. `None`: by the config.
    pub(in crate::ledger) fn enforce_command(
        &mut self,
        own: Timestamp,
        change: Option<&EnforceOverride>,
    ) -> ScriptCommand {
        self.set_command_time(own);
        let origin = change.map(|change| to_text(&change.origin)).unwrap_or_default();
        self.commands.enforce(change.map(mark_of), &origin)
    }

    /// The command that resets the quotas that match the key to full, or all of them. `None`: no quota matches.
    pub(in crate::ledger) fn reset_command(
        &mut self,
        own: Timestamp,
        key: Option<QuotaKey<'_>>,
    ) -> Option<ScriptCommand> {
        self.set_command_time(own);
        let cells: Option<Vec<usize>> =
            key.map(|key| self.local.overrides.matching(key).map(|(cell, _)| cell).collect());
        let exists = cells.as_ref().is_none_or(|cells| !cells.is_empty());
        exists.then(|| self.commands.reset(cells.as_deref()))
    }

    /// The override of `enforce`, for a join.
    pub(super) fn enforce_mark(&self) -> Option<EnforceMark> {
        self.local.overrides.set().enforce.as_ref().map(mark_of)
    }

    /// The override of a quota's limit, for a join.
    pub(super) fn override_mark(&self, quota: &Quota) -> OverrideMark {
        let known = self.local.overrides.set().of(quota);
        known.map_or(OverrideMark::None, |known| OverrideMark::until(known.origin.until))
    }

    /// Adopts the overrides in the reply to a heartbeat, without their origins.
    pub(super) fn follow_overrides(&mut self, reply: &ScriptReply) {
        for (cell, (state, mark)) in reply.states.iter().enumerate() {
            let (limit, burst) = super::session::limit_of(state);
            self.local.overrides.follow(cell, mark.is_set().then(|| (limit, burst, mark.end())));
        }
        let in_redis = EnforceMark::of_numbers(value(reply, 3), value(reply, 4));
        if in_redis != self.enforce_mark() {
            let of_mark = |EnforceMark { enforce, until }| EnforceOverride {
                enforce,
                origin: OverrideOrigin { until, ..OverrideOrigin::default() },
            };
            self.local.overrides.follow_enforce(in_redis.map(of_mark));
            self.local.apply_enforce();
        }
        self.overrides_in_redis = value(reply, 2);
    }

    /// The command that reads the origins of the overrides. `None`: they have not changed since the last read.
    pub(in crate::ledger) fn origins_command(&mut self, own: Timestamp) -> Option<ScriptCommand> {
        if self.overrides_in_redis == self.overrides_known || self.is_offline() {
            return None;
        }
        self.set_command_time(own);
        Some(self.commands.origins())
    }

    /// Adopts the reply to `origins_command`.
    pub(in crate::ledger) fn on_origins(&mut self, own: Timestamp, reply: &ScriptReply) {
        self.record_time(own, reply);
        if reply.verdict != Verdict::Done {
            return;
        }
        self.overrides_known = self.overrides_in_redis;
        let set = self.local.overrides.set();
        let ends: Vec<Option<Timestamp>> = {
            let end_of = |quota: &Quota| set.of(quota).and_then(|known| known.origin.until);
            self.local.overrides.configured().iter().map(end_of).collect()
        };
        let enforce = set.enforce.clone();
        let mut rest = reply.values.as_slice();
        let mut next_text = || {
            let (&length, after) = rest.split_first()?;
            let (text, after) = after.split_at_checked(usize::try_from(length).ok()?)?;
            rest = after;
            Some(text.iter().map(|&byte| u8::try_from(byte).unwrap_or(b'?')).collect::<Vec<u8>>())
        };
        for (cell, until) in ends.into_iter().enumerate() {
            let Some(text) = next_text() else { return };
            if let Some(origin) = from_text(&text, until) {
                self.local.overrides.follow_origin(cell, origin);
            }
        }
        if let Some((known, text)) = enforce.zip(next_text())
            && let Some(origin) = from_text(&text, known.origin.until)
        {
            self.local.overrides.follow_enforce(Some(EnforceOverride { origin, ..known }));
        }
    }
}

fn mark_of(change: &EnforceOverride) -> EnforceMark {
    EnforceMark { enforce: change.enforce, until: change.origin.until }
}
