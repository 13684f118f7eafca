use super::*;
use crate::config::{OnOverrun, ReserveSettings};
use crate::ledger::demand::Progress;
use crate::quota::{Kind, Period, Quota, Scope, Wait, Window};
use std::time::Duration;

const NOW: Timestamp = Timestamp(1_774_700_000_000);

fn total(limit: u64) -> Quota {
    let per = Period { text: "day".into(), ms: 86_400_000 };
    let window = Window::Rolling { burst: limit };
    Quota { scope: Scope::Environment, kind: Kind::TotalTokens, limit, per, window }
}

fn rules(completion: CompletionReserve) -> Rules {
    let reserve = ReserveSettings {
        prompt: true,
        completion,
        quantile: 0.9,
        default_max_tokens: 4_096,
        when_short: WhenShort::Reject,
        on_overrun: OnOverrun::Finish,
        max_wait: Duration::ZERO,
    };
    Rules { reserve, enforce: true, max_in_flight: None }
}

fn local(rules: Rules, limit: u64) -> Local {
    Local::new(rules, &[total(limit)], NOW)
}

fn subject() -> Subject<'static> {
    Subject { caller: None, model: "m" }
}

fn demand(prompt: u64, cap: Option<u64>) -> Demand<'static> {
    Demand {
        subject: subject(),
        prompt,
        generates: true,
        cap,
        completions: 1,
        backends: &[],
        may_clamp: true,
    }
}

fn allowance_of(local: &Local) -> u64 {
    local.allowance(&demand(10, None), &local.quotas.applicable(subject()), None)
}

fn level(local: &mut Local) -> (i64, u64) {
    let levels = local.levels(NOW);
    (levels[0].level, levels[0].held)
}

fn settle(local: &mut Local, admission: Admission, prompt: u64, completion: u64) {
    let spent = Amounts::of_request(prompt, completion);
    local.settle(NOW, subject(), admission.grant, Settlement { spent, is_complete: true });
}

#[test]
fn adaptive_reserves_the_length_of_recent_answers() {
    let mut c = local(rules(CompletionReserve::Adaptive), 1_000_000);
    let first = c.admit(NOW, &demand(10, None)).unwrap();
    assert_eq!(first.grant.reserved(), Amounts::of_request(10, 512), "the prior");
    settle(&mut c, first, 10, 100);
    for _ in 0..30 {
        let next = c.admit(NOW, &demand(10, None)).unwrap();
        settle(&mut c, next, 10, 100);
    }
    let learned = c.admit(NOW, &demand(10, None)).unwrap();
    assert!((90..=112).contains(&learned.grant.reserved().completion), "{learned:?}");
    let bounded = c.admit(NOW, &demand(10, Some(7))).unwrap();
    assert_eq!(bounded.grant.reserved().completion, 7, "never more than the request's own limit");
    let several = Demand { completions: 3, ..demand(10, None) };
    let several = c.admit(NOW, &several).unwrap();
    assert_eq!(several.grant.reserved().completion, 3 * learned.grant.reserved().completion);
}

#[test]
fn an_incomplete_answer_is_not_learned() {
    let mut c = local(rules(CompletionReserve::Adaptive), 1_000_000);
    for _ in 0..50 {
        let admission = c.admit(NOW, &demand(10, None)).unwrap();
        let settlement = Settlement { spent: Amounts::of_request(10, 1), is_complete: false };
        c.settle(NOW, subject(), admission.grant, settlement);
    }
    assert_eq!(c.admit(NOW, &demand(10, None)).unwrap().grant.reserved().completion, 512);
}

#[test]
fn the_adaptive_allowance_is_at_most_half_of_a_small_quota() {
    for limit in [11, 20, 100, 600] {
        let mut c = local(rules(CompletionReserve::Adaptive), limit);
        let admission = c.admit(NOW, &demand(10, Some(4_096))).unwrap();
        let allowance = admission.grant.reserved().completion;
        assert!(allowance >= 1 && allowance <= (limit - 10).div_ceil(2), "{limit}: {allowance}");
    }
}

