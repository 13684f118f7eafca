//! Random reservations in the quotas of an environment and of its upstream: the script and the engine must agree.

use super::node::Node;
use super::server::Server;
use super::walk::{Dice, quota};
use jiff::tz::TimeZone;
use tollgate::clock::Timestamp;
use tollgate::glob::Glob;
use tollgate::quota::{
    Amounts, ClockUnit, Kind, Quota, Quotas, Receipt, Required, Scope, Subject, UpstreamModels, Window,
};
use tollgate::redis::{OnShortage, ReserveRequest, Step, StepKind, UpstreamReserve, Verdict};

const MODELS: [&str; 2] = ["m-1", "other"];
const MAX_AMOUNT: u64 = 400;

fn rolling(burst: u64) -> Window {
    Window::Rolling { burst }
}

fn environment_quotas() -> Vec<Quota> {
    let minute = Window::Calendar { unit: ClockUnit::Minute, zone: TimeZone::UTC };
    vec![
        quota(Scope::Environment, Kind::TotalTokens, 60_000, 60_000, rolling(4_000)),
        quota(Scope::Environment, Kind::Requests, 60, 60_000, minute),
        quota(Scope::Model(Glob::new("m-*")), Kind::CompletionTokens, 50_000, 60_000, rolling(3_000)),
    ]
}

fn upstream_quotas() -> Vec<Quota> {
    let day = Window::Calendar { unit: ClockUnit::Day, zone: TimeZone::get("Europe/Berlin").unwrap() };
    let models = Scope::UpstreamModel(UpstreamModels::new("u", Glob::new("m-*")));
    vec![
        quota(Scope::Upstream("u".into()), Kind::TotalTokens, 50_000, 60_000, rolling(3_500)),
        quota(Scope::Upstream("u".into()), Kind::Requests, 20_000, 86_400_000, day),
        quota(models, Kind::TotalTokens, 40_000, 60_000, rolling(2_500)),
    ]
}

/// One side: the node of the script, and the engine.
struct Side {
    node: Node,
    local: Quotas,
    steps_applied: u64,
}

impl Side {
    fn new(server: &Server, account: &str, quotas: &[Quota], now: Timestamp) -> Self {
        let mut node = Node::of(server.connect(), "session", account, quotas, now);
        node.commands.set_clock(now);
        node.join(now);
        Self { node, local: Quotas::new(quotas, now), steps_applied: 0 }
    }

    fn settle(&mut self, now: Timestamp, id: &str, receipt: Receipt, spent: Amounts) {
        self.local.settle(now, receipt, spent);
        let step = Step::new(StepKind::Settle, id.to_owned(), spent);
        let command = self.node.commands.apply(self.steps_applied + 1, &[step], &[]);
        assert_eq!(self.node.call(&command).values, [1]);
        self.steps_applied += 1;
    }

    fn compare(&mut self, now: Timestamp) {
        let summary = |quotas: &mut Quotas| {
            let levels = quotas.levels(now).into_iter();
            levels.map(|l| (l.quota, l.level, l.held, l.used, l.reset_ms)).collect::<Vec<_>>()
        };
        assert_eq!(summary(&mut self.node.mirror(now)), summary(&mut self.local));
    }
}

struct Open {
    id: String,
    own: Receipt,
    at_upstream: Receipt,
}

#[derive(Debug, Default)]
struct Counts {
    admitted: u64,
    clamped: u64,
    denied: u64,
    /// Only the upstream had no room.
    denied_by_upstream: u64,
    /// The environment had no room, in shadow mode.
    shadow: u64,
}

