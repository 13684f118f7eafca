use super::*;

fn tokens(total: u64) -> Amounts {
    Amounts { requests: 1, prompt: total / 2, completion: total - total / 2, total }
}

/// A gate whose slow start is over.
fn known() -> Gate {
    Gate { answers: SLOW_START.0, ..Gate::default() }
}

/// A statement about tokens.
fn stated(limit: u64, remaining: u64, reset_ms: u64) -> Statement {
    let mut statement = Statement::default();
    statement.kinds[Kind::TotalTokens as usize] =
        KindStatement { limit: Some(limit), remaining: Some(remaining), reset_ms: Some(reset_ms) };
    statement
}

fn refusal(retry_after_ms: u64) -> Statement {
    Statement { retry_after_ms: Some(retry_after_ms), ..Statement::default() }
}

#[test]
fn a_refusal_closes_the_gate_for_its_time_and_one_request_asks_again() {
    let mut gate = known();
    let number = gate.pass(0, tokens(10)).unwrap();
    gate.answered(0, number, &refusal(5_000), Verdict::Refused);
    assert_eq!(gate.pass(1_000, tokens(10)), Err(Hold::Wait(4_000)));
    assert_eq!(gate.closed_ms(1_000), Some(4_000));
    let probe = gate.pass(5_000, tokens(10)).unwrap();
    assert_eq!(gate.pass(5_000, tokens(10)), Err(Hold::Wait(PROBE_WAIT_MS)), "one request goes first");
    gate.answered(5_100, probe, &Statement::default(), Verdict::Accepted);
    assert!(gate.pass(5_100, tokens(10)).is_ok() && gate.pass(5_100, tokens(10)).is_ok());
}

#[test]
fn a_probe_that_is_refused_closes_the_gate_again_and_one_that_gets_no_answer_is_repeated() {
    let mut gate = known();
    let number = gate.pass(0, tokens(10)).unwrap();
    gate.answered(0, number, &refusal(1_000), Verdict::Refused);
    let probe = gate.pass(1_000, tokens(10)).unwrap();
    gate.answered(1_010, probe, &refusal(2_000), Verdict::Refused);
    assert_eq!(gate.pass(1_010, tokens(10)), Err(Hold::Wait(2_000)));
    let probe = gate.pass(3_010, tokens(10)).unwrap();
    gate.abandoned(probe);
    let again = gate.pass(3_010, tokens(10)).unwrap();
    assert_eq!(gate.pass(3_010, tokens(10)), Err(Hold::Wait(PROBE_WAIT_MS)), "one request goes first");
    // A refusal that comes in the meantime is not forgotten.
    let closed = Some(9_000);
    gate.closed_until = closed;
    gate.abandoned(again);
    assert_eq!(gate.closed_until, closed);
}

#[test]
fn a_long_time_is_cut_to_a_minute_and_no_time_closes_nothing() {
    let mut gate = known();
    let number = gate.pass(0, tokens(10)).unwrap();
    gate.answered(0, number, &refusal(3_600_000), Verdict::Refused);
    assert_eq!(gate.pass(0, tokens(10)), Err(Hold::Wait(MAX_CLOSED_MS)));
    let mut gate = known();
    let number = gate.pass(0, tokens(10)).unwrap();
    gate.answered(0, number, &Statement::default(), Verdict::Refused);
    assert!(gate.pass(0, tokens(10)).is_ok());
}

#[test]
fn a_refusal_without_a_time_waits_for_the_reset_of_what_is_exhausted() {
    let mut gate = known();
    let number = gate.pass(0, tokens(10)).unwrap();
    gate.answered(0, number, &stated(100, 0, 7_000), Verdict::Refused);
    assert_eq!(gate.pass(0, tokens(10)), Err(Hold::Wait(7_000)));
}

#[test]
fn a_request_waits_for_what_the_provider_refills() {
    let mut gate = known();
    let number = gate.pass(0, tokens(100)).unwrap();
    // 600 tokens are missing and come back within 60 s: 10 a second.
    gate.answered(0, number, &stated(1_000, 400, 60_000), Verdict::Accepted);
    let later = gate.pass(0, tokens(300)).unwrap();
    assert_eq!(gate.pass(0, tokens(200)), Err(Hold::Wait(10_000)), "100 are left besides what is in flight");
    assert_eq!(gate.pass(9_999, tokens(200)), Err(Hold::Wait(1)));
    gate.abandoned(later);
    assert!(gate.pass(9_999, tokens(200)).is_ok());
}