#[test]
fn a_request_that_does_not_fit_is_clamped_to_what_is_left() {
    let mut clamping = rules(CompletionReserve::MaxTokens);
    clamping.reserve.when_short = WhenShort::Clamp;
    let mut c = local(clamping, 100);
    let clamped = c.admit(NOW, &demand(10, Some(4_000))).unwrap();
    assert_eq!((clamped.clamped_to, clamped.grant.reserved().total), (Some(90), 100));
    settle(&mut c, clamped, 10, 40);
    let two = Demand { completions: 2, ..demand(9, Some(100)) };
    let two = c.admit(NOW, &two).unwrap();
    assert_eq!((two.clamped_to, two.grant.reserved().completion), (Some(20), 40), "both completions fit");
    settle(&mut c, two, 9, 0);
    let fits = c.admit(NOW, &demand(10, Some(31))).unwrap();
    assert_eq!(fits.clamped_to, None);
    assert!(c.admit(NOW, &demand(10, Some(5))).is_err(), "less than the minimum clamp is left");
    assert!(matches!(c.admit(NOW, &demand(101, Some(5))).unwrap_err().wait(), Some(Wait::Never)));
}

#[test]
fn shadow_mode_admits_and_reports_what_would_have_been_denied() {
    let mut shadow = rules(CompletionReserve::MaxTokens);
    shadow.enforce = false;
    shadow.max_in_flight = Some(1);
    let mut c = local(shadow, 100);
    let fits = c.admit(NOW, &demand(10, Some(50))).unwrap();
    assert!(fits.would_deny.is_none());
    let second = c.admit(NOW, &demand(10, Some(10))).unwrap();
    assert_eq!(second.would_deny.as_deref(), Some(&NoRoom::InFlight { limit: 1, upstream: None }));
    settle(&mut c, second, 10, 10);
    settle(&mut c, fits, 10, 50);
    let beyond = c.admit(NOW, &demand(10, Some(500))).unwrap();
    assert!(matches!(beyond.would_deny.as_deref(), Some(NoRoom::Quota(_))));
    assert_eq!(level(&mut c), (-490, 510));
    settle(&mut c, beyond, 10, 90);
    assert_eq!((level(&mut c), c.totals.rejected), ((-80, 0), 0));
}

#[test]
fn a_stream_that_outgrows_its_allowance_is_extended_while_there_is_room() {
    let mut c = local(rules(CompletionReserve::Fixed(50)), 300);
    let mut admission = c.admit(NOW, &demand(10, None)).unwrap();
    let grant = &mut admission.grant;
    assert_eq!(c.progress(NOW, "m", grant, Amounts::of_request(10, 40)), Progress::Within);
    assert_eq!(level(&mut c), (240, 10), "the prompt and 40 tokens are spent");
    assert_eq!(c.progress(NOW, "m", grant, Amounts::of_request(10, 60)), Progress::Within);
    assert_eq!((grant.reserved().completion, level(&mut c)), (50 + 64, (176, 54)));
    assert_eq!(c.progress(NOW, "m", grant, Amounts::of_request(10, 280)), Progress::Within);
    assert_eq!(level(&mut c), (10, 0));
    assert_eq!(c.progress(NOW, "m", grant, Amounts::of_request(10, 291)), Progress::Overrun);
    assert_eq!(level(&mut c), (-1, 0), "the overrun becomes debt at once");
    assert_eq!((grant.reserved().completion, grant.progress_threshold()), (291, 291 + 64));
    assert_eq!(c.held, grant.reserved());
    settle(&mut c, admission, 12, 300);
    assert_eq!((level(&mut c), c.held, c.in_flight), ((-12, 0), Amounts::default(), 0));
    assert_eq!((c.totals.prompt, c.totals.completion, c.totals.total), (12, 300, 312));
}

#[test]
fn an_overrun_becomes_debt_before_the_stream_ends_and_is_charged_once() {
    let mut c = local(rules(CompletionReserve::Fixed(5)), 60);
    let mut admission = c.admit(NOW, &demand(8, None)).unwrap();
    assert_eq!(c.progress(NOW, "m", &mut admission.grant, Amounts::of_request(8, 30)), Progress::Within);
    assert_eq!(level(&mut c), (22, 0), "64 more do not fit, but the used tokens do");
    for tokens in [290u64, 295, 400] {
        let spent = Amounts::of_request(8, tokens);
        let outcome = c.progress(NOW, "m", &mut admission.grant, spent);
        assert_eq!((outcome, level(&mut c)), (Progress::Overrun, (52 - tokens.cast_signed(), 0)));
        assert!(c.admit(NOW, &demand(1, Some(1))).is_err(), "other requests are denied while there is debt");
    }
    assert_eq!(c.held, admission.grant.reserved(), "a crash would charge everything");
    settle(&mut c, admission, 8, 390);
    assert_eq!((level(&mut c), c.held), ((60 - 398, 0), Amounts::default()));
}

