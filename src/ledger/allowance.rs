//! The learned lengths of answers: how many completion tokens the recent answers of each model used, in bounded memory.
//!
//! Recent answers weigh more, so that the allowance follows a change of traffic within a few hundred answers. All arithmetic is
//! on integers: the same answers in the same order give the same allowance.

use crate::estimate::{KnownModels, ModelRank};
use foldhash::HashMap;
use serde::{Deserialize, Serialize};

/// Completion tokens assumed for each answer of a model that has not answered yet.
const PRIOR: u64 = 512;
/// The prior weighs as much as this many answers.
const PRIOR_WEIGHT: u32 = 2;
/// Maximum models with a histogram. A further model replaces the least known one that learned least recently.
const MAX_MODELS: usize = 512;
/// Only this many bytes of a model's name are compared.
const MAX_NAME_BYTES: usize = 128;
/// The weight of a new answer.
const ANSWER_WEIGHT: u32 = 64;
/// All weights are halved when their sum reaches the weight of this many new answers.
const MAX_WEIGHT_IN_ANSWERS: u32 = 512;
/// With several requests in flight, the allowance is the mean length plus three standard errors. This is the square
/// of three. Two standard errors were also measured, on traces at 30 and 3 tokens a second. They cause no overshoot
/// either and admit 0.3 % more requests, but slightly fewer when requests are rare.
const ERRORS_SQUARED: u128 = 9;
/// Lengths below this have a slot each. Above, each power of two has `SLOTS_PER_POWER` slots.
const EXACT_LENGTHS: u64 = 16;
const SLOTS_PER_POWER: usize = 8;
const SLOTS: usize = 16 + (32 - 4) * SLOTS_PER_POWER;

/// The learned lengths of the answers of each model in one environment.
#[derive(Clone, Debug, Default)]
pub(crate) struct LearnedLengths {
    models: HashMap<Box<str>, ModelLengths>,
    pub(super) known_models: KnownModels,
    /// Number of answers learned so far. It orders the models by their last answer.
    learned: u64,
}

#[derive(Clone, Debug)]
struct ModelLengths {
    histogram: Histogram,
    rank: ModelRank,
    /// The value of `learned` after the last answer of this model.
    last_learned: u64,
    /// Distinguishes these lengths from earlier lengths of the same model, which were removed to make room.
    generation: u64,
    /// Requests that have not ended.
    in_flight: u64,
    /// How many of the requests in flight have outgrown their reservation.
    outgrown: u64,
}

/// The learned lengths of one model on their way to a new process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LeftLengths {
    model: String,
    /// Slots of the histogram with their weights.
    weights: Vec<(usize, u32)>,
}

/// An answer that was counted before its end.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PartialLength {
    tokens: u64,
    /// The model's generation, and how often its weights had been halved, when the answer was counted.
    generation: u64,
    halvings: u32,
}

impl LearnedLengths {
    /// Completion tokens to reserve for the next answer.
    ///
    /// For a single request in flight, this is the given quantile (parts per million) of the lengths. With several
    /// requests in flight, short answers make up for long ones, and the allowance is smaller: the mean length plus
    /// three standard errors.
    pub(crate) fn allowance(&self, model: &str, quantile_ppm: u32) -> u64 {
        let Some(known) = self.models.get(model_key(model)) else { return PRIOR };
        let alone = known.histogram.quantile(quantile_ppm);
        // If most requests in flight have outgrown their reservation, answers are becoming longer and no longer make up for
        // each other.
        let is_changing = known.outgrown * 2 > known.in_flight;
        if known.in_flight == 0 || is_changing {
            alone
        } else {
            alone.min(known.histogram.allowance_with_others(known.in_flight))
        }
    }

    /// Counts a request as in flight. Returns the generation to pass to `end`; `None`: the model is unknown and nothing was
    /// counted.
    pub(crate) fn begin(&mut self, model: &str) -> Option<u64> {
        let known = self.models.get_mut(model_key(model))?;
        known.in_flight += 1;
        Some(known.generation)
    }

    /// Counts a request as no longer in flight.
    pub(crate) fn end(&mut self, model: &str, generation: u64) {
        if let Some(known) =
            self.models.get_mut(model_key(model)).filter(|known| known.generation == generation)
        {
            known.in_flight = known.in_flight.saturating_sub(1);
        }
    }

