//! How models charge for images, pages of documents, sound and video.

use super::images::{ImageRule, PromptImage, grid_patches};
use super::media::Recording;
use super::provider::Provider;
use crate::api::Api;

/// Tokens of a file in OpenAI's APIs, in addition to its name and content. Fitted to 19 exchanges.
const OPENAI_FILE: u64 = 10;
/// Tokens of a file in Mistral's API, in addition to its content. Fitted to 4 exchanges.
const MISTRAL_FILE: u64 = 16;
/// Tokens of an image, document or recording for Gemini, in addition to its content. Fitted to 15 exchanges.
const GEMINI_PART: u64 = 1;

/// The rules of a model.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct MediaRules {
    images: ImageRule,
    pages: PageRule,
    sound: SoundRule,
    video: VideoRule,
    /// Tokens of each file.
    file: u64,
    /// Tokens of each image, document and recording.
    part: u64,
    provider: Provider,
}

/// How a model reads the page of a document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PageRule {
    /// OpenAI's chat API sends an image of the page and its text, the Responses API its text only.
    OpenAi { image: u64 },
    /// An image, which costs the same whatever the size of the page, and the text.
    ImageAndText { image: u64 },
    /// The text only.
    Text,
    /// Only an image, with the cost of an image that has the size of the page.
    Image,
    /// Only an image, which costs the same whatever the size of the page.
    FixedImage { image: u64 },
    /// Only an image, with at most this many patches (see `grid_patches`).
    Grid { patches: u64 },
}

/// How a model charges for sound.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SoundRule {
    PerSecond(u64),
    /// The length is rounded up to a multiple of `seconds`.
    PerWindow {
        seconds: u64,
        tokens: u64,
    },
}

/// How a model charges for the pictures of a video. It reads one picture for each second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum VideoRule {
    PerSecond(u64),
    /// Each picture has at most this many patches (see `grid_patches`).
    Grid {
        patches: u64,
    },
}

/// Pages of these models cost more, in recordings of two models. Those of older models cost 205 in recordings of three.
const LARGE_PAGES: &[&str] =
    &["gpt-4.1-nano", "gpt-5.2", "gpt-5.3", "gpt-5.4", "gpt-5.5", "gpt-5.6", "gpt-6"];
const OPENAI_PREFIXES: &[&str] = &["gpt-", "chatgpt-", "o1", "o3", "o4", "codex-", "computer-use"];

impl MediaRules {
    pub(super) fn of_model(name: &str) -> Self {
        let is = |prefixes: &[&str]| prefixes.iter().any(|prefix| name.starts_with(prefix));
        let pages = if is(&["gpt-oss"]) {
            PageRule::Text
        } else if is(OPENAI_PREFIXES) {
            PageRule::OpenAi { image: if is(LARGE_PAGES) { 980 } else { 205 } }
        } else if is(&["claude"]) {
            // The page is drawn with 1.15 megapixels, at 750 pixels a token.
            PageRule::ImageAndText { image: 1_545 }
        } else if is(&["gemini-1", "gemini-2.5", "gemma"]) {
            PageRule::FixedImage { image: 258 }
        } else if is(&["gemini-2"]) {
            PageRule::Image
        } else if is(&["gemini"]) {
            PageRule::Grid { patches: 560 }
        } else {
            PageRule::Text
        };
        let sound = if is(&["gemini-1", "gemini-2.5"]) {
            SoundRule::PerSecond(32)
        } else if is(&["gemini"]) {
            SoundRule::PerSecond(25)
        } else if is(&["voxtral"]) {
            SoundRule::PerWindow { seconds: 30, tokens: 375 }
        } else {
            // According to OpenAI's guide.
            SoundRule::PerSecond(10)
        };
        let video = if is(&["gemini-1", "gemini-2.5"]) {
            VideoRule::PerSecond(263)
        } else if is(&["gemini-2"]) || !is(&["gemini"]) {
            VideoRule::PerSecond(258)
        } else {
            VideoRule::Grid { patches: 70 }
        };
        let file = if is(&["mistral", "ministral", "magistral", "pixtral", "voxtral"]) {
            MISTRAL_FILE
        } else if matches!(pages, PageRule::OpenAi { .. }) {
            OPENAI_FILE
        } else {
            0
        };
        let part = if is(&["gemini"]) { GEMINI_PART } else { 0 };
        Self {
            images: ImageRule::of_model(name),
            pages,
            sound,
            video,
            file,
            part,
            provider: Provider::Unknown,
        }
    }

    pub(super) fn at(self, provider: Provider) -> Self {
        Self { provider, ..self }
    }

    /// Tokens of an image. `is_alone`: the prompt has no other image and no page.
    pub(super) fn image(&self, image: PromptImage, is_alone: bool) -> u64 {
        self.images.tokens(image, is_alone)
    }

    /// Tokens of a document page of this size in points, without its text.
    pub(super) fn page(&self, size: (u32, u32), api: Api, is_alone: bool) -> u64 {
        match self.pages {
            PageRule::Text => 0,
            // Routers send the text.
            PageRule::OpenAi { .. } if api == Api::Responses || self.provider == Provider::Router => 0,
            PageRule::OpenAi { image }
            | PageRule::ImageAndText { image }
            | PageRule::FixedImage { image } => image,
            PageRule::Image => self.images.tokens(PromptImage::of_size(size), is_alone),
            PageRule::Grid { patches } => grid_patches(size, patches),
        }
    }

