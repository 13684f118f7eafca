//! How long answers are: what the last ones of each model used, in bounded memory.
//!
//! Recent answers count more, so that a change of traffic is followed within a few hundred answers.
//! Integers only; the same answers in the same order always give the same allowance.

use std::collections::HashMap;

/// Until answers were seen, this many completion tokens are expected of each.
const PRIOR: u64 = 512;
/// The prior counts as much as so many answers.
const PRIOR_WEIGHT: u32 = 2;
/// More models than this are not told apart: the least recently learned gives way.
const MOST_MODELS: usize = 512;
/// Models whose names are longer are told apart by so much of them.
const LONGEST_NAME: usize = 128;
/// What an answer weighs when it comes in.
const WEIGHT: u32 = 64;
/// When all weights together come to so many answers, they are halved.
const MEMORY: u32 = 512;
/// Of many answers under way, all together are taken to stay within three standard errors of the mean. With
/// two, traces at 30 and at 3 tokens a second showed no overshoot either and 0.3 % more were admitted, but of
/// a trickle of requests a few less.
const ERRORS_SQUARED: u128 = 9;
/// Values below this have a slot each; above, each power of two has `STEPS` slots.
const EXACT: u64 = 16;
const STEPS: usize = 8;
const SLOTS: usize = 16 + (32 - 4) * STEPS;

/// What was learned of each model of one environment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Learned {
    models: HashMap<Box<str>, Model>,
    /// Counts the answers learned, to tell which model was seen last.
    learned: u64,
}

#[derive(Clone, Debug)]
struct Model {
    answers: Answers,
    seen: u64,
    /// Tells it from another that had the same name before.
    since: u64,
    /// Requests whose answers have not ended.
    under_way: u64,
    /// Of those, the ones that have outgrown what was reserved for them.
    outgrown: u64,
}

/// An answer that was counted before its end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Longer {
    tokens: u64,
    /// Of which memory of the model, and how often that had faded by then.
    since: u64,
    fadings: u32,
}

impl Learned {
    /// What to reserve for the next answer: the completion tokens that so many of a million answers stay
    /// within, when it is alone. Of many that are under way the long ones are paid for by the short ones:
    /// beside others it is no more than makes all of them together unlikely to be longer.
    pub(crate) fn expected(&self, model: &str, quantile_ppm: u32) -> u64 {
        let Some(known) = self.models.get(name(model)) else { return PRIOR };
        let alone = known.answers.quantile(quantile_ppm);
        // Where most of them are longer than was thought, answers are about to change: they no longer
        // pay for each other.
        let is_changing = known.outgrown * 2 > known.under_way;
        if known.under_way == 0 || is_changing {
            alone
        } else {
            alone.min(known.answers.beside(known.under_way))
        }
    }

    /// A request is under way. Returns what `ended` is to be told; `None`: nothing is known of its model.
    pub(crate) fn began(&mut self, model: &str) -> Option<u64> {
        let known = self.models.get_mut(name(model))?;
        known.under_way += 1;
        Some(known.since)
    }

    /// It is no longer.
    pub(crate) fn ended(&mut self, model: &str, since: u64) {
        if let Some(known) = self.models.get_mut(name(model)).filter(|known| known.since == since) {
            known.under_way = known.under_way.saturating_sub(1);
        }
    }

    /// An answer that has come to its end.
    pub(crate) fn learn(&mut self, model: &str, completion_tokens: u64) {
        self.learned += 1;
        let model = name(model);
        if !self.models.contains_key(model) {
            self.make_room();
            let new =
                Model { answers: Answers::new(), seen: 0, since: self.learned, under_way: 0, outgrown: 0 };
            self.models.insert(model.into(), new);
        }
        if let Some(known) = self.models.get_mut(model) {
            known.seen = self.learned;
            known.answers.add(completion_tokens);
        }
    }