    /// Whether no model has a request in flight.
    #[cfg(test)]
    pub(super) fn is_idle(&self) -> bool {
        self.models.values().all(|known| (known.in_flight, known.outgrown) == (0, 0))
    }

    /// Learns the length of a complete answer.
    pub(crate) fn learn(&mut self, model: &str, completion_tokens: u64) {
        self.learned += 1;
        let (model, learned) = (model_key(model), self.learned);
        if let Some(known) = self.models.get_mut(model) {
            known.last_learned = learned;
            known.histogram.add(completion_tokens);
            return;
        }
        let rank = self.known_models.rank(model);
        if !self.make_room(rank) {
            return;
        }
        let mut histogram = Histogram::new();
        histogram.add(completion_tokens);
        let new = ModelLengths {
            histogram,
            rank,
            last_learned: learned,
            generation: learned,
            in_flight: 0,
            outgrown: 0,
        };
        self.models.insert(model.into(), new);
    }

    /// Adds the current length of an unfinished answer that has outgrown its reservation. `forget_partial` removes
    /// it. Long answers are thus learned before they end. Otherwise the short answers, which end earlier, would
    /// dominate the histogram.
    pub(crate) fn learn_partial(&mut self, model: &str, completion_tokens: u64) -> Option<PartialLength> {
        let known = self.models.get_mut(model_key(model))?;
        known.histogram.add(completion_tokens);
        known.outgrown += 1;
        let halvings = known.histogram.halvings;
        Some(PartialLength { tokens: completion_tokens, generation: known.generation, halvings })
    }

    /// Reverts `learn_partial`. Removes only the part of the answer's weight that later halvings have left.
    pub(crate) fn forget_partial(&mut self, model: &str, partial: PartialLength) {
        let known = self.models.get_mut(model_key(model));
        if let Some(known) = known.filter(|known| known.generation == partial.generation) {
            known.histogram.remove(partial.tokens, partial.halvings);
            known.outgrown = known.outgrown.saturating_sub(1);
        }
    }

    /// The lengths for a new process, in the order of the last answers.
    pub(super) fn leave(&self) -> Vec<LeftLengths> {
        let mut models: Vec<_> = self.models.iter().collect();
        models.sort_by_key(|(_, known)| known.last_learned);
        let left = models.into_iter().map(|(model, known)| {
            let weights = known.histogram.weights.iter().copied().enumerate();
            let weights = weights.filter(|(_, weight)| *weight > 0).collect();
            LeftLengths { model: model.to_string(), weights }
        });
        left.collect()
    }

    /// Continues with the lengths of an old process.
    pub(super) fn take_over(&mut self, left: &[LeftLengths]) {
        for LeftLengths { model, weights } in left {
            // Makes room as for an answer.
            self.learn(model, PRIOR);
            if let Some(known) = self.models.get_mut(model_key(model)) {
                known.histogram = Histogram::of(weights);
            }
        }
    }

    /// Makes room for a model of this rank, if necessary in place of one whose rank is not higher. Returns whether there
    /// is room.
    fn make_room(&mut self, rank: ModelRank) -> bool {
        if self.models.len() < MAX_MODELS {
            return true;
        }
        let least = self.models.iter().min_by_key(|(_, known)| (known.rank, known.last_learned));
        let Some(replaced) = least.filter(|(_, known)| known.rank <= rank).map(|(name, _)| name.clone())
        else {
            return false;
        };
        self.models.remove(&replaced);
        true
    }
}

/// Returns the part of a model's name that is stored. Callers can send names of any length.
fn model_key(model: &str) -> &str {
    &model[..model.floor_char_boundary(MAX_NAME_BYTES)]
}

/// A histogram of answer lengths with decaying weights.
#[derive(Clone, Debug)]
struct Histogram {
    weights: Box<[u32; SLOTS]>,
    total: u32,
    /// How often all weights were halved.
    halvings: u32,
    /// The weighted sums of all lengths and of their squares. A length counts as the middle of its slot.
    sum: u128,
    squares: u128,
}

impl Histogram {
    fn new() -> Self {
        let mut histogram = Self { weights: Box::new([0; SLOTS]), total: 0, halvings: 0, sum: 0, squares: 0 };
        histogram.add_weight(PRIOR, PRIOR_WEIGHT * ANSWER_WEIGHT);
        histogram
    }