#[test]
fn a_stream_within_its_own_limit_is_not_an_overrun_and_is_not_extended_beyond_it() {
    let mut c = local(rules(CompletionReserve::MaxTokens), 28);
    let mut exact = c.admit(NOW, &demand(8, Some(20))).unwrap();
    assert_eq!((exact.grant.cap(), exact.grant.progress_threshold()), (20, 20));
    assert_eq!(c.progress(NOW, "m", &mut exact.grant, Amounts::of_request(8, 20)), Progress::Within);
    settle(&mut c, exact, 8, 20);

    let mut c = local(rules(CompletionReserve::Fixed(5)), 1_000);
    let mut bounded = c.admit(NOW, &demand(8, Some(20))).unwrap();
    assert_eq!(c.progress(NOW, "m", &mut bounded.grant, Amounts::of_request(8, 6)), Progress::Within);
    assert_eq!(bounded.grant.reserved().completion, 20, "a full extension would be 64");
    assert_eq!(c.progress(NOW, "m", &mut bounded.grant, Amounts::of_request(8, 23)), Progress::Within);
    assert_eq!(bounded.grant.reserved().completion, 23, "the upstream has exceeded the request's limit");
    assert_eq!(bounded.grant.progress_threshold(), 23 + 64, "not every further event is worth a call");
    settle(&mut c, bounded, 8, 23);
    assert_eq!(level(&mut c), (1_000 - 31, 0));
}

#[test]
fn a_stream_with_many_extensions_has_one_receipt() {
    let mut c = local(rules(CompletionReserve::Fixed(5)), 500);
    let mut admission = c.admit(NOW, &demand(8, None)).unwrap();
    for tokens in 0..2_000 {
        c.progress(NOW, "m", &mut admission.grant, Amounts::of_request(8, tokens));
    }
    assert_eq!(admission.grant.receipts.len(), 1);
    settle(&mut c, admission, 8, 2_000);
    assert_eq!((level(&mut c), c.held), ((500 - 2_008, 0), Amounts::default()));
}

#[test]
fn shadow_mode_does_not_clamp() {
    let mut shadow = rules(CompletionReserve::MaxTokens);
    (shadow.enforce, shadow.reserve.when_short) = (false, WhenShort::Clamp);
    let mut c = local(shadow, 100);
    let short = c.admit(NOW, &demand(10, Some(500))).unwrap();
    assert_eq!((short.clamped_to, short.grant.reserved().completion), (None, 500));
    assert_eq!(short.would_deny, None, "it would have been clamped, not denied");
    let denied = c.admit(NOW, &demand(10, Some(500))).unwrap();
    assert!(denied.would_deny.is_some());
    settle(&mut c, short, 10, 500);
    settle(&mut c, denied, 10, 500);
}

#[test]
fn an_answer_that_ended_at_its_clamped_limit_is_not_learned() {
    let mut clamping = rules(CompletionReserve::Adaptive);
    clamping.reserve.when_short = WhenShort::Clamp;
    let mut c = local(clamping, 1_000);
    let holds = c.admit(NOW, &demand(800, None)).unwrap();
    for _ in 0..50 {
        let clamped = c.admit(NOW, &demand(10, None)).unwrap();
        let bound = clamped.clamped_to.unwrap();
        assert!(bound < 256);
        settle(&mut c, clamped, 10, bound);
        c.reset(NOW, None);
    }
    settle(&mut c, holds, 800, 0);
    c.reset(NOW, None);
    assert_eq!(
        c.admit(NOW, &demand(10, None)).unwrap().grant.reserved().completion,
        495,
        "half of the quota, less the prompt"
    );
}

#[test]
fn a_denied_request_that_could_be_clamped_later_gets_a_finite_wait() {
    let mut clamping = rules(CompletionReserve::MaxTokens);
    clamping.reserve.when_short = WhenShort::Clamp;
    let mut c = local(clamping, 100);
    let first = c.admit(NOW, &demand(10, Some(80))).unwrap();
    let denied = c.admit(NOW, &demand(10, Some(4_000))).unwrap_err();
    assert!(matches!(denied.wait(), Some(Wait::Ms(_))), "{denied:?}");
    assert_eq!(
        denied.worst().map(|s| s.requested),
        Some(26),
        "the prompt and the minimum clamp of 16 tokens"
    );
    settle(&mut c, first, 10, 80);
}

