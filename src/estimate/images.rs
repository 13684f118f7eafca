//! What images cost, by their size, the detail that is asked for and the model's rule.
//!
//! The tables are what the providers' guides on images said last; they have moved several times, and what
//! they do not say is left to calibration.

use crate::api::Api;

/// How closely an image is to be looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageDetail {
    /// As the model sees fit.
    #[default]
    Auto,
    /// A small version.
    Low,
    /// A large one.
    High,
    /// As it is.
    Original,
}

impl ImageDetail {
    /// The detail that a request names.
    pub(crate) fn named(name: &str) -> Self {
        match name {
            "low" => Self::Low,
            "high" => Self::High,
            "original" => Self::Original,
            _ => Self::Auto,
        }
    }
}

/// An image in a request; without a size one of 1,024 by 1,024 pixels is taken.
#[derive(Clone, Copy, Debug)]
pub(super) struct Image {
    pub(super) size: Option<(u32, u32)>,
    pub(super) detail: ImageDetail,
}

const UNKNOWN_SIZE: (u32, u32) = (1_024, 1_024);
/// No image has longer sides, whatever its header says.
const LONGEST_SIDE: u32 = 65_535;

/// A size limit and a budget of patches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Limit {
    side: u32,
    patches: Option<u64>,
}

const fn limit(side: u32, patches: u64) -> Limit {
    Limit { side, patches: Some(patches) }
}

/// How a family of models charges for images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Rule {
    /// So much, and so much for each tile of 512 pixels.
    Tiles { base: u64, tile: u64 },
    /// Patches of 32 pixels times a factor in per cent; a limit for each detail.
    Patches { percent: u64, low: Limit, high: Limit, original: Limit, auto: ImageDetail },
    /// A token for so many pixels, after fitting into a side and a number of tokens.
    Area { pixels: u64, side: u32, most: u64 },
    /// Patches of so many pixels, and one more for the end of each row, after fitting into a side.
    Rows { pixels: u32, side: u32 },
    /// Tiles of 768 pixels, one for images up to 384.
    Crops { tile: u64 },
    /// The same for every image, and for every page.
    Fixed { image: u64, page: u64 },
}

const SMALL: Limit = limit(2_048, 6_144);
const OLD: Limit = limit(u32::MAX, 1_536);

/// A rule whose limit is the same whatever the detail.
pub(super) const fn patches(percent: u64, same: Limit) -> Rule {
    Rule::Patches { percent, low: same, high: same, original: same, auto: ImageDetail::High }
}

pub(super) const GPT_4O: Rule = Rule::Tiles { base: 85, tile: 170 };
pub(super) const CLAUDE: Rule = Rule::Area { pixels: 750, side: 1_568, most: 1_600 };

/// OpenAI's models by the beginning of their name; the first match decides.
pub(super) const RULES: &[(&str, Rule)] = &[
    (
        "gpt-5.6",
        Rule::Patches {
            percent: 120,
            low: Limit { side: 512, patches: None },
            high: limit(2_048, 2_500),
            original: Limit { side: LONGEST_SIDE, patches: None },
            auto: ImageDetail::Original,
        },
    ),
    (
        "gpt-5.5",
        Rule::Patches {
            percent: 120,
            low: Limit { side: 512, patches: None },
            high: limit(2_048, 2_500),
            original: limit(6_000, 10_000),
            auto: ImageDetail::Original,
        },
    ),
    (
        "gpt-5.4",
        Rule::Patches {
            percent: 120,
            low: SMALL,
            high: limit(2_048, 2_500),
            original: limit(6_000, 10_000),
            auto: ImageDetail::High,
        },
    ),
    ("gpt-5.3", patches(120, SMALL)),
    ("gpt-5.2", patches(120, SMALL)),
    ("gpt-5-mini", patches(120, OLD)),
    ("gpt-5-nano", patches(150, OLD)),
    ("gpt-4.1-mini", patches(162, SMALL)),
    ("gpt-4.1-nano", patches(246, OLD)),
    ("o4-mini", patches(172, OLD)),
    ("gpt-5", Rule::Tiles { base: 70, tile: 140 }),
    ("gpt-4o-mini", Rule::Tiles { base: 2_833, tile: 5_667 }),
    ("o1", Rule::Tiles { base: 75, tile: 150 }),
    ("o3", Rule::Tiles { base: 75, tile: 150 }),
    ("computer-use", Rule::Tiles { base: 65, tile: 129 }),
    ("gpt-", GPT_4O),
    ("claude", CLAUDE),
    ("gemini-3", Rule::Fixed { image: 1_085, page: 520 }),
    ("gemini", Rule::Crops { tile: 258 }),
    ("qwen", Rule::Area { pixels: 784, side: 4_096, most: 16_384 }),
    // 15 exchanges.
    ("mistral", Rule::Rows { pixels: 28, side: 1_540 }),
    ("ministral", Rule::Rows { pixels: 28, side: 1_540 }),
    ("pixtral", Rule::Rows { pixels: 16, side: 1_024 }),
    ("gemma", Rule::Fixed { image: 258, page: 258 }),
];

impl Rule {
    pub(super) fn of_model(name: &str) -> Self {
        RULES.iter().find(|(prefix, _)| name.starts_with(prefix)).map_or(GPT_4O, |&(_, rule)| rule)
    }