#[test]
fn a_window_of_which_nothing_is_left_is_waited_for_to_its_end() {
    for limit in [Some(50), None] {
        let mut statement = Statement::default();
        statement.kinds[Kind::Requests as usize] =
            KindStatement { limit, remaining: Some(0), reset_ms: Some(5_000) };
        let mut gate = known();
        let number = gate.pass(0, tokens(10)).unwrap();
        gate.answered(0, number, &statement, Verdict::Accepted);
        assert_eq!(gate.pass(1_000, tokens(10)), Err(Hold::Wait(4_000)), "{limit:?}");
        assert!(gate.pass(5_000, tokens(10)).is_ok(), "{limit:?}");
    }
    // A limit per minute that refills evenly: one of 60 requests is back after a second.
    let mut statement = Statement::default();
    statement.kinds[Kind::Requests as usize] =
        KindStatement { limit: Some(60), remaining: Some(0), reset_ms: Some(60_000) };
    let mut gate = known();
    let number = gate.pass(0, tokens(10)).unwrap();
    gate.answered(0, number, &statement, Verdict::Accepted);
    assert_eq!(gate.pass(0, tokens(10)), Err(Hold::Wait(1_000)));
}

#[test]
fn the_first_requests_start_slowly() {
    let mut gate = Gate::default();
    let mut now = 0;
    // Each answer doubles the number of requests that may be in flight.
    let mut in_flight = Vec::new();
    for bound in [1, 2, 4, 8] {
        in_flight.extend(std::iter::from_fn(|| gate.pass(now, tokens(10)).ok()).take(100));
        assert_eq!(in_flight.len(), bound);
        assert_eq!(gate.pass(now, tokens(10)), Err(Hold::SlowStart(1_000 - now)));
        now += 10;
        gate.answered(now, in_flight.remove(0), &stated(100_000, 50_000, 60_000), Verdict::Accepted);
    }
    now = 1_000;
    assert!(
        (0..100).all(|_| gate.pass(now, tokens(10)).is_ok()),
        "a second after the first request it is over"
    );
}

#[test]
fn a_request_larger_than_the_limit_waits_until_all_of_it_is_left() {
    let mut gate = known();
    let number = gate.pass(0, tokens(10)).unwrap();
    gate.answered(0, number, &stated(1_000, 900, 6_000), Verdict::Accepted);
    assert_eq!(gate.pass(0, tokens(5_000)), Err(Hold::Wait(6_000)));
    assert!(gate.pass(6_000, tokens(5_000)).is_ok());
}

#[test]
fn a_statement_includes_earlier_requests_and_not_later_ones() {
    let mut gate = known();
    let [first, second, third] = [0; 3].map(|_| gate.pass(0, tokens(100)).unwrap());
    gate.answered(OVERTAKE_MS, second, &stated(1_000, 300, 60_000), Verdict::Accepted);
    assert_eq!(gate.cost_of_later(Kind::TotalTokens), 100);
    // The older answer comes later. It changes nothing.
    gate.answered(OVERTAKE_MS, first, &stated(1_000, 900, 60_000), Verdict::Accepted);
    assert_eq!(gate.view(0)[0].remaining, Some(300));
    // An answer without a statement: its cost is subtracted.
    gate.answered(0, third, &Statement::default(), Verdict::Accepted);
    assert_eq!((gate.view(0)[0].remaining, gate.cost_of_later(Kind::TotalTokens)), (Some(200), 0));
}

#[test]
fn a_request_that_a_later_one_may_have_overtaken_still_counts() {
    let mut gate = known();
    let [first, second] = [0; 2].map(|_| gate.pass(0, tokens(100)).unwrap());
    gate.answered(OVERTAKE_MS - 1, second, &stated(1_000, 300, 60_000), Verdict::Accepted);
    assert_eq!(gate.cost_of_later(Kind::TotalTokens), 100);
    gate.answered(OVERTAKE_MS, first, &stated(1_000, 900, 60_000), Verdict::Accepted);
    assert_eq!((gate.view(0)[0].remaining, gate.cost_of_later(Kind::TotalTokens)), (Some(300), 0));
}

#[test]
fn the_cost_of_requests_is_learned() {
    let mut gate = known();
    let first = gate.pass(0, tokens(100)).unwrap();
    gate.answered(0, first, &stated(10_000, 5_000, 60_000), Verdict::Accepted);
    let second = gate.pass(0, tokens(100)).unwrap();
    // The provider takes 300 for an estimate of 100.
    gate.answered(0, second, &stated(10_000, 4_700, 63_600), Verdict::Accepted);
    assert_eq!(gate.kinds[Kind::TotalTokens as usize].cost_permille, 3_000);
    let in_flight = gate.pass(0, tokens(1_000)).unwrap();
    assert!(
        gate.pass(0, tokens(600)).is_err(),
        "3,000 are in flight, and 1,800 do not fit in the other 1,700"
    );
    gate.abandoned(in_flight);
}

#[test]
fn nothing_left_for_ever_is_ignored_until_the_next_refusal() {
    let mut nothing = Statement::default();
    nothing.kinds[Kind::Requests as usize].remaining = Some(0);
    let mut gate = known();
    let first = gate.pass(0, tokens(10)).unwrap();
    gate.answered(0, first, &nothing, Verdict::Accepted);
    let mut now = 0;
    for _ in 0..MAX_CONTRADICTIONS {
        assert_eq!(gate.pass(now, tokens(10)), Err(Hold::Wait(PROBE_WAIT_MS)));
        now += PROBE_WAIT_MS;
        let probe = gate.pass(now, tokens(10)).unwrap();
        assert!(gate.pass(now, tokens(10)).is_err());
        gate.answered(now, probe, &nothing, Verdict::Accepted);
    }
    assert_eq!(gate.ignored_kinds(), 1);
    let free: Vec<u64> = (0..10).map(|_| gate.pass(now, tokens(10)).unwrap()).collect();
    gate.answered(now, free[0], &nothing, Verdict::Refused);
    assert_eq!(gate.ignored_kinds(), 0);
}