    /// An answer that is not at its end has outgrown what was reserved for it: it will be longer than
    /// that. Counts until `forget`, so that long answers are learned before they end, when many short
    /// ones have long been learned.
    pub(crate) fn expect_longer(&mut self, model: &str, completion_tokens: u64) -> Option<Longer> {
        let known = self.models.get_mut(name(model))?;
        known.answers.add(completion_tokens);
        known.outgrown += 1;
        let fadings = known.answers.fadings;
        Some(Longer { tokens: completion_tokens, since: known.since, fadings })
    }

    /// Takes back what `expect_longer` has counted, as far as it has not faded.
    pub(crate) fn forget(&mut self, model: &str, longer: Longer) {
        if let Some(known) = self.models.get_mut(name(model)).filter(|known| known.since == longer.since) {
            known.answers.take(longer.tokens, longer.fadings);
            known.outgrown = known.outgrown.saturating_sub(1);
        }
    }

    fn make_room(&mut self) {
        if self.models.len() < MOST_MODELS {
            return;
        }
        let oldest = self.models.iter().min_by_key(|(_, known)| known.seen).map(|(name, _)| name.clone());
        if let Some(oldest) = oldest {
            self.models.remove(&oldest);
        }
    }
}

/// As much of a model's name as is kept: callers can make names up, of any length.
fn name(model: &str) -> &str {
    &model[..model.floor_char_boundary(LONGEST_NAME)]
}

/// A histogram of answer lengths whose weights fade.
#[derive(Clone, Debug)]
struct Answers {
    weights: Box<[u32; SLOTS]>,
    total: u32,
    /// How often all weights were halved.
    fadings: u32,
    /// The weighted sums of all lengths, taken to lie in the middle of their slots, and of their squares.
    sum: u128,
    squares: u128,
}

impl Answers {
    fn new() -> Self {
        let mut answers = Self { weights: Box::new([0; SLOTS]), total: 0, fadings: 0, sum: 0, squares: 0 };
        answers.put(PRIOR, PRIOR_WEIGHT * WEIGHT);
        answers
    }

    fn add(&mut self, tokens: u64) {
        if self.total >= MEMORY * WEIGHT {
            self.weights.iter_mut().for_each(|weight| *weight /= 2);
            self.fadings += 1;
            (self.total, self.sum, self.squares) = (0, 0, 0);
            for at in 0..SLOTS {
                self.count(at, self.weights[at], true);
            }
        }
        self.put(tokens, WEIGHT);
    }

    fn put(&mut self, tokens: u64, weight: u32) {
        let at = slot(tokens);
        self.weights[at] += weight;
        self.count(at, weight, true);
    }

    /// Adds a weight in a slot to the sums, or takes it out.
    fn count(&mut self, at: usize, weight: u32, adds: bool) {
        let (first, width) = span(at);
        let (tokens, weight_of) = (u128::from(first + width / 2), u128::from(weight));
        if adds {
            self.total += weight;
            self.sum += weight_of * tokens;
            self.squares += weight_of * tokens * tokens;
        } else {
            self.total -= weight;
            self.sum -= weight_of * tokens;
            self.squares -= weight_of * tokens * tokens;
        }
    }

    /// The mean of an answer beside so many others, and three standard errors more.
    fn beside(&self, others: u64) -> u64 {
        if self.total == 0 {
            return PRIOR;
        }
        let total = u128::from(self.total);
        // The variance times `total` squared: weights below 2^17 of lengths up to 2^32 are within 128 bits.
        let spread = (total * self.squares).saturating_sub(self.sum * self.sum);
        let squared = spread / (total * total) * ERRORS_SQUARED / (u128::from(others) + 1);
        u64::try_from(self.sum / total + squared.isqrt() + 1).unwrap_or(u64::MAX)
    }

    /// Takes back what was added when it had faded so often.
    fn take(&mut self, tokens: u64, fadings: u32) {
        let left = WEIGHT.checked_shr(self.fadings.saturating_sub(fadings)).unwrap_or(0);
        let at = slot(tokens);
        let taken = left.min(self.weights[at]);
        self.weights[at] -= taken;
        self.count(at, taken, false);
    }