    pub(super) fn tokens(self, image: Image) -> u64 {
        let (width, height) = image.size.unwrap_or(UNKNOWN_SIZE);
        let size = (width.clamp(1, LONGEST_SIDE), height.clamp(1, LONGEST_SIDE));
        match self {
            Self::Tiles { base, .. } if image.detail == ImageDetail::Low => base,
            Self::Tiles { base, tile } => base + tile * tiles(size),
            Self::Patches { percent, low, high, original, auto } => {
                let detail = if image.detail == ImageDetail::Auto { auto } else { image.detail };
                let limit = match detail {
                    ImageDetail::Low => low,
                    ImageDetail::Original => original,
                    ImageDetail::High | ImageDetail::Auto => high,
                };
                (limit.patches_of(size) * percent).div_ceil(100)
            }
            Self::Area { pixels, side, most } => {
                let (width, height) = fit(size, side);
                (u64::from(width) * u64::from(height)).div_ceil(pixels).min(most)
            }
            Self::Rows { pixels, side } => {
                let (width, height) = fit(size, side);
                (u64::from(width.div_ceil(pixels)) + 1) * u64::from(height.div_ceil(pixels))
            }
            Self::Crops { tile } => tile * crops(size),
            Self::Fixed { image, .. } => image,
        }
    }

    /// A page of a document, without its text. OpenAI's chats get an image of it and Responses its text
    /// alone; Anthropic's models get both. Fitted to 8, 7 and 16 exchanges.
    pub(super) fn page(self, api: Api) -> u64 {
        match self {
            Self::Fixed { page, .. } => page,
            Self::Crops { tile } => tile,
            Self::Area { .. } | Self::Rows { .. } => 1_545,
            Self::Tiles { .. } | Self::Patches { .. } if api == Api::Responses => 0,
            Self::Tiles { .. } | Self::Patches { .. } => 980,
        }
    }

    /// Whether the text of a page counts besides its image.
    pub(super) fn reads_page_text(self) -> bool {
        !matches!(self, Self::Fixed { .. } | Self::Crops { .. })
    }
}

/// A size made smaller until its longer side is `side`; never larger.
fn fit((width, height): (u32, u32), side: u32) -> (u32, u32) {
    let longer = width.max(height);
    if longer <= side {
        return (width, height);
    }
    let scale = |n: u32| {
        u32::try_from((2 * u64::from(n) * u64::from(side) / u64::from(longer)).div_ceil(2)).unwrap_or(side)
    };
    (scale(width).max(1), scale(height).max(1))
}

/// Tiles of 512 pixels, after fitting into 2,048 and the shorter side into 768.
fn tiles(size: (u32, u32)) -> u64 {
    let (width, height) = fit(size, 2_048);
    let shorter = width.min(height);
    let scale = |n: u32| if shorter > 768 { u64::from(n) * 768 / u64::from(shorter) } else { u64::from(n) };
    scale(width).div_ceil(512) * scale(height).div_ceil(512)
}

/// Crops of a side of two thirds of the shorter one, from 256 to 768 pixels.
fn crops((width, height): (u32, u32)) -> u64 {
    if width.max(height) <= 384 {
        return 1;
    }
    let unit = u64::from(width.min(height) * 2 / 3).clamp(256, 768);
    u64::from(width).div_ceil(unit) * u64::from(height).div_ceil(unit)
}

impl Limit {
    /// Patches of 32 pixels that an image has once it is made to fit.
    fn patches_of(self, size: (u32, u32)) -> u64 {
        let (width, height) = fit(size, self.side);
        let patches = |w: f64, h: f64| (w / 32.0).ceil() * (h / 32.0).ceil();
        let (w, h) = (f64::from(width), f64::from(height));
        let whole = patches(w, h);
        let patches = match self.patches {
            // Patch counts are far below 2^52.
            #[allow(clippy::cast_precision_loss)]
            Some(budget) if whole > budget as f64 => {
                let mut scale = (1_024.0 * budget as f64 / (w * h)).sqrt();
                let fill = |n: f64| (n * scale / 32.0).floor() / (n * scale / 32.0);
                scale *= fill(w).min(fill(h));
                patches((w * scale).floor(), (h * scale).floor())
            }
            _ => whole,
        };
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let patches = patches as u64;
        patches.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(model: &str, size: (u32, u32), detail: ImageDetail) -> u64 {
        Rule::of_model(model).tokens(Image { size: Some(size), detail })
    }

    /// The examples of OpenAI's guide on images.
    #[test]
    fn images_cost_what_the_guide_says() {
        use ImageDetail::{Auto, High, Low};
        for (model, size, detail, want) in [
            ("gpt-4o", (1_024, 1_024), High, 765),
            ("gpt-4o", (2_048, 4_096), High, 1_105),
            ("gpt-4o", (4_096, 8_192), Low, 85),
            ("gpt-4o-mini", (512, 512), High, 8_500),
            ("gpt-5.4", (1_024, 1_024), High, 1_229),
            ("gpt-5.4", (2_048, 2_048), High, 3_000),
            ("gpt-4.1-nano", (1_800, 2_400), Auto, 3_572),
            ("o3", (128, 64), High, 225),
            ("mistral-small", (64, 64), Auto, 12),
            ("ministral-3b", (3_080, 1_540), Auto, 56 * 28),
        ] {
            assert_eq!(tokens(model, size, detail), want, "{model} {size:?}");
        }
    }

    #[test]
    fn no_size_makes_it_cost_nothing_or_without_bound() {
        let sizes = [(0, 0), (1, 1), (1, u32::MAX), (u32::MAX, u32::MAX), (3, 70_000)];
        for (model, _) in RULES {
            for size in sizes {
                for detail in [ImageDetail::Auto, ImageDetail::Low, ImageDetail::High, ImageDetail::Original]
                {
                    let tokens = tokens(model, size, detail);
                    assert!((1..=6_000_000).contains(&tokens), "{model} {size:?} {detail:?}: {tokens}");
                }
            }
        }
    }
}