    fn of(weights: &[(usize, u32)]) -> Self {
        let mut histogram = Self { weights: Box::new([0; SLOTS]), total: 0, halvings: 0, sum: 0, squares: 0 };
        for &(slot, weight) in weights.iter().filter(|(slot, _)| *slot < SLOTS) {
            // The sum stays within what answers can reach.
            let weight = weight.min((MAX_WEIGHT_IN_ANSWERS * ANSWER_WEIGHT).saturating_sub(histogram.total));
            histogram.weights[slot] += weight;
            histogram.update_sums(slot, weight, true);
        }
        histogram
    }

    fn add(&mut self, tokens: u64) {
        if self.total >= MAX_WEIGHT_IN_ANSWERS * ANSWER_WEIGHT {
            self.weights.iter_mut().for_each(|weight| *weight /= 2);
            self.halvings += 1;
            (self.total, self.sum, self.squares) = (0, 0, 0);
            for slot in 0..SLOTS {
                self.update_sums(slot, self.weights[slot], true);
            }
        }
        self.add_weight(tokens, ANSWER_WEIGHT);
    }

    fn add_weight(&mut self, tokens: u64, weight: u32) {
        let slot = slot_of(tokens);
        self.weights[slot] += weight;
        self.update_sums(slot, weight, true);
    }

    /// Adds a weight in a slot to the sums, or subtracts it.
    fn update_sums(&mut self, slot: usize, weight: u32, adds: bool) {
        let (first, width) = span_of(slot);
        let (tokens, wide_weight) = (u128::from(first + width / 2), u128::from(weight));
        if adds {
            self.total += weight;
            self.sum += wide_weight * tokens;
            self.squares += wide_weight * tokens * tokens;
        } else {
            self.total -= weight;
            self.sum -= wide_weight * tokens;
            self.squares -= wide_weight * tokens * tokens;
        }
    }

    /// The allowance with this many other requests in flight: the mean plus three standard errors.
    fn allowance_with_others(&self, others: u64) -> u64 {
        if self.total == 0 {
            return PRIOR;
        }
        let total = u128::from(self.total);
        // The variance times the square of `total`. Weights below 2^17 of lengths up to 2^32 fit in 128 bits.
        let spread = (total * self.squares).saturating_sub(self.sum * self.sum);
        let squared = spread / (total * total) * ERRORS_SQUARED / (u128::from(others) + 1);
        u64::try_from(self.sum / total + squared.isqrt() + 1).unwrap_or(u64::MAX)
    }

    /// Removes the rest of a weight from the slot of this length. `halvings`: how often all weights had been halved
    /// when the weight was added.
    fn remove(&mut self, tokens: u64, halvings: u32) {
        let left = ANSWER_WEIGHT.checked_shr(self.halvings.saturating_sub(halvings)).unwrap_or(0);
        let slot = slot_of(tokens);
        let removed = left.min(self.weights[slot]);
        self.weights[slot] -= removed;
        self.update_sums(slot, removed, false);
    }

    /// Returns a quantile of the lengths. `ppm`: its level in parts per million. Assumes that the lengths within a
    /// slot are spread evenly.
    fn quantile(&self, ppm: u32) -> u64 {
        let wanted = u64::from(self.total) * u64::from(ppm.min(1_000_000)) / 1_000_000;
        let mut below = 0;
        for (slot, &weight) in self.weights.iter().enumerate() {
            let weight = u64::from(weight);
            if weight > 0 && below + weight >= wanted {
                let (first, width) = span_of(slot);
                return first + (width - 1) * wanted.saturating_sub(below) / weight;
            }
            below += weight;
        }
        PRIOR
    }
}

/// The slot of a length.
fn slot_of(tokens: u64) -> usize {
    let tokens = tokens.min(u64::from(u32::MAX));
    if tokens < EXACT_LENGTHS {
        return usize::try_from(tokens).unwrap_or(0);
    }
    let power = tokens.ilog2();
    let step = usize::try_from(tokens >> (power - 3)).unwrap_or(0) % SLOTS_PER_POWER;
    16 + (power as usize - 4) * SLOTS_PER_POWER + step
}

/// The smallest length of a slot, and the number of lengths in it.
fn span_of(slot: usize) -> (u64, u64) {
    let Some(above) = slot.checked_sub(16) else { return (slot as u64, 1) };
    let (power, step) = (above / SLOTS_PER_POWER + 4, (above % SLOTS_PER_POWER) as u64);
    ((8 + step) << (power - 3), 1 << (power - 3))
}