    /// The value below which so many of a million answers lie; within a slot they are taken to be
    /// spread evenly.
    fn quantile(&self, ppm: u32) -> u64 {
        let wanted = u64::from(self.total) * u64::from(ppm.min(1_000_000)) / 1_000_000;
        let mut below = 0;
        for (at, &weight) in self.weights.iter().enumerate() {
            let weight = u64::from(weight);
            if weight > 0 && below + weight >= wanted {
                let (first, width) = span(at);
                return first + (width - 1) * wanted.saturating_sub(below) / weight;
            }
            below += weight;
        }
        PRIOR
    }
}

fn slot(tokens: u64) -> usize {
    let tokens = tokens.min(u64::from(u32::MAX));
    if tokens < EXACT {
        return usize::try_from(tokens).unwrap_or(0);
    }
    let power = tokens.ilog2();
    let step = usize::try_from(tokens >> (power - 3)).unwrap_or(0) % STEPS;
    16 + (power as usize - 4) * STEPS + step
}

/// The smallest value of a slot, and how many values it has.
fn span(slot: usize) -> (u64, u64) {
    let Some(above) = slot.checked_sub(16) else { return (slot as u64, 1) };
    let (power, step) = (above / STEPS + 4, (above % STEPS) as u64);
    ((8 + step) << (power - 3), 1 << (power - 3))
}

#[cfg(test)]
mod tests {
    use super::*;

    const P90: u32 = 900_000;

    #[test]
    fn every_length_lies_in_its_slot() {
        let lengths = (0..5_000).chain([1 << 20, (1 << 31) - 1, 1 << 31, u64::from(u32::MAX), u64::MAX]);
        for tokens in lengths {
            let (first, width) = span(slot(tokens));
            let tokens = tokens.min(u64::from(u32::MAX));
            assert!((first..first + width).contains(&tokens), "{tokens} {first} {width}");
            assert!(width == 1 || width * 8 <= tokens, "{tokens}: {width}");
        }
    }

    #[test]
    fn a_model_starts_from_the_prior_and_is_learned_within_twenty_answers() {
        let mut learned = Learned::default();
        assert_eq!(learned.expected("m", P90), PRIOR);
        for _ in 0..20 {
            learned.learn("m", 100);
        }
        assert!((90..=112).contains(&learned.expected("m", P90)), "{}", learned.expected("m", P90));
        assert_eq!(learned.expected("another", P90), PRIOR);
    }

    #[test]
    fn the_quantile_is_close_and_follows_what_changes() {
        let mut learned = Learned::default();
        for n in 0..2_000u64 {
            learned.learn("m", 1 + n * 7_919 % 1_000);
        }
        for (ppm, demand) in [(500_000, 500), (900_000, 900), (990_000, 990)] {
            let got = learned.expected("m", ppm);
            assert!(got.abs_diff(demand) <= 40, "{ppm}: {got}");
        }
        for _ in 0..1_000 {
            learned.learn("m", 20);
        }
        assert!(learned.expected("m", P90) <= 22, "{}", learned.expected("m", P90));
    }

    #[test]
    fn answers_that_have_not_ended_are_expected_to_be_long() {
        let mut learned = Learned::default();
        (0..100).for_each(|_| learned.learn("m", 20));
        let longer: Vec<Longer> = (0..30).map_while(|_| learned.expect_longer("m", 700)).collect();
        assert!(learned.expected("m", P90) > 600);
        longer.into_iter().for_each(|longer| learned.forget("m", longer));
        assert!(learned.expected("m", P90) < 25);
        assert!(learned.expect_longer("unknown", 1).is_none());
        assert_eq!(learned.expected("unknown", P90), PRIOR);
    }

