//! How far estimates were off, learned from what answers reported, and how the next ones are corrected.
//!
//! Providers add to prompts what they do not publish: a constant, a proportion, or both. Which of these it is
//! shows after a few answers of the same kind. Medians throughout: no single answer moves a correction,
//! and one that lies consistently moves it within bounds.

/// What a request is like, as far as estimates differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum RequestKind {
    /// Text alone.
    #[default]
    Plain,
    /// With definitions of tools, or a schema for the answer.
    Tools,
    /// With images or documents.
    Images,
}

impl RequestKind {
    /// All kinds.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Tools, Self::Images];

    /// Its name in the store and in `count --explain`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Tools => "tools",
            Self::Images => "images",
        }
    }
}

/// So many answers are remembered: 256 bytes.
const REMEMBERED: usize = 32;
/// With fewer answers nothing is corrected.
const FEWEST: usize = 3;
/// Once so many answers have come as are remembered, a correction is worked out anew at each of these.
const REFIT: u64 = 4;
/// So many of the latest answers count twice: providers change what they add.
const LATEST: usize = 12;
/// A correction that is one step less simple has to fit so much better, in millionths.
const STEP: u64 = 20_000;
/// What was learned holds for sizes down to this part of the smallest and up to this many times the
/// largest that it was learned from.
const BEYOND: u32 = 4;
/// No estimate is made smaller than a quarter, or larger than four times plus this.
const MOST: u64 = 4;
const MOST_MORE: u64 = 2_048;

/// What an estimate and an answer said of one prompt, in tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CalibrationSample {
    /// The estimate, uncorrected.
    pub estimated: u32,
    /// What the answer reported.
    pub reported: u32,
}

/// How estimates are corrected: times a factor, plus an offset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Correction {
    per_mille: i64,
    offset: i64,
    /// The sizes that it holds for.
    smallest: u32,
    largest: u32,
}

impl Default for Correction {
    fn default() -> Self {
        Self { per_mille: 1_000, offset: 0, smallest: 0, largest: u32::MAX }
    }
}

impl Correction {
    /// An estimate as corrected: within a quarter and four times of itself and 2,048. Beyond the sizes that
    /// it holds for, what it adds stays as it is at the nearest of them; below them what it takes away
    /// shrinks in proportion.
    pub fn apply(self, estimated: u64) -> u64 {
        let (smallest, largest) = (u64::from(self.smallest), u64::from(self.largest));
        let nearest = i128::from(estimated.clamp(smallest, largest));
        let mut more = nearest * i128::from(self.per_mille - 1_000) / 1_000 + i128::from(self.offset);
        if more < 0 && estimated < smallest {
            more = more * i128::from(estimated) / nearest.max(1);
        }
        let corrected = u64::try_from((i128::from(estimated) + more).max(0)).unwrap_or(u64::MAX);
        corrected.clamp(estimated / MOST, estimated.saturating_mul(MOST).saturating_add(MOST_MORE))
    }

    /// It holds for this size too, and what is near it.
    fn reach(&mut self, estimated: u32) {
        self.smallest = self.smallest.min(estimated / BEYOND);
        self.largest = self.largest.max(estimated.saturating_mul(BEYOND));
    }
}

/// What was learned of one upstream, model and kind of request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Calibration {
    /// The last answers; the oldest is overwritten.
    pairs: Vec<CalibrationSample>,
    next: usize,
    answers: u64,
    correction: Correction,
}

impl Calibration {
    /// As it was kept, oldest first.
    pub fn from_pairs(pairs: &[CalibrationSample]) -> Self {
        let mut calibration = Self::default();
        pairs.iter().for_each(|pair| calibration.remember(*pair));
        calibration.correction = fit(&calibration.pairs().collect::<Vec<_>>());
        calibration
    }

    /// The answers that are remembered, oldest first.
    pub fn pairs(&self) -> impl Iterator<Item = CalibrationSample> {
        let (later, earlier) = self.pairs.split_at(self.next.min(self.pairs.len()));
        earlier.iter().chain(later).copied()
    }

    /// How the next estimate is to be corrected.
    pub fn correction(&self) -> Correction {
        self.correction
    }