/// Decides as the engine does. `None`: denied.
fn decide(
    (own, upstream): (&mut Quotas, &mut Quotas),
    now: Timestamp,
    (subject, sent): (Subject<'_>, Subject<'_>),
    required: &Required,
    (on_shortage, completions): (OnShortage, u64),
    counts: &mut Counts,
) -> Option<(Receipt, Receipt)> {
    let (subject, sent) = (own.applicable(subject), upstream.applicable(sent));
    let of_upstream = upstream.denial(now, &sent, required).is_some();
    let of_own = own.denial(now, &subject, required).is_some();
    counts.denied_by_upstream += u64::from(of_upstream && !of_own);
    let mut taken = *required;
    match on_shortage {
        _ if !of_upstream && !of_own => counts.admitted += 1,
        OnShortage::AdmitAnyway if !of_upstream => counts.shadow += 1,
        OnShortage::Clamp => {
            let prompt = required.amounts.prompt;
            let room = own
                .completion_that_fits(now, &subject, prompt)
                .min(upstream.completion_that_fits(now, &sent, prompt));
            let each = room / completions;
            taken = Required {
                amounts: Amounts::of_request(prompt, each.saturating_mul(completions)),
                generates: true,
            };
            let is_lower = each >= 16 && taken.amounts.completion < required.amounts.completion;
            let is_short =
                own.denial(now, &subject, &taken).is_some() || upstream.denial(now, &sent, &taken).is_some();
            if !is_lower || is_short {
                counts.denied += 1;
                return None;
            }
            counts.clamped += 1;
        }
        _ => {
            counts.denied += 1;
            return None;
        }
    }
    Some((own.reserve_unchecked(now, &subject, &taken), upstream.reserve_unchecked(now, &sent, &taken)))
}

#[test]
fn the_script_and_the_engine_agree_about_an_environment_and_its_upstream() {
    let server = Server::start();
    let (mut dice, mut now) = (Dice(21), Timestamp(1_774_700_000_000));
    let mut own = Side::new(&server, "staging", &environment_quotas(), now);
    let mut upstream = Side::new(&server, "upstream:u", &upstream_quotas(), now);
    let (mut open, mut counts): (Vec<Open>, Counts) = (Vec::new(), Counts::default());
    for number in 0..15_000 {
        match dice.below(10) {
            0..4 => {
                let model = MODELS[dice.pick(2)];
                let subject = Subject { caller: None, model };
                let amounts = Amounts::of_request(dice.below(MAX_AMOUNT), dice.below(MAX_AMOUNT));
                let required = Required { amounts, generates: true };
                let on_shortage =
                    [OnShortage::Reject, OnShortage::AdmitAnyway, OnShortage::Clamp][dice.pick(3)];
                let completions = 1 + dice.below(3);
                let (id, touched) = (number.to_string(), own.local.applicable(subject));
                let of_upstream = upstream.local.applicable(subject);
                let request = ReserveRequest {
                    id: &id,
                    max_in_flight: 0,
                    on_shortage,
                    generates: true,
                    amounts,
                    completions,
                };
                let other = UpstreamReserve { id: &id, max_in_flight: 0, touched: of_upstream.limited() };
                let commands = &mut upstream.node.commands;
                let command = own.node.commands.reserve_at(&request, touched.limited(), commands, &other);
                let verdict = own.node.call_at(&upstream.node, &command).verdict;
                let quotas = (&mut own.local, &mut upstream.local);
                let shortage = (on_shortage, completions);
                match decide(quotas, now, (subject, subject), &required, shortage, &mut counts) {
                    Some((own, at_upstream)) => {
                        assert_eq!(verdict, Verdict::Admitted);
                        open.push(Open { id, own, at_upstream });
                    }
                    None => assert_eq!(verdict, Verdict::Denied),
                }
            }
            4..7 if !open.is_empty() => {
                let Open { id, own: receipt, at_upstream } = open.swap_remove(dice.pick(open.len()));
                let spent = Amounts::of_request(dice.below(MAX_AMOUNT), dice.below(MAX_AMOUNT));
                own.settle(now, &id, receipt, spent);
                upstream.settle(now, &id, at_upstream, spent);
            }
            _ => {
                now = Timestamp(now.0 + i64::try_from(dice.below(1_500)).unwrap());
                own.node.commands.set_clock(now);
                upstream.node.commands.set_clock(now);
            }
        }
        if number % 8 == 0 {
            own.compare(now);
            upstream.compare(now);
        }
    }
    println!("{counts:?}");
    let Counts { admitted, clamped, denied, denied_by_upstream, shadow } = counts;
    assert!([admitted, clamped, denied, denied_by_upstream, shadow].iter().all(|&n| n > 20));
}