#[test]
fn a_denial_behind_waiting_requests_reserves_nothing_and_has_a_reason() {
    let mut c = local(rules(CompletionReserve::MaxTokens), 100);
    let first = c.admit(NOW, &demand(10, Some(50))).unwrap();
    let small = demand(10, Some(10));
    assert_eq!(c.obstacle(NOW, &small, None), None);
    let denied = c.reason_to_deny(NOW, &small, None);
    assert_eq!((denied.wait(), denied.worst().map(|s| s.remaining)), (Some(Wait::Ms(1_000)), Some(40)));
    assert_eq!((level(&mut c), c.in_flight), ((40, 60), 1));
    let never = c.obstacle(NOW, &demand(10, Some(91)), None).unwrap();
    assert_eq!(never.soonest(), Wait::Never);
    settle(&mut c, first, 10, 50);
}

#[test]
fn the_soonest_time_assumes_that_everything_held_is_released_now() {
    let mut c = local(rules(CompletionReserve::MaxTokens), 86_400);
    let spent = c.admit(NOW, &demand(0, Some(80_000))).unwrap();
    settle(&mut c, spent, 0, 80_000);
    let held = c.admit(NOW, &demand(0, Some(6_000))).unwrap();
    let soonest = |c: &mut Local, tokens| c.obstacle(NOW, &demand(0, Some(tokens)), None).unwrap().soonest();
    assert_eq!(soonest(&mut c, 6_400), Wait::Ms(0), "it fits as soon as the other request ends");
    // The quota refills one token a second.
    assert_eq!(soonest(&mut c, 6_500), Wait::Ms(99_000));
    settle(&mut c, held, 0, 0);
    assert_eq!(soonest(&mut c, 6_500), Wait::Ms(100_000));
}

#[test]
fn tokens_counted_too_high_during_the_stream_are_refunded_at_the_end() {
    let mut c = local(rules(CompletionReserve::Fixed(50)), 300);
    let mut admission = c.admit(NOW, &demand(10, None)).unwrap();
    c.progress(NOW, "m", &mut admission.grant, Amounts::of_request(10, 70));
    settle(&mut c, admission, 8, 30);
    assert_eq!(level(&mut c), (262, 0));
}

#[test]
fn a_request_without_a_reserved_completion_is_never_extended() {
    let mut afterwards = rules(CompletionReserve::None);
    afterwards.reserve.prompt = false;
    let mut c = local(afterwards, 100);
    let mut admission = c.admit(NOW, &demand(10, None)).unwrap();
    assert_eq!(c.progress(NOW, "m", &mut admission.grant, Amounts::of_request(10, 500)), Progress::Within);
    assert_eq!(level(&mut c), (100, 0));
    assert_eq!(admission.grant.progress_threshold(), u64::MAX, "no event requires a call of progress");
    settle(&mut c, admission, 10, 500);
    assert_eq!(level(&mut c), (-410, 0));
    assert!(c.admit(NOW, &demand(0, None)).is_err(), "an exhausted quota admits nothing");
}

#[test]
fn requests_that_generate_nothing_do_not_lower_the_adaptive_allowance() {
    let mut c = local(rules(CompletionReserve::Adaptive), 100_000_000);
    for n in 0..99 {
        let answer = c.admit(NOW, &demand(10, None)).unwrap();
        settle(&mut c, answer, 10, [20, 30, 400][n % 3]);
    }
    let alone = allowance_of(&c);
    for _ in 0..1_000 {
        let embedding = Demand { generates: false, ..demand(10, None) };
        let embedding = c.admit(NOW, &embedding).unwrap();
        assert_eq!(allowance_of(&c), alone, "an embedding has no answer whose length could balance others");
        settle(&mut c, embedding, 10, 0);
    }
    assert_eq!(allowance_of(&c), alone);
    let denied_by_redis = c.admit(NOW, &Demand { generates: false, ..demand(10, None) }).unwrap();
    c.revert(NOW, "m", denied_by_redis.grant);
    assert_eq!(allowance_of(&c), alone);
}