    /// Learns from an answer. Takes about 10 microseconds at times, and next to nothing otherwise.
    pub fn learn(&mut self, estimated: u64, reported: u64) {
        let (Ok(estimated), Ok(reported)) = (u32::try_from(estimated), u32::try_from(reported)) else {
            return;
        };
        if estimated == 0 || reported == 0 {
            return;
        }
        let was_right = self.correction.apply(u64::from(estimated)) == u64::from(reported);
        self.remember(CalibrationSample { estimated, reported });
        if was_right && self.pairs.len() >= FEWEST {
            self.correction.reach(estimated);
        } else if self.answers <= REMEMBERED as u64 || self.answers.is_multiple_of(REFIT) {
            self.correction = fit(&self.pairs().collect::<Vec<_>>());
        }
    }

    fn remember(&mut self, pair: CalibrationSample) {
        self.answers += 1;
        if self.pairs.len() < REMEMBERED {
            self.pairs.push(pair);
        } else {
            self.pairs[self.next] = pair;
            self.next = (self.next + 1) % REMEMBERED;
        }
    }
}

/// The simplest correction that fits best, to answers from the oldest to the latest.
fn fit(pairs: &[CalibrationSample]) -> Correction {
    if pairs.len() < FEWEST {
        return Correction::default();
    }
    let latest = &pairs[pairs.len().saturating_sub(LATEST)..];
    let ratio = median(pairs.iter().map(|p| per_mille(i64::from(p.reported), i64::from(p.estimated))));
    let candidates = [
        Correction::default(),
        with_offset(1_000, pairs),
        Correction { per_mille: ratio.clamp(250, 4_000), ..Correction::default() },
        with_offset(slope(pairs), pairs),
    ];
    // The simplest, but for what fits better by more than chance.
    let cost = |step: usize, c: &Correction| {
        // No prompt has less than nothing around it: what takes a constant away has to fit much better.
        let taken = if c.offset < -16 { 3 * STEP } else { 0 };
        u64::midpoint(misfit(*c, pairs), misfit(*c, latest)) + taken + step as u64 * STEP
    };
    let best = candidates.into_iter().enumerate().min_by_key(|(step, c)| cost(*step, c));
    let mut best = best.map(|(_, correction)| correction).unwrap_or_default();
    (best.smallest, best.largest) = (u32::MAX, 0);
    pairs.iter().for_each(|pair| best.reach(pair.estimated));
    best
}

fn with_offset(per_mille: i64, pairs: &[CalibrationSample]) -> Correction {
    let left = |p: &CalibrationSample| i64::from(p.reported) - i64::from(p.estimated) * per_mille / 1_000;
    Correction { per_mille, offset: median(pairs.iter().map(left)), ..Correction::default() }
}

/// The median slope between any two answers (Theil and Sen), as far as they tell one.
fn slope(pairs: &[CalibrationSample]) -> i64 {
    let between = pairs.iter().enumerate().flat_map(|(at, a)| pairs[at + 1..].iter().map(move |b| (a, b)));
    let slopes = between.filter_map(|(a, b)| {
        let run = i64::from(b.estimated) - i64::from(a.estimated);
        // Two prompts of nearly the same size tell more of chance than of a proportion.
        let tells = run.unsigned_abs() * 8 > u64::from(a.estimated.max(b.estimated));
        tells.then(|| per_mille(i64::from(b.reported) - i64::from(a.reported), run))
    });
    let mut slopes: Vec<i64> = slopes.collect();
    if slopes.is_empty() { 1_000 } else { middle(&mut slopes).clamp(600, 2_000) }
}

/// How far off a correction leaves estimates: the median, the upper quartile and half the ninth tenth of
/// relative errors, in millionths.
fn misfit(correction: Correction, pairs: &[CalibrationSample]) -> u64 {
    let error = |p: &CalibrationSample| {
        let reported = u64::from(p.reported);
        correction.apply(u64::from(p.estimated)).abs_diff(reported).saturating_mul(1_000_000)
            / reported.max(1)
    };
    let mut errors: Vec<u64> = pairs.iter().map(error).collect();
    errors.sort_unstable();
    errors[errors.len() / 2] + errors[errors.len() * 3 / 4] + errors[errors.len() * 9 / 10] / 2
}

