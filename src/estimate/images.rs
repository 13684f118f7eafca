//! The tokens of images, by size, requested detail and model.
//!
//! The tables are from the latest guides of the providers, which have changed several times. Calibration corrects
//! the remaining error.

/// The detail in which the model reads an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ImageDetail {
    /// The model decides.
    #[default]
    Auto,
    /// A reduced version.
    Low,
    /// A large version.
    High,
    /// The image in its own size.
    Original,
}

/// An image by URL: the keyed hash of its URL and detail, and the number of messages before it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ImageUrlKey {
    pub(crate) hash: u64,
    pub(crate) message: u64,
}

impl ImageDetail {
    /// The detail by its name in a request; `Auto` for an unknown name.
    pub(crate) fn named(name: &str) -> Self {
        match name {
            "low" => Self::Low,
            "high" => Self::High,
            "original" => Self::Original,
            _ => Self::Auto,
        }
    }
}

/// An image in a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct PromptImage {
    /// Width and height in pixels; `None` counts as `DEFAULT_SIZE`.
    pub(super) size: Option<(u32, u32)>,
    pub(super) detail: ImageDetail,
}

impl PromptImage {
    pub(super) fn of_size(size: (u32, u32)) -> Self {
        Self { size: Some(size), detail: ImageDetail::Auto }
    }
}

/// Size of an image whose real size is unknown, in pixels.
const DEFAULT_SIZE: (u32, u32) = (640, 480);
/// Bound of the sides of an image in pixels. Headers can contain larger values.
const MAX_SIDE: u32 = 65_535;

/// The size to which an image is reduced.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct SizeLimit {
    /// Longest side in pixels.
    side: u32,
    /// Number of patches; `None`: no limit.
    patches: Option<u64>,
}

const fn size_limit(side: u32, patches: u64) -> SizeLimit {
    SizeLimit { side, patches: Some(patches) }
}

/// How a model family charges for images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum ImageRule {
    /// `base` tokens, and `tile` tokens for each tile of 512 by 512 pixels.
    Tiles { base: u64, tile: u64 },
    /// `percent` tokens per 100 patches of 32 by 32 pixels. `low`, `high` and `original` limit the size at each
    /// detail; `auto` is the detail that `Auto` means.
    Patches { percent: u64, low: SizeLimit, high: SizeLimit, original: SizeLimit, auto: ImageDetail },
    /// One token per `pixels` pixels, after the longest side was reduced to `side`; at most `max_tokens`. `fixed`
    /// tokens in addition.
    Area { pixels: u64, side: u32, max_tokens: u64, fixed: u64 },
    /// One token per patch of `pixels` by `pixels`, and one per row of patches, after the longest side was
    /// reduced to `side`.
    Rows { pixels: u32, side: u32 },
    /// `tile` tokens for each image. If the prompt has one image, `tile` tokens for each crop in addition (see
    /// `crops`); an image of at most 384 by 384 pixels has none.
    Crops { tile: u64 },
    /// `tile` tokens for each square of `side` pixels, and for a reduced image if there are several squares.
    Squares { tile: u64, side: u32 },
    /// At most this many patches, with the shape of the image (see `grid_patches`).
    Grid { patches: u64 },
    /// The same number of tokens for every image.
    Fixed { image: u64 },
}

/// The limit of models that take 6,144 patches, in the latest guide.
const PATCHES_6144: SizeLimit = size_limit(2_048, 6_144);
/// The limit of models that take 1,536 patches, in an older guide. It does not limit the sides.
const PATCHES_1536: SizeLimit = size_limit(u32::MAX, 1_536);

/// A patch rule with one limit for every detail.
const fn patches(percent: u64, limit: SizeLimit) -> ImageRule {
    ImageRule::Patches { percent, low: limit, high: limit, original: limit, auto: ImageDetail::High }
}

