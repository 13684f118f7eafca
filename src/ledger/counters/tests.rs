use super::*;
use crate::config::OnOverrun;
use crate::quota::{Kind, Period, Quota, Scope, Window};
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

fn counters(rules: Rules, limit: u64) -> Counters {
    Counters::new(rules, &[total(limit)], NOW)
}

fn subject() -> Subject<'static> {
    Subject { caller: None, model: "m" }
}

fn demand(prompt: u64, cap: Option<u64>) -> Demand<'static> {
    Demand { subject: subject(), prompt, generates: true, cap, completions: 1 }
}

fn level(counters: &mut Counters) -> (i64, u64) {
    let levels = counters.levels(NOW);
    (levels[0].level, levels[0].held)
}

fn settle(counters: &mut Counters, admission: Admission, prompt: u64, completion: u64) {
    let spent = Amounts::of_request(prompt, completion);
    counters.settle(NOW, subject(), admission.grant, Ended { spent, is_whole: true });
}

#[test]
fn adaptive_reserves_what_recent_answers_used() {
    let mut c = counters(rules(CompletionReserve::Adaptive), 1_000_000);
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
    assert_eq!(bounded.grant.reserved().completion, 7, "never more than the request's own cap");
    let several = Demand { completions: 3, ..demand(10, None) };
    let several = c.admit(NOW, &several).unwrap();
    assert_eq!(several.grant.reserved().completion, 3 * learned.grant.reserved().completion);
}

#[test]
fn an_answer_that_was_cut_teaches_nothing() {
    let mut c = counters(rules(CompletionReserve::Adaptive), 1_000_000);
    for _ in 0..50 {
        let admission = c.admit(NOW, &demand(10, None)).unwrap();
        let ended = Ended { spent: Amounts::of_request(10, 1), is_whole: false };
        c.settle(NOW, subject(), admission.grant, ended);
    }
    assert_eq!(c.admit(NOW, &demand(10, None)).unwrap().grant.reserved().completion, 512);
}

#[test]
fn a_small_quota_does_not_deny_its_first_request_for_ever() {
    for limit in [11, 20, 100, 600] {
        let mut c = counters(rules(CompletionReserve::Adaptive), limit);
        let admission = c.admit(NOW, &demand(10, Some(4_096))).unwrap();
        let allowance = admission.grant.reserved().completion;
        assert!(allowance >= 1 && allowance <= (limit - 10).div_ceil(2), "{limit}: {allowance}");
    }
}

#[test]
fn a_request_that_is_short_of_room_is_clamped_to_what_is_left() {
    let mut with_clamp = rules(CompletionReserve::MaxTokens);
    with_clamp.reserve.when_short = WhenShort::Clamp;
    let mut c = counters(with_clamp, 100);
    let clamped = c.admit(NOW, &demand(10, Some(4_000))).unwrap();
    assert_eq!((clamped.clamped_to, clamped.grant.reserved().total), (Some(90), 100));
    settle(&mut c, clamped, 10, 40);
    let two = Demand { completions: 2, ..demand(9, Some(100)) };
    let two = c.admit(NOW, &two).unwrap();
    assert_eq!((two.clamped_to, two.grant.reserved().completion), (Some(20), 40), "both of them fit");
    settle(&mut c, two, 9, 0);
    let fits = c.admit(NOW, &demand(10, Some(31))).unwrap();
    assert_eq!(fits.clamped_to, None);
    assert!(c.admit(NOW, &demand(10, Some(5))).is_err(), "there is nothing left to be clamped to");
    assert!(matches!(c.admit(NOW, &demand(101, Some(5))).unwrap_err().wait(), Some(Wait::Never)));
}

#[test]
fn quotas_that_only_watch_admit_and_tell_what_they_would_have_done() {
    let mut watching = rules(CompletionReserve::MaxTokens);
    watching.enforce = false;
    watching.max_in_flight = Some(1);
    let mut c = counters(watching, 100);
    let fits = c.admit(NOW, &demand(10, Some(50))).unwrap();
    assert!(fits.would_deny.is_none());
    let second = c.admit(NOW, &demand(10, Some(10))).unwrap();
    assert_eq!(second.would_deny, Some(NoRoom::InFlight { limit: 1 }));
    settle(&mut c, second, 10, 10);
    settle(&mut c, fits, 10, 50);
    let beyond = c.admit(NOW, &demand(10, Some(500))).unwrap();
    assert!(matches!(beyond.would_deny, Some(NoRoom::Quota(_))));
    assert_eq!(level(&mut c), (-490, 510));
    settle(&mut c, beyond, 10, 90);
    assert_eq!((level(&mut c), c.totals.rejected), ((-80, 0), 0));
}