fn per_mille(part: i64, whole: i64) -> i64 {
    if whole == 0 { 1_000 } else { part.saturating_mul(1_000) / whole }
}

fn median(values: impl Iterator<Item = i64>) -> i64 {
    middle(&mut values.collect::<Vec<_>>())
}

fn middle(values: &mut [i64]) -> i64 {
    let middle = values.len() / 2;
    if values.is_empty() { 0 } else { *values.select_nth_unstable(middle).1 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn learned(pairs: impl IntoIterator<Item = (u64, u64)>) -> Calibration {
        let mut calibration = Calibration::default();
        pairs.into_iter().for_each(|(estimated, reported)| calibration.learn(estimated, reported));
        calibration
    }

    #[test]
    fn a_constant_a_proportion_or_both_are_found_within_a_few_answers() {
        type Law = fn(u64) -> u64;
        let sizes = [40u64, 900, 120, 3_000, 75, 410, 1_800, 60];
        let laws: [Law; 4] = [|n| n, |n| n + 82, |n| n * 13 / 10, |n| n * 5 / 4 + 300];
        for law in laws {
            let calibration = learned(sizes.map(|n| (n, law(n))));
            for n in [50, 200, 5_000] {
                let corrected = calibration.correction().apply(n);
                assert!(corrected.abs_diff(law(n)) * 50 <= law(n), "{n}: {corrected} for {}", law(n));
            }
        }
    }

    #[test]
    fn nothing_is_corrected_before_three_answers() {
        assert_eq!(learned([(100, 200), (100, 200)]).correction(), Correction::default());
        assert_eq!(learned([(100, 200); 3]).correction().apply(100), 200);
    }

    #[test]
    fn a_third_of_wild_answers_does_not_move_it() {
        let wild = (0..32u64).map(|n| (100 + n * 10, if n % 3 == 0 { 1 << 30 } else { 110 + n * 11 }));
        let corrected = learned(wild).correction().apply(200);
        assert!(corrected.abs_diff(220) <= 4, "{corrected}");
    }

    #[test]
    fn a_lie_moves_it_within_bounds() {
        assert_eq!(learned([(1_000, 1); 32]).correction().apply(1_000), 250);
        assert_eq!(learned([(1_000, 100_000); 32]).correction().apply(1_000), 6_048);
        assert_eq!(learned([(0, 7), (7, 0), (u64::MAX, 7)]), Calibration::default());
    }

    #[test]
    fn what_was_right_holds_for_larger_sizes_once_they_came() {
        let calibration = learned([50, 900, 120, 3_000].map(|n| (n, n * 5 / 4 + 300)));
        assert_eq!(calibration.correction().apply(10_000), 12_800);
    }

    #[test]
    fn what_changes_is_followed() {
        let mut calibration = learned([(100, 100); 200]);
        (0..40).for_each(|_| calibration.learn(100, 160));
        assert_eq!(calibration.correction().apply(100), 160);
    }

    #[test]
    fn what_is_kept_is_what_was_learned() {
        for answers in [0, 1, 5, 32, 33, 100] {
            let calibration = learned((0..answers).map(|n| (100 + n * 7, 120 + n * 9)));
            let kept: Vec<CalibrationSample> = calibration.pairs().collect();
            assert_eq!(kept.len() as u64, answers.min(32));
            let again = Calibration::from_pairs(&kept);
            assert_eq!(again.pairs().collect::<Vec<_>>(), kept);
            let [a, b] = [&calibration, &again].map(|c| c.correction().apply(500));
            assert!(a.abs_diff(b) <= 5, "{answers}: {a} {b}");
        }
    }

    proptest! {
        #[test]
        fn no_answers_break_it(pairs in prop::collection::vec((any::<u64>(), any::<u64>()), 0..80), estimated in any::<u64>()) {
            let corrected = learned(pairs).correction().apply(estimated);
            prop_assert!(corrected >= estimated / 4);
            prop_assert!(corrected <= estimated.saturating_mul(4).saturating_add(2_048));
        }
    }
}
