//! Random numbers, clock steps and the length of the walks.

pub(crate) const DAY: i64 = 86_400_000;

/// SplitMix64. The walk is the same on every machine.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// Start of the walks: 28 March 2026, a day before daylight saving time begins in Europe, and near the end of
/// a month.
pub(crate) const BEGIN: i64 = 1_774_700_000_000;

/// Picks a clock step in milliseconds, and its name in the statistics.
pub(crate) fn clock_step(random: &mut Random) -> (i64, &'static str) {
    match random.below(400) {
        0 => (-1_000, "stepped back"),
        1 => (-3_600_000, "stepped back"),
        2 => (-DAY, "stepped back"),
        3 => (3_600_000, "stepped forward"),
        4 => (DAY, "stepped forward"),
        _ => (random.below(1_500).cast_signed(), "advanced"),
    }
}

/// Number of steps per walk.
pub(crate) fn steps() -> u64 {
    std::env::var("TOLLGATE_WALK_STEPS").map_or(1_000_000, |n| n.parse().unwrap())
}