    #[test]
    fn no_more_is_taken_back_than_is_left_of_it() {
        let mut learned = Learned::default();
        (0..300).for_each(|_| learned.learn("m", 700));
        let longer: Vec<Longer> = (0..100).map_while(|_| learned.expect_longer("m", 700)).collect();
        (0..1_200).for_each(|_| learned.learn("m", 20));
        let weight = |learned: &Learned| learned.models["m"].answers.weights[slot(700)];
        let before = weight(&learned);
        longer.into_iter().for_each(|longer| learned.forget("m", longer));
        let (after, total) = (weight(&learned), learned.models["m"].answers.total);
        assert!(after >= before * 7 / 10, "three in four were learned: {before} to {after}");
        assert_eq!(total, learned.models["m"].answers.weights.iter().sum::<u32>());
        let old = learned.expect_longer("m", 20).unwrap();
        (0..MOST_MODELS).for_each(|n| learned.learn(&n.to_string(), 1));
        learned.learn("m", 20);
        let of_another = learned.models["m"].answers.total;
        learned.forget("m", old);
        assert_eq!(learned.models["m"].answers.total, of_another, "it was forgotten with its model");
    }

    #[test]
    fn names_of_any_length_take_bounded_memory() {
        let mut learned = Learned::default();
        for n in 0..100 {
            let name = format!("{}é{n}", "x".repeat(100_000));
            learned.learn(&name, 10);
        }
        assert!(learned.models.keys().all(|name| name.len() <= LONGEST_NAME));
        assert_eq!(learned.models.len(), 1);
        assert!(learned.expected(&"x".repeat(200), P90) < 20, "they share one memory");
    }

    #[test]
    fn many_answers_pay_for_each_other_and_one_alone_for_itself() {
        let mut learned = Learned::default();
        // Lengths of 1 to 1,000: a mean of 500, a deviation of 289.
        (0..400_u64).for_each(|n| learned.learn("m", 1 + n * 7_919 % 1_000));
        let alone = learned.expected("m", P90);
        assert!((860..=940).contains(&alone), "{alone}");
        let mut under_way = Vec::new();
        for (others, demand) in [(1, alone), (8, 788), (99, 587), (9_999, 509)] {
            while under_way.len() < others {
                under_way.extend(learned.began("m"));
            }
            let got = learned.expected("m", P90);
            assert!(got.abs_diff(demand) <= 30, "beside {others}: {got}");
        }
        assert!(learned.expected("m", 400_000) <= 420, "never more than the quantile");
        under_way.drain(11..).for_each(|since| learned.ended("m", since));
        let beside = learned.expected("m", P90);
        let longer: Vec<Longer> = (0..6).map_while(|_| learned.expect_longer("m", 900)).collect();
        let changing = learned.expected("m", P90);
        longer.into_iter().for_each(|longer| learned.forget("m", longer));
        assert!(
            beside < 790 && changing >= alone,
            "most are longer than they were thought to be: {changing}"
        );
        under_way.into_iter().for_each(|since| learned.ended("m", since));
        assert_eq!(learned.models["m"].under_way, 0);
        assert!(learned.began("unknown").is_none());
        learned.ended("m", 12_345);
        assert_eq!((learned.models["m"].under_way, learned.models["m"].outgrown), (0, 0));
    }

    #[test]
    fn the_longest_answers_overflow_nothing() {
        let mut learned = Learned::default();
        for n in 0..5_000_u64 {
            learned.learn("m", u64::MAX - n);
            learned.began("m");
        }
        assert!(learned.expected("m", P90) >= u64::from(u32::MAX) / 2);
    }

    #[test]
    fn any_number_of_names_takes_bounded_memory() {
        let mut learned = Learned::default();
        for n in 0..10_000 {
            learned.learn("kept", 10);
            learned.learn(&format!("made-up-{n}"), 10);
        }
        assert_eq!(learned.models.len(), MOST_MODELS);
        assert!(learned.expected("kept", P90) < 20);
    }
}
