//! Learns the error of estimates from reported usage, and corrects the next estimates.
//!
//! Providers add unpublished tokens to prompts: a constant, a proportion, or both. A few answers to requests of the
//! same kind suffice to tell these cases apart. All statistics are medians: one answer cannot move a correction,
//! and an upstream that always reports false usage moves it only within bounds.

/// The kind of a request. Each kind has its own correction.
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
    /// All kinds, in display order.
    pub const ALL: [Self; 3] = [Self::Plain, Self::Tools, Self::Images];

    /// The name in the store and in `tollgate count --explain`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Tools => "tools",
            Self::Images => "images",
        }
    }
}

/// Number of samples that are stored per calibration: 256 bytes.
const MAX_SAMPLES: usize = 32;
/// Number of samples below which nothing is corrected.
const MIN_SAMPLES: usize = 3;
/// After the first `MAX_SAMPLES` answers, the correction is fitted again only once per this many answers. A median of the
/// stored samples hardly moves with fewer new ones.
const REFIT_INTERVAL: u64 = 16;
/// Number of the latest samples that count twice, because providers change what they add.
const DOUBLE_WEIGHT_SAMPLES: usize = 12;
/// Added to the error of a correction for each step of complexity, in millionths. So a more complex correction wins
/// only if its error is lower by more than this.
const COMPLEXITY_PENALTY: u64 = 20_000;
/// A correction holds for estimates from the smallest sample divided by this factor to the largest sample
/// times this factor.
const RANGE_FACTOR: u32 = 4;
/// A correction divides or multiplies an estimate by at most this factor.
const MAX_FACTOR: u64 = 4;
/// Tokens that a correction may add beyond `MAX_FACTOR`.
const MAX_EXTRA_TOKENS: u64 = 2_048;

/// The estimated and the reported tokens of one prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CalibrationSample {
    /// The estimate before any correction.
    pub estimated: u32,
    /// The reported prompt tokens.
    pub reported: u32,
}

/// Corrects estimates by a factor and an offset in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Correction {
    per_mille: i64,
    offset: i64,
    /// Smallest estimate for which the correction holds.
    smallest: u32,
    /// Largest estimate for which the correction holds.
    largest: u32,
}

/// Changes no estimate.
impl Default for Correction {
    fn default() -> Self {
        Self { per_mille: 1_000, offset: 0, smallest: 0, largest: u32::MAX }
    }
}

impl Correction {
    /// Corrects an estimate. The result is at least a quarter of it, and at most four times it plus 2,048.
    ///
    /// For an estimate outside the range of the correction, the difference is that of the nearest estimate in
    /// the range. Below the range, a negative difference shrinks in proportion to the estimate.
    pub fn apply(self, estimated: u64) -> u64 {
        let smallest = u64::from(self.smallest);
        let nearest = u32::try_from(estimated).unwrap_or(u32::MAX).max(self.smallest).min(self.largest);
        let mut more = i64::from(nearest) * (self.per_mille - 1_000) / 1_000 + self.offset;
        if more < 0 && estimated < smallest {
            // Rare, because it takes a division of 128 bits.
            let shrunk = i128::from(more) * i128::from(estimated) / i128::from(nearest.max(1));
            more = i64::try_from(shrunk).unwrap_or(more);
        }
        bounded(estimated.saturating_add_signed(more), estimated)
    }

    /// Whether the correction changes no estimate.
    pub fn is_default(self) -> bool {
        (self.per_mille, self.offset) == (1_000, 0)
    }

    /// Extends the range so that it contains this estimate and those near it.
    fn extend_range(&mut self, estimated: u32) {
        self.smallest = self.smallest.min(estimated / RANGE_FACTOR);
        self.largest = self.largest.max(estimated.saturating_mul(RANGE_FACTOR));
    }
}

/// The nearest number to `corrected` that is at least a quarter of the estimate before any correction, and at most four
/// times it plus 2,048.
pub(crate) fn bounded(corrected: u64, estimated: u64) -> u64 {
    let most = estimated.saturating_mul(MAX_FACTOR).saturating_add(MAX_EXTRA_TOKENS);
    corrected.clamp(estimated / MAX_FACTOR, most)
}

