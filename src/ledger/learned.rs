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
    /// The completion tokens that so many of a million answers stay within.
    pub(crate) fn expected(&self, model: &str, quantile_ppm: u32) -> u64 {
        self.models.get(name(model)).map_or(PRIOR, |known| known.answers.quantile(quantile_ppm))
    }

    /// An answer that has come to its end.
    pub(crate) fn learn(&mut self, model: &str, completion_tokens: u64) {
        self.learned += 1;
        let model = name(model);
        if !self.models.contains_key(model) {
            self.make_room();
            let new = Model { answers: Answers::new(), seen: 0, since: self.learned };
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
        let fadings = known.answers.fadings;
        Some(Longer { tokens: completion_tokens, since: known.since, fadings })
    }

    /// Takes back what `expect_longer` has counted, as far as it has not faded.
    pub(crate) fn forget(&mut self, model: &str, longer: Longer) {
        if let Some(known) = self.models.get_mut(name(model)).filter(|known| known.since == longer.since) {
            known.answers.take(longer.tokens, longer.fadings);
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
}

impl Answers {
    fn new() -> Self {
        let mut answers = Self { weights: Box::new([0; SLOTS]), total: 0, fadings: 0 };
        answers.put(PRIOR, PRIOR_WEIGHT * WEIGHT);
        answers
    }

    fn add(&mut self, tokens: u64) {
        if self.total >= MEMORY * WEIGHT {
            self.weights.iter_mut().for_each(|weight| *weight /= 2);
            self.total = self.weights.iter().sum();
            self.fadings += 1;
        }
        self.put(tokens, WEIGHT);
    }

    fn put(&mut self, tokens: u64, weight: u32) {
        self.weights[slot(tokens)] += weight;
        self.total += weight;
    }

    /// Takes back what was added when it had faded so often.
    fn take(&mut self, tokens: u64, fadings: u32) {
        let left = WEIGHT.checked_shr(self.fadings.saturating_sub(fadings)).unwrap_or(0);
        let weight = &mut self.weights[slot(tokens)];
        let taken = left.min(*weight);
        *weight -= taken;
        self.total -= taken;
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
        for (ppm, want) in [(500_000, 500), (900_000, 900), (990_000, 990)] {
            let got = learned.expected("m", ppm);
            assert!(got.abs_diff(want) <= 40, "{ppm}: {got}");
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