#[test]
fn a_stream_that_outgrows_its_allowance_is_extended_while_there_is_room() {
    let mut c = counters(rules(CompletionReserve::Fixed(50)), 300);
    let mut admission = c.admit(NOW, &demand(10, None)).unwrap();
    let grant = &mut admission.grant;
    assert_eq!(c.progress(NOW, "m", grant, Amounts::of_request(10, 40)), Progress::Within);
    assert_eq!(level(&mut c), (240, 10), "the prompt and 40 tokens are spent");
    assert_eq!(c.progress(NOW, "m", grant, Amounts::of_request(10, 60)), Progress::Within);
    assert_eq!((grant.reserved().completion, level(&mut c)), (50 + 64, (176, 54)));
    assert_eq!(c.progress(NOW, "m", grant, Amounts::of_request(10, 280)), Progress::Within);
    assert_eq!(level(&mut c), (10, 0));
    assert_eq!(c.progress(NOW, "m", grant, Amounts::of_request(10, 291)), Progress::Overrun);
    assert_eq!(level(&mut c), (-1, 0), "what it has used is seen at once");
    assert_eq!((grant.reserved().completion, grant.tell_beyond()), (291, 291 + 64));
    assert_eq!(c.held, grant.reserved());
    settle(&mut c, admission, 12, 300);
    assert_eq!((level(&mut c), c.held, c.in_flight), ((-12, 0), Amounts::default(), 0));
    assert_eq!((c.totals.prompt, c.totals.completion, c.totals.total), (12, 300, 312));
}

#[test]
fn an_overrun_is_a_debt_before_the_stream_ends_and_is_counted_once() {
    let mut c = counters(rules(CompletionReserve::Fixed(5)), 60);
    let mut admission = c.admit(NOW, &demand(8, None)).unwrap();
    assert_eq!(c.progress(NOW, "m", &mut admission.grant, Amounts::of_request(8, 30)), Progress::Within);
    assert_eq!(level(&mut c), (22, 0), "64 more do not fit, but what it has used does");
    for tokens in [290u64, 295, 400] {
        let spent = Amounts::of_request(8, tokens);
        let outcome = c.progress(NOW, "m", &mut admission.grant, spent);
        assert_eq!((outcome, level(&mut c)), (Progress::Overrun, (52 - tokens.cast_signed(), 0)));
        assert!(c.admit(NOW, &demand(1, Some(1))).is_err(), "nobody else gets what is not there");
    }
    assert_eq!(c.held, admission.grant.reserved(), "a crash would charge all of it");
    settle(&mut c, admission, 8, 390);
    assert_eq!((level(&mut c), c.held), ((60 - 398, 0), Amounts::default()));
}

#[test]
fn a_stream_within_its_own_bound_is_no_overrun_and_takes_no_more_than_it() {
    let mut c = counters(rules(CompletionReserve::MaxTokens), 28);
    let mut exact = c.admit(NOW, &demand(8, Some(20))).unwrap();
    assert_eq!((exact.grant.cap(), exact.grant.tell_beyond()), (20, 20));
    assert_eq!(c.progress(NOW, "m", &mut exact.grant, Amounts::of_request(8, 20)), Progress::Within);
    settle(&mut c, exact, 8, 20);

    let mut c = counters(rules(CompletionReserve::Fixed(5)), 1_000);
    let mut bounded = c.admit(NOW, &demand(8, Some(20))).unwrap();
    assert_eq!(c.progress(NOW, "m", &mut bounded.grant, Amounts::of_request(8, 6)), Progress::Within);
    assert_eq!(bounded.grant.reserved().completion, 20, "a step would be 64");
    assert_eq!(c.progress(NOW, "m", &mut bounded.grant, Amounts::of_request(8, 23)), Progress::Within);
    assert_eq!(bounded.grant.reserved().completion, 23, "a backend that does not keep to it");
    settle(&mut c, bounded, 8, 23);
    assert_eq!(level(&mut c), (1_000 - 31, 0));
}

#[test]
fn a_stream_that_is_extended_many_times_carries_one_receipt() {
    let mut c = counters(rules(CompletionReserve::Fixed(5)), 500);
    let mut admission = c.admit(NOW, &demand(8, None)).unwrap();
    for tokens in 0..2_000 {
        c.progress(NOW, "m", &mut admission.grant, Amounts::of_request(8, tokens));
    }
    assert_eq!(admission.grant.receipts.len(), 1);
    settle(&mut c, admission, 8, 2_000);
    assert_eq!((level(&mut c), c.held), ((500 - 2_008, 0), Amounts::default()));
}

#[test]
fn quotas_that_only_watch_do_not_clamp() {
    let mut watching = rules(CompletionReserve::MaxTokens);
    (watching.enforce, watching.reserve.when_short) = (false, WhenShort::Clamp);
    let mut c = counters(watching, 100);
    let short = c.admit(NOW, &demand(10, Some(500))).unwrap();
    assert_eq!((short.clamped_to, short.grant.reserved().completion), (None, 500));
    assert_eq!(short.would_deny, None, "it would have been served, with fewer tokens");
    let denied = c.admit(NOW, &demand(10, Some(500))).unwrap();
    assert!(denied.would_deny.is_some());
    settle(&mut c, short, 10, 500);
    settle(&mut c, denied, 10, 500);
}