/// The rule of gpt-4o, which also applies to unknown models.
const GPT_4O: ImageRule = ImageRule::Tiles { base: 85, tile: 170 };
/// The rule in Anthropic's guide. The fixed tokens were measured.
const CLAUDE: ImageRule = ImageRule::Area { pixels: 750, side: 1_568, max_tokens: 1_600, fixed: 4 };

/// The rules by the prefix of the model's name; the first match counts.
const RULES: &[(&str, ImageRule)] = &[
    (
        "gpt-5.6",
        ImageRule::Patches {
            percent: 120,
            low: SizeLimit { side: 512, patches: None },
            high: size_limit(2_048, 2_500),
            original: SizeLimit { side: MAX_SIDE, patches: None },
            auto: ImageDetail::Original,
        },
    ),
    (
        "gpt-5.5",
        ImageRule::Patches {
            percent: 120,
            low: SizeLimit { side: 512, patches: None },
            high: size_limit(2_048, 2_500),
            original: size_limit(6_000, 10_000),
            auto: ImageDetail::Original,
        },
    ),
    (
        "gpt-5.4",
        ImageRule::Patches {
            percent: 120,
            low: PATCHES_6144,
            high: size_limit(2_048, 2_500),
            original: size_limit(6_000, 10_000),
            auto: ImageDetail::High,
        },
    ),
    ("gpt-5.3", patches(120, PATCHES_6144)),
    ("gpt-5.2", patches(120, PATCHES_6144)),
    ("gpt-5-mini", patches(120, PATCHES_1536)),
    ("gpt-5-nano", patches(150, PATCHES_1536)),
    ("gpt-4.1-mini", patches(162, PATCHES_6144)),
    ("gpt-4.1-nano", patches(246, PATCHES_1536)),
    ("o4-mini", patches(172, PATCHES_1536)),
    ("gpt-5", ImageRule::Tiles { base: 70, tile: 140 }),
    ("gpt-4o-mini", ImageRule::Tiles { base: 2_833, tile: 5_667 }),
    ("o1", ImageRule::Tiles { base: 75, tile: 150 }),
    ("o3", ImageRule::Tiles { base: 75, tile: 150 }),
    ("computer-use", ImageRule::Tiles { base: 65, tile: 129 }),
    ("gpt-", GPT_4O),
    ("claude", CLAUDE),
    ("gemini-1", ImageRule::Fixed { image: 258 }),
    ("gemini-2.5", ImageRule::Fixed { image: 258 }),
    ("gemini-2", ImageRule::Crops { tile: 258 }),
    ("gemini", ImageRule::Grid { patches: 1_120 }),
    ("llama-4", ImageRule::Squares { tile: 144, side: 336 }),
    ("meta-llama-4", ImageRule::Squares { tile: 144, side: 336 }),
    ("qwen", ImageRule::Area { pixels: 784, side: 4_096, max_tokens: 16_384, fixed: 2 }),
    // Fitted to 15 exchanges.
    ("mistral", ImageRule::Rows { pixels: 28, side: 1_540 }),
    ("ministral", ImageRule::Rows { pixels: 28, side: 1_540 }),
    ("pixtral", ImageRule::Rows { pixels: 16, side: 1_024 }),
    ("gemma", ImageRule::Fixed { image: 258 }),
];

impl ImageRule {
    /// The rule of a model.
    pub(super) fn of_model(name: &str) -> Self {
        RULES.iter().find(|(prefix, _)| name.starts_with(prefix)).map_or(GPT_4O, |&(_, rule)| rule)
    }