/// A provider with a token bucket, asked by 50 clients that obey the gate.
#[test]
fn the_provider_refuses_hardly_anything_and_is_used_up() {
    const LIMIT: u64 = 60_000;
    // What the provider takes for an estimate of 1,000 tokens.
    for cost in [400_u64, 1_000, 2_500] {
        let mut gate = Gate::default();
        let (mut level, mut refusals, mut served) = (LIMIT * 1_000, 0, 0);
        let mut waits = [0_u64; 50];
        let mut in_flight: Vec<(u64, usize, u64, Statement, Verdict)> = Vec::new();
        let duration = 300_000;
        for now in 0..duration {
            level = (level + LIMIT * 1_000 / 60_000).min(LIMIT * 1_000);
            let due = in_flight.extract_if(.., |(at, ..)| *at == now).collect::<Vec<_>>();
            for (_, client, number, statement, verdict) in due {
                gate.answered(now, number, &statement, verdict);
                waits[client] = now;
            }
            for (client, wait) in waits.iter_mut().enumerate().filter(|(_, wait)| **wait <= now) {
                match gate.pass(now, tokens(1_000)) {
                    Err(Hold::Wait(ms)) => *wait = now + ms,
                    Err(Hold::SlowStart(_)) => *wait = now + 1,
                    Ok(number) => {
                        let is_served = level >= cost * 1_000;
                        let verdict = if is_served { Verdict::Accepted } else { Verdict::Refused };
                        if is_served {
                            level -= cost * 1_000;
                            served += cost;
                        } else {
                            refusals += 1;
                        }
                        let reset_ms = LIMIT - level / 1_000;
                        let mut statement = stated(LIMIT, level / 1_000, reset_ms);
                        if !is_served {
                            statement.retry_after_ms = Some((cost - level / 1_000).max(1));
                        }
                        in_flight.push((now + 50 + client as u64, client, number, statement, verdict));
                        *wait = u64::MAX;
                    }
                }
            }
        }
        let capacity = LIMIT + LIMIT * duration / 60_000;
        assert!(served * 100 >= capacity * 97, "cost {cost}: {served} of {capacity} used");
        assert!(refusals <= 5, "cost {cost}: {refusals} refusals in five windows");
    }
}

/// The gate of a new process, whose clock shows another time.
fn continued(gate: &Gate, now: u64, new_now: u64) -> Gate {
    let left: LeftGate = serde_json::from_str(&serde_json::to_string(&gate.leave(now)).unwrap()).unwrap();
    Gate::continued(new_now, &left)
}

#[test]
fn a_new_process_continues_with_the_statements_of_the_old_one() {
    let mut gate = known();
    let number = gate.pass(1_000, tokens(10)).unwrap();
    gate.answered(1_000, number, &stated(1_000, 100, 9_000), Verdict::Accepted);
    // A request in flight counts as sent.
    let _in_flight = gate.pass(1_000, tokens(60)).unwrap();
    let mut new = continued(&gate, 1_500, 70_000);
    assert_eq!(new.view(70_000)[0].reset_ms, Some(8_500));
    // 100 are refilled in a second; half a second is over.
    assert_eq!(new.pass(70_000, tokens(140)), Err(Hold::Wait(500)));
    assert!(new.pass(70_500, tokens(140)).is_ok());
}

#[test]
fn a_closed_gate_stays_closed_in_a_new_process_and_one_request_asks_again() {
    let mut gate = known();
    let number = gate.pass(0, tokens(10)).unwrap();
    gate.answered(0, number, &refusal(5_000), Verdict::Refused);
    let mut new = continued(&gate, 2_000, 90_000);
    assert_eq!(new.pass(90_000, tokens(10)), Err(Hold::Wait(3_000)));
    assert!(new.pass(93_000, tokens(10)).is_ok());
    assert_eq!(new.pass(93_000, tokens(10)), Err(Hold::Wait(PROBE_WAIT_MS)), "one request goes first");
    // While the probe of the old process is in flight, the new one waits, and then sends its own.
    let _probe = gate.pass(5_000, tokens(10)).unwrap();
    let mut new = continued(&gate, 5_000, 90_000);
    assert_eq!(new.pass(90_000, tokens(10)), Err(Hold::Wait(PROBE_WAIT_MS)));
    assert!(new.pass(90_000 + PROBE_WAIT_MS, tokens(10)).is_ok());
    assert_eq!(new.pass(90_000 + PROBE_WAIT_MS, tokens(10)), Err(Hold::Wait(PROBE_WAIT_MS)));
}