#[cfg(test)]
mod tests {
    use super::*;

    const P90: u32 = 900_000;

    #[test]
    fn each_length_is_within_the_span_of_its_slot() {
        let lengths = (0..5_000).chain([1 << 20, (1 << 31) - 1, 1 << 31, u64::from(u32::MAX), u64::MAX]);
        for tokens in lengths {
            let (first, width) = span_of(slot_of(tokens));
            let tokens = tokens.min(u64::from(u32::MAX));
            assert!((first..first + width).contains(&tokens), "{tokens} {first} {width}");
            assert!(width == 1 || width * 8 <= tokens, "{tokens}: {width}");
        }
    }

    #[test]
    fn a_model_starts_from_the_prior_and_is_learned_within_twenty_answers() {
        let mut learned = LearnedLengths::default();
        assert_eq!(learned.allowance("m", P90), PRIOR);
        for _ in 0..20 {
            learned.learn("m", 100);
        }
        assert!((90..=112).contains(&learned.allowance("m", P90)), "{}", learned.allowance("m", P90));
        assert_eq!(learned.allowance("another", P90), PRIOR);
    }

    #[test]
    fn the_quantile_is_accurate_and_follows_a_change_of_lengths() {
        let mut learned = LearnedLengths::default();
        for n in 0..2_000u64 {
            learned.learn("m", 1 + n * 7_919 % 1_000);
        }
        for (ppm, expected) in [(500_000, 500), (900_000, 900), (990_000, 990)] {
            let got = learned.allowance("m", ppm);
            assert!(got.abs_diff(expected) <= 40, "{ppm}: {got}");
        }
        for _ in 0..1_000 {
            learned.learn("m", 20);
        }
        assert!(learned.allowance("m", P90) <= 22, "{}", learned.allowance("m", P90));
    }

    #[test]
    fn a_new_process_continues_with_the_lengths_of_the_old_one() {
        let mut old = LearnedLengths::default();
        for n in 0..3_000u64 {
            old.learn("long", 1 + n * 7_919 % 1_000);
            old.learn("short", 20);
        }
        let left: Vec<LeftLengths> =
            serde_json::from_str(&serde_json::to_string(&old.leave()).unwrap()).unwrap();
        let mut new = LearnedLengths::default();
        new.take_over(&left);
        assert_eq!(new.leave(), old.leave());
        for model in ["long", "short", "other"] {
            assert_eq!(new.allowance(model, P90), old.allowance(model, P90));
            assert_eq!(new.begin(model).is_some(), old.begin(model).is_some());
            assert_eq!(new.allowance(model, P90), old.allowance(model, P90));
        }
        // Numbers that cannot be true are bounded.
        let false_weights =
            LeftLengths { model: "m".into(), weights: vec![(SLOTS, 1), (3, u32::MAX), (4, u32::MAX)] };
        new.take_over(&[false_weights]);
        new.learn("m", 100);
        assert!(new.allowance("m", P90) <= 3);
    }

    #[test]
    fn unfinished_answers_that_outgrew_their_reservation_raise_the_allowance() {
        let mut learned = LearnedLengths::default();
        (0..100).for_each(|_| learned.learn("m", 20));
        let partial: Vec<PartialLength> = (0..30).map_while(|_| learned.learn_partial("m", 700)).collect();
        assert!(learned.allowance("m", P90) > 600);
        partial.into_iter().for_each(|partial| learned.forget_partial("m", partial));
        assert!(learned.allowance("m", P90) < 25);
        assert!(learned.learn_partial("unknown", 1).is_none());
        assert_eq!(learned.allowance("unknown", P90), PRIOR);
    }

    #[test]
    fn forgetting_a_partial_length_removes_only_its_decayed_weight() {
        let mut learned = LearnedLengths::default();
        (0..300).for_each(|_| learned.learn("m", 700));
        let partial: Vec<PartialLength> = (0..100).map_while(|_| learned.learn_partial("m", 700)).collect();
        (0..1_200).for_each(|_| learned.learn("m", 20));
        let weight = |learned: &LearnedLengths| learned.models["m"].histogram.weights[slot_of(700)];
        let before = weight(&learned);
        partial.into_iter().for_each(|partial| learned.forget_partial("m", partial));
        let (after, total) = (weight(&learned), learned.models["m"].histogram.total);
        assert!(after >= before * 7 / 10, "about three in four weights remain: {before} to {after}");
        assert_eq!(total, learned.models["m"].histogram.weights.iter().sum::<u32>());
        let old = learned.learn_partial("m", 20).unwrap();
        (0..MAX_MODELS).for_each(|n| learned.learn(&n.to_string(), 1));
        learned.learn("m", 20);
        let of_another = learned.models["m"].histogram.total;
        learned.forget_partial("m", old);
        assert_eq!(learned.models["m"].histogram.total, of_another, "its model was replaced");
    }