/// The samples and the correction of one upstream, model and kind of request.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Calibration {
    /// Ring buffer of the latest samples.
    samples: Vec<CalibrationSample>,
    /// Index of the oldest sample once the buffer is full.
    next: usize,
    /// Number of answers so far.
    answers: u64,
    correction: Correction,
}

impl Calibration {
    /// Restores a calibration from its samples, oldest first.
    pub fn from_samples(samples: &[CalibrationSample]) -> Self {
        let mut calibration = Self::default();
        samples.iter().for_each(|sample| calibration.add_sample(*sample));
        calibration.correction = fit(&calibration.samples().collect::<Vec<_>>());
        calibration
    }

    /// The stored samples, oldest first.
    pub fn samples(&self) -> impl Iterator<Item = CalibrationSample> {
        let (later, earlier) = self.samples.split_at(self.next.min(self.samples.len()));
        earlier.iter().chain(later).copied()
    }

    /// The correction for the next estimate.
    pub fn correction(&self) -> Correction {
        self.correction
    }

    /// Learns from an answer. Takes about 10 microseconds if it fits the correction again, far less otherwise.
    pub fn learn(&mut self, estimated: u64, reported: u64) {
        let (Ok(estimated), Ok(reported)) = (u32::try_from(estimated), u32::try_from(reported)) else {
            return;
        };
        if estimated == 0 || reported == 0 {
            return;
        }
        let was_exact = self.correction.apply(u64::from(estimated)) == u64::from(reported);
        self.add_sample(CalibrationSample { estimated, reported });
        if was_exact && self.samples.len() >= MIN_SAMPLES {
            self.correction.extend_range(estimated);
        } else if self.answers <= MAX_SAMPLES as u64 || self.answers.is_multiple_of(REFIT_INTERVAL) {
            self.correction = fit(&self.samples().collect::<Vec<_>>());
        }
    }

    fn add_sample(&mut self, sample: CalibrationSample) {
        self.answers += 1;
        if self.samples.len() < MAX_SAMPLES {
            self.samples.push(sample);
        } else {
            self.samples[self.next] = sample;
            self.next = (self.next + 1) % MAX_SAMPLES;
        }
    }
}

/// Fits a correction to samples, oldest first. A more complex correction has to fit clearly better.
fn fit(samples: &[CalibrationSample]) -> Correction {
    if samples.len() < MIN_SAMPLES {
        return Correction::default();
    }
    let latest = &samples[samples.len().saturating_sub(DOUBLE_WEIGHT_SAMPLES)..];
    let ratio = median(samples.iter().map(|p| per_mille(i64::from(p.reported), i64::from(p.estimated))));
    let candidates = [
        Correction::default(),
        with_offset(1_000, samples),
        Correction { per_mille: ratio.clamp(250, 4_000), ..Correction::default() },
        with_offset(slope(samples), samples),
    ];
    let cost = |step: usize, c: &Correction| {
        // Providers only add tokens. A correction that subtracts a constant has to fit much better.
        let penalty = if c.offset < -16 { 3 * COMPLEXITY_PENALTY } else { 0 };
        u64::midpoint(misfit(*c, samples), misfit(*c, latest)) + penalty + step as u64 * COMPLEXITY_PENALTY
    };
    let best = candidates.into_iter().enumerate().min_by_key(|(step, c)| cost(*step, c));
    let mut best = best.map(|(_, correction)| correction).unwrap_or_default();
    (best.smallest, best.largest) = (u32::MAX, 0);
    samples.iter().for_each(|sample| best.extend_range(sample.estimated));
    best
}

/// The correction with this factor and the median of the offsets that remain.
fn with_offset(per_mille: i64, samples: &[CalibrationSample]) -> Correction {
    let left = |p: &CalibrationSample| i64::from(p.reported) - i64::from(p.estimated) * per_mille / 1_000;
    Correction { per_mille, offset: median(samples.iter().map(left)), ..Correction::default() }
}