#[test]
fn every_end_of_a_request_removes_it_from_all_counts_in_flight() {
    let mut c = local(rules(CompletionReserve::Adaptive), 100_000_000);
    for _ in 0..99 {
        let answer = c.admit(NOW, &demand(10, None)).unwrap();
        settle(&mut c, answer, 10, 100);
    }
    let alone = allowance_of(&c);
    let outgrow = |c: &mut Local| {
        let mut admission = c.admit(NOW, &demand(10, None)).unwrap();
        c.progress(NOW, "m", &mut admission.grant, Amounts::of_request(10, 5_000));
        admission
    };
    let (settled, reverted, cut) = (outgrow(&mut c), outgrow(&mut c), outgrow(&mut c));
    let nothing = Settlement::default();
    c.settle(NOW, subject(), cut.grant, nothing);
    c.revert(NOW, "m", reverted.grant);
    c.settle(NOW, subject(), settled.grant, Settlement { spent: Amounts::of_request(10, 100), ..nothing });
    assert_eq!((c.in_flight, c.held, allowance_of(&c)), (0, Amounts::default(), alone));
    assert_eq!(level(&mut c).1, 0);
}

#[test]
fn any_number_of_embeddings_leaves_the_allowance_of_a_lone_chat_unchanged() {
    let mut c = local(rules(CompletionReserve::Adaptive), 100_000_000);
    for tokens in [20, 30, 400] {
        let answer = c.admit(NOW, &demand(10, None)).unwrap();
        settle(&mut c, answer, 10, tokens);
    }
    let before = allowance_of(&c);
    for count in [10, 100, 1_000] {
        for _ in 0..count {
            let embedding = c.admit(NOW, &Demand { generates: false, ..demand(10, None) }).unwrap();
            settle(&mut c, embedding, 10, 0);
        }
        assert_eq!(allowance_of(&c), before, "after {count} embeddings");
        assert!(c.lengths.is_idle());
    }
}

mod properties {
    use super::*;
    use proptest::prelude::*;

    const MODELS: [&str; 3] = ["gpt-4o", "m", "other"];

    #[derive(Clone, Copy, Debug)]
    enum RequestStep {
        /// A request begins: its model, whether it generates, and whether Redis has admitted it.
        Begin(usize, bool, bool),
        Progress(u64),
        Settle(u64, bool),
        Revert,
    }

    fn event() -> impl Strategy<Value = RequestStep> {
        prop_oneof![
            3 => (0..MODELS.len(), any::<bool>(), any::<bool>())
                .prop_map(|(model, generates, is_shared)| RequestStep::Begin(model, generates, is_shared)),
            2 => (0u64..3_000).prop_map(RequestStep::Progress),
            2 => (0u64..3_000, any::<bool>()).prop_map(|(tokens, is_complete)| RequestStep::Settle(tokens, is_complete)),
            1 => Just(RequestStep::Revert),
        ]
    }

    fn begin(c: &mut Local, model: &str, generates: bool, is_shared: bool) -> Box<Grant> {
        let subject = Subject { caller: None, model };
        let demand = Demand { subject, generates, ..demand(10, None) };
        let admission = if is_shared {
            let own = c.quotas.applicable(demand.subject);
            c.admit_regardless(NOW, &demand, &own, 9)
        } else {
            c.admit(NOW, &demand).unwrap()
        };
        admission.grant
    }

    proptest! {
        #[test]
        fn nothing_is_in_flight_after_all_requests_have_ended(
            events in prop::collection::vec((event(), 0usize..8), 1..120),
        ) {
            let mut c = local(rules(CompletionReserve::Adaptive), 100_000_000);
            let mut open: Vec<(&str, Box<Grant>)> = Vec::new();
            // At the end, every request that is still open is settled.
            let last = events.iter().map(|_| (RequestStep::Settle(700, true), 0));
            for (event, at) in events.clone().into_iter().chain(last) {
                if let RequestStep::Begin(model, generates, is_shared) = event {
                    open.push((MODELS[model], begin(&mut c, MODELS[model], generates, is_shared)));
                    continue;
                }
                if open.is_empty() {
                    continue;
                }
                let (model, mut grant) = open.swap_remove(at % open.len());
                match event {
                    RequestStep::Progress(tokens) => {
                        c.progress(NOW, model, &mut grant, Amounts::of_request(10, tokens));
                        open.push((model, grant));
                    }
                    RequestStep::Settle(tokens, is_complete) => {
                        let settlement = Settlement { spent: Amounts::of_request(10, tokens), is_complete };
                        c.settle(NOW, Subject { caller: None, model }, grant, settlement);
                    }
                    RequestStep::Revert | RequestStep::Begin(..) => c.revert(NOW, model, grant),
                }
            }
            prop_assert!(open.is_empty());
            prop_assert_eq!((c.in_flight, c.held), (0, Amounts::default()));
            prop_assert!(c.lengths.is_idle());
            prop_assert_eq!(level(&mut c).1, 0);
        }
    }
}