#[test]
fn an_answer_that_was_clamped_short_teaches_nothing_of_how_long_answers_are() {
    let mut clamping = rules(CompletionReserve::Adaptive);
    clamping.reserve.when_short = WhenShort::Clamp;
    let mut c = counters(clamping, 1_000);
    let holds = c.admit(NOW, &demand(800, None)).unwrap();
    for _ in 0..50 {
        let clamped = c.admit(NOW, &demand(10, None)).unwrap();
        let bound = clamped.clamped_to.unwrap();
        assert!(bound < 256);
        settle(&mut c, clamped, 10, bound);
        c.reset(NOW);
    }
    settle(&mut c, holds, 800, 0);
    c.reset(NOW);
    assert_eq!(
        c.admit(NOW, &demand(10, None)).unwrap().grant.reserved().completion,
        495,
        "half of what is there"
    );
}

#[test]
fn what_could_be_clamped_later_is_not_told_that_it_never_fits() {
    let mut clamping = rules(CompletionReserve::MaxTokens);
    clamping.reserve.when_short = WhenShort::Clamp;
    let mut c = counters(clamping, 100);
    let first = c.admit(NOW, &demand(10, Some(80))).unwrap();
    let denied = c.admit(NOW, &demand(10, Some(4_000))).unwrap_err();
    assert!(matches!(denied.wait(), Some(Wait::Ms(_))), "{denied:?}");
    assert_eq!(denied.worst().map(|s| s.requested), Some(26), "16 tokens would do");
    settle(&mut c, first, 10, 80);
}

#[test]
fn a_denial_in_line_takes_nothing_and_says_why() {
    let mut c = counters(rules(CompletionReserve::MaxTokens), 100);
    let first = c.admit(NOW, &demand(10, Some(50))).unwrap();
    let small = demand(10, Some(10));
    assert_eq!(c.in_the_way(NOW, &small), None);
    let denied = c.deny(NOW, &small);
    assert_eq!((denied.wait(), denied.worst().map(|s| s.remaining)), (Some(Wait::Ms(1_000)), Some(40)));
    assert_eq!((level(&mut c), c.in_flight, c.totals.rejected), ((40, 60), 1, 1));
    let never = c.in_the_way(NOW, &demand(10, Some(91))).unwrap();
    assert_eq!(never.soonest(), Wait::Never);
    settle(&mut c, first, 10, 50);
}

#[test]
fn the_soonest_is_when_all_that_is_held_comes_back_now() {
    let mut c = counters(rules(CompletionReserve::MaxTokens), 86_400);
    let spent = c.admit(NOW, &demand(0, Some(80_000))).unwrap();
    settle(&mut c, spent, 0, 80_000);
    let held = c.admit(NOW, &demand(0, Some(6_000))).unwrap();
    let soonest = |c: &mut Counters, tokens| c.in_the_way(NOW, &demand(0, Some(tokens))).unwrap().soonest();
    assert_eq!(soonest(&mut c, 6_400), Wait::Ms(0), "it fits as soon as the other one ends");
    // A token comes back every second.
    assert_eq!(soonest(&mut c, 6_500), Wait::Ms(99_000));
    settle(&mut c, held, 0, 0);
    assert_eq!(soonest(&mut c, 6_500), Wait::Ms(100_000));
}

#[test]
fn what_was_moved_too_early_comes_back_at_the_end() {
    let mut c = counters(rules(CompletionReserve::Fixed(50)), 300);
    let mut admission = c.admit(NOW, &demand(10, None)).unwrap();
    c.progress(NOW, "m", &mut admission.grant, Amounts::of_request(10, 70));
    settle(&mut c, admission, 8, 30);
    assert_eq!(level(&mut c), (262, 0));
}

#[test]
fn reserving_nothing_is_never_extended() {
    let mut afterwards = rules(CompletionReserve::None);
    afterwards.reserve.prompt = false;
    let mut c = counters(afterwards, 100);
    let mut admission = c.admit(NOW, &demand(10, None)).unwrap();
    assert_eq!(c.progress(NOW, "m", &mut admission.grant, Amounts::of_request(10, 500)), Progress::Within);
    assert_eq!(level(&mut c), (100, 0));
    assert_eq!(admission.grant.tell_beyond(), u64::MAX, "so there is nothing to tell at every event");
    settle(&mut c, admission, 10, 500);
    assert_eq!(level(&mut c), (-410, 0));
    assert!(c.admit(NOW, &demand(0, None)).is_err(), "an exhausted quota admits nothing");
}