    /// Whether the text of pages is in the prompt.
    pub(super) fn reads_page_text(&self) -> bool {
        matches!(self.pages, PageRule::OpenAi { .. } | PageRule::ImageAndText { .. } | PageRule::Text)
    }

    /// Whether the names of files are in the prompt.
    pub(super) fn reads_file_names(&self) -> bool {
        matches!(self.pages, PageRule::OpenAi { .. } | PageRule::ImageAndText { .. })
    }

    /// Tokens of each file, in addition to its name and content.
    pub(super) fn file(&self) -> u64 {
        self.file
    }

    /// Tokens of each image, document and recording, in addition to its content.
    pub(super) fn part(&self) -> u64 {
        self.part
    }

    /// Tokens of sound or video.
    pub(super) fn recording(&self, recording: &Recording) -> u64 {
        let milliseconds = recording.milliseconds;
        let rate = |per_second: u64| milliseconds.saturating_mul(per_second).div_ceil(1_000);
        let sound = match self.sound {
            _ if !recording.has_sound => 0,
            // Google Cloud counts begun seconds at the other rate.
            SoundRule::PerSecond(32) if matches!(self.provider, Provider::Vertex | Provider::Router) => {
                milliseconds.div_ceil(1_000).saturating_mul(25)
            }
            SoundRule::PerSecond(tokens) => rate(tokens),
            SoundRule::PerWindow { seconds, tokens } => {
                milliseconds.div_ceil(seconds * 1_000).saturating_mul(tokens)
            }
        };
        let pictures = match self.video {
            _ if !recording.is_video => 0,
            VideoRule::PerSecond(tokens) => rate(tokens),
            VideoRule::Grid { patches } => rate(grid_patches(recording.size.unwrap_or((1, 1)), patches)),
        };
        sound.saturating_add(pictures)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LETTER: (u32, u32) = (612, 792);
    const A4: (u32, u32) = (595, 841);

    #[test]
    fn a_page_costs_what_the_model_reads_of_it() {
        for (model, provider, api, size, image, reads_text) in [
            ("gpt-4o-mini", Provider::OpenAi, Api::Chat, LETTER, 205, true),
            ("gpt-5.4", Provider::Unknown, Api::Chat, LETTER, 980, true),
            ("gpt-4o", Provider::Router, Api::Chat, LETTER, 0, true),
            ("gpt-4o", Provider::OpenAi, Api::Responses, LETTER, 0, true),
            ("mistral-small", Provider::Unknown, Api::Chat, LETTER, 0, true),
            ("claude-sonnet-5", Provider::Anthropic, Api::Messages, A4, 1_545, true),
            ("gemini-2.0-flash", Provider::AiStudio, Api::Gemini, LETTER, 1_290, false),
            ("gemini-2.5-pro", Provider::AiStudio, Api::Gemini, LETTER, 258, false),
            ("gemini-3-flash", Provider::AiStudio, Api::Gemini, LETTER, 520, false),
            ("gemini-3-flash", Provider::AiStudio, Api::Gemini, A4, 532, false),
        ] {
            let rules = MediaRules::of_model(model).at(provider);
            assert_eq!(rules.page(size, api, true), image, "{model} {api:?}");
            assert_eq!(rules.reads_page_text(), reads_text, "{model}");
        }
        // Gemini 2.0 divides an image only if it is alone.
        assert_eq!(MediaRules::of_model("gemini-2.0-flash").page(LETTER, Api::Gemini, false), 258);
    }

    #[test]
    fn sound_and_video_cost_by_their_length() {
        let sound = Recording { milliseconds: 5_500, is_video: false, has_sound: true, size: None };
        let silent = Recording { is_video: true, has_sound: false, ..sound };
        let of = |model: &str, provider, recording: &Recording| {
            MediaRules::of_model(model).at(provider).recording(recording)
        };
        for (model, provider, tokens) in [
            ("gemini-2.0-flash", Provider::AiStudio, 138),
            ("gemini-2.5-flash", Provider::AiStudio, 176),
            ("gemini-2.5-flash", Provider::Router, 150),
            ("gemini-3-flash", Provider::AiStudio, 138),
            ("gpt-4o-audio", Provider::OpenAi, 55),
            ("voxtral-small", Provider::Unknown, 375),
        ] {
            assert_eq!(of(model, provider, &sound), tokens, "{model}");
        }
        assert_eq!(of("gemini-2.0-flash", Provider::AiStudio, &silent), 1_419);
        assert_eq!(of("gemini-2.5-flash", Provider::AiStudio, &silent), 1_447);
        assert_eq!(of("gemini-3-flash", Provider::AiStudio, &silent), 352);
        let wide = Recording { size: Some((1_920, 1_080)), has_sound: true, ..silent };
        assert_eq!(of("gemini-3-flash", Provider::AiStudio, &wide), 363 + 138);
    }
}