    #[test]
    fn invented_names_do_not_push_out_known_ones() {
        let mut learned = LearnedLengths::default();
        (0..20).for_each(|_| learned.learn("gpt-4o", 100));
        (0..MAX_MODELS * 2).for_each(|n| learned.learn(&format!("invented-{n}"), 1));
        assert!(learned.allowance("gpt-4o", P90) < PRIOR / 2);
        (0..MAX_MODELS).for_each(|n| learned.learn(&format!("gpt-4o-{n}"), 1));
        assert!(learned.allowance("gpt-4o", P90) < PRIOR / 2);
        learned.learn("one-more", 1);
        assert_eq!(
            learned.allowance("one-more", P90),
            PRIOR,
            "no known model makes room for an invented one"
        );
        assert_eq!(learned.models.len(), MAX_MODELS);
    }

    #[test]
    fn long_model_names_take_bounded_memory() {
        let mut learned = LearnedLengths::default();
        for n in 0..100 {
            let name = format!("{}é{n}", "x".repeat(100_000));
            learned.learn(&name, 10);
        }
        assert!(learned.models.keys().all(|name| name.len() <= MAX_NAME_BYTES));
        assert_eq!(learned.models.len(), 1);
        assert!(
            learned.allowance(&"x".repeat(200), P90) < 20,
            "names with the same first 128 bytes share a histogram"
        );
    }

    #[test]
    fn the_allowance_is_the_quantile_for_a_single_request_and_smaller_with_others_in_flight() {
        let mut learned = LearnedLengths::default();
        // Lengths of 1 to 1,000: a mean of 500, a deviation of 289.
        (0..400_u64).for_each(|n| learned.learn("m", 1 + n * 7_919 % 1_000));
        let alone = learned.allowance("m", P90);
        assert!((860..=940).contains(&alone), "{alone}");
        let mut in_flight = Vec::new();
        for (others, expected) in [(1, alone), (8, 788), (99, 587), (9_999, 509)] {
            while in_flight.len() < others {
                in_flight.extend(learned.begin("m"));
            }
            let got = learned.allowance("m", P90);
            assert!(got.abs_diff(expected) <= 30, "with {others} others: {got}");
        }
        assert!(learned.allowance("m", 400_000) <= 420, "never more than the quantile");
        in_flight.drain(11..).for_each(|generation| learned.end("m", generation));
        let with_others = learned.allowance("m", P90);
        let partial: Vec<PartialLength> = (0..6).map_while(|_| learned.learn_partial("m", 900)).collect();
        let changing = learned.allowance("m", P90);
        partial.into_iter().for_each(|partial| learned.forget_partial("m", partial));
        assert!(
            with_others < 790 && changing >= alone,
            "most requests in flight have outgrown their reservation: {changing}"
        );
        in_flight.into_iter().for_each(|generation| learned.end("m", generation));
        assert_eq!(learned.models["m"].in_flight, 0);
        assert!(learned.begin("unknown").is_none());
        learned.end("m", 12_345);
        assert_eq!((learned.models["m"].in_flight, learned.models["m"].outgrown), (0, 0));
    }

    #[test]
    fn the_longest_answers_cause_no_overflow() {
        let mut learned = LearnedLengths::default();
        for n in 0..5_000_u64 {
            learned.learn("m", u64::MAX - n);
            learned.begin("m");
        }
        assert!(learned.allowance("m", P90) >= u64::from(u32::MAX) / 2);
    }

    #[test]
    fn any_number_of_models_takes_bounded_memory() {
        let mut learned = LearnedLengths::default();
        for n in 0..10_000 {
            learned.learn("in-use", 10);
            learned.learn(&format!("unused-{n}"), 10);
        }
        assert_eq!(learned.models.len(), MAX_MODELS);
        assert!(learned.allowance("in-use", P90) < 20);
    }
}