/// The median slope between two samples (Theil-Sen estimator), per mille. 1,000 if no two samples differ enough.
fn slope(samples: &[CalibrationSample]) -> i64 {
    let between =
        samples.iter().enumerate().flat_map(|(at, a)| samples[at + 1..].iter().map(move |b| (a, b)));
    let slopes = between.filter_map(|(a, b)| {
        let run = i64::from(b.estimated) - i64::from(a.estimated);
        // The slope between prompts of nearly the same size is mostly noise.
        let is_distinct = run.unsigned_abs() * 8 > u64::from(a.estimated.max(b.estimated));
        is_distinct.then(|| per_mille(i64::from(b.reported) - i64::from(a.reported), run))
    });
    let mut slopes: Vec<i64> = slopes.collect();
    if slopes.is_empty() { 1_000 } else { middle(&mut slopes).clamp(600, 2_000) }
}

/// The error that a correction leaves, in millionths: the sum of the median, the upper quartile and half the
/// 90th percentile of the relative errors.
fn misfit(correction: Correction, samples: &[CalibrationSample]) -> u64 {
    let error = |p: &CalibrationSample| {
        let reported = u64::from(p.reported);
        correction.apply(u64::from(p.estimated)).abs_diff(reported).saturating_mul(1_000_000)
            / reported.max(1)
    };
    let mut errors: Vec<u64> = samples.iter().map(error).collect();
    errors.sort_unstable();
    errors[errors.len() / 2] + errors[errors.len() * 3 / 4] + errors[errors.len() * 9 / 10] / 2
}

fn per_mille(part: i64, whole: i64) -> i64 {
    if whole == 0 { 1_000 } else { part.saturating_mul(1_000) / whole }
}

/// The median; 0 if there are no values.
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

    fn learned(samples: impl IntoIterator<Item = (u64, u64)>) -> Calibration {
        let mut calibration = Calibration::default();
        samples.into_iter().for_each(|(estimated, reported)| calibration.learn(estimated, reported));
        calibration
    }

    #[test]
    fn a_constant_a_proportion_or_both_are_learned_from_eight_answers() {
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
    fn a_third_of_wrong_usage_reports_does_not_move_a_correction() {
        let wild = (0..32u64).map(|n| (100 + n * 10, if n % 3 == 0 { 1 << 30 } else { 110 + n * 11 }));
        let corrected = learned(wild).correction().apply(200);
        assert!(corrected.abs_diff(220) <= 4, "{corrected}");
    }

    #[test]
    fn false_usage_reports_move_a_correction_within_bounds() {
        assert_eq!(learned([(1_000, 1); 32]).correction().apply(1_000), 250);
        assert_eq!(learned([(1_000, 100_000); 32]).correction().apply(1_000), 6_048);
        assert_eq!(learned([(0, 7), (7, 0), (u64::MAX, 7)]), Calibration::default());
    }

    #[test]
    fn a_correction_holds_for_larger_prompts_after_a_large_sample() {
        let calibration = learned([50, 900, 120, 3_000].map(|n| (n, n * 5 / 4 + 300)));
        assert_eq!(calibration.correction().apply(10_000), 12_800);
    }

    #[test]
    fn a_correction_follows_a_change_of_the_provider() {
        let mut calibration = learned([(100, 100); 200]);
        (0..40).for_each(|_| calibration.learn(100, 160));
        assert_eq!(calibration.correction().apply(100), 160);
    }

    #[test]
    fn a_restored_calibration_corrects_like_the_original() {
        for answers in [0, 1, 5, 32, 33, 100] {
            let calibration = learned((0..answers).map(|n| (100 + n * 7, 120 + n * 9)));
            let kept: Vec<CalibrationSample> = calibration.samples().collect();
            assert_eq!(kept.len() as u64, answers.min(32));
            let again = Calibration::from_samples(&kept);
            assert_eq!(again.samples().collect::<Vec<_>>(), kept);
            let [a, b] = [&calibration, &again].map(|c| c.correction().apply(500));
            assert!(a.abs_diff(b) <= 5, "{answers}: {a} {b}");
        }
    }

    proptest! {
        #[test]
        fn corrections_stay_within_bounds_for_any_samples(samples in prop::collection::vec((any::<u64>(), any::<u64>()), 0..80), estimated in any::<u64>()) {
            let corrected = learned(samples).correction().apply(estimated);
            prop_assert!(corrected >= estimated / 4);
            prop_assert!(corrected <= estimated.saturating_mul(4).saturating_add(2_048));
        }
    }
}