    /// The tokens of an image. `is_alone`: it is the only image of the prompt.
    pub(super) fn tokens(self, image: PromptImage, is_alone: bool) -> u64 {
        let (width, height) = image.size.unwrap_or(DEFAULT_SIZE);
        let size = (width.clamp(1, MAX_SIDE), height.clamp(1, MAX_SIDE));
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
            Self::Area { pixels, side, max_tokens, fixed } => {
                let (width, height) = fit(size, side);
                (u64::from(width) * u64::from(height)).div_ceil(pixels).min(max_tokens) + fixed
            }
            Self::Rows { pixels, side } => {
                let (width, height) = fit(size, side);
                (u64::from(width.div_ceil(pixels)) + 1) * u64::from(height.div_ceil(pixels))
            }
            Self::Crops { tile } if is_alone => tile * (crops(size) + 1),
            Self::Crops { tile } => tile,
            Self::Squares { tile, side } => {
                let squares = u64::from(size.0.div_ceil(side)) * u64::from(size.1.div_ceil(side));
                tile * (squares + u64::from(squares > 1))
            }
            Self::Grid { patches } => grid_patches(size, patches),
            Self::Fixed { image } => image,
        }
    }
}

/// The patches of an image that is scaled to `max` square patches of any size, and cut to whole patches.
pub(super) fn grid_patches((width, height): (u32, u32), max: u64) -> u64 {
    let (width, height) = (f64::from(width.clamp(1, MAX_SIDE)), f64::from(height.clamp(1, MAX_SIDE)));
    // `max` is far below 2^52.
    #[allow(clippy::cast_precision_loss)]
    let scale = (max as f64 / (width * height)).sqrt();
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let whole = |side: f64| (side * scale).floor().max(1.0) as u64;
    (whole(width) * whole(height)).min(max)
}

/// Reduces a size until its longer side is at most `side`. Never enlarges it.
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

/// Tiles of 512 by 512 pixels, after the longer side was reduced to 2,048 and then the shorter side to 768.
fn tiles(size: (u32, u32)) -> u64 {
    let (width, height) = fit(size, 2_048);
    let shorter = width.min(height);
    let scale = |n: u32| if shorter > 768 { u64::from(n) * 768 / u64::from(shorter) } else { u64::from(n) };
    scale(width).div_ceil(512) * scale(height).div_ceil(512)
}

/// Square crops. Their side is two thirds of the image's shorter side, within 256 and 768 pixels.
fn crops((width, height): (u32, u32)) -> u64 {
    if width.max(height) <= 384 {
        return 0;
    }
    let unit = u64::from(width.min(height) * 2 / 3).clamp(256, 768);
    u64::from(width).div_ceil(unit) * u64::from(height).div_ceil(unit)
}

impl SizeLimit {
    /// Patches of 32 by 32 pixels after the image was reduced to the limit.
    fn patches_of(self, size: (u32, u32)) -> u64 {
        let (width, height) = fit(size, self.side);
        let patches = |w: f64, h: f64| (w / 32.0).ceil() * (h / 32.0).ceil();
        let (w, h) = (f64::from(width), f64::from(height));
        let whole = patches(w, h);
        let patches = match self.patches {
            // Exact: patch counts are far below 2^52.
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
        ImageRule::of_model(model).tokens(PromptImage { size: Some(size), detail }, true)
    }

    /// The examples in OpenAI's guide on images, and recorded ones of Mistral.
    #[test]
    fn images_cost_what_the_guides_say() {
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
            ("gemini-2.0-flash", (300, 300), Auto, 258),
            ("gemini-2.0-flash", (612, 792), Auto, 5 * 258),
            ("gemini-2.5-pro", (4_000, 3_000), Auto, 258),
            ("gemini-3-flash", (60, 30), Auto, 47 * 23),
            ("gemini-3-flash", (300, 346), Auto, 31 * 35),
            ("llama-4-scout", (336, 336), Auto, 144),
            ("llama-4-scout", (337, 700), Auto, 7 * 144),
            ("claude-sonnet-5", (200, 200), Auto, 54 + 4),
            ("mistral-small", (64, 64), Auto, 12),
            ("ministral-3b", (3_080, 1_540), Auto, 56 * 28),
        ] {
            assert_eq!(tokens(model, size, detail), want, "{model} {size:?}");
        }
    }

    #[test]
    fn any_image_size_costs_at_least_one_token_and_a_bounded_number() {
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
