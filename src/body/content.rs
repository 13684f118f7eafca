//! Message content in OpenAI's shapes: text, or a list of parts.

use crate::estimate::media::{self, Media, Recording};
use crate::estimate::{ImageDetail, Prompt, PromptPart};
use crate::json::{Expected, JsonVisitor, LooseText, Visit, element, replace_lone_surrogates, string, value};
use serde::de::{DeserializeSeed as _, IgnoredAny, MapAccess, SeqAccess};
use std::borrow::Cow;

/// Assumed length of audio whose length cannot be read.
const UNKNOWN_AUDIO_MS: u64 = 60_000;
/// Characters per token of text that was only measured.
const CHARACTERS_PER_TOKEN: u64 = 4;
/// Bytes per token of files whose format is unknown.
const BYTES_PER_TOKEN: u64 = 20;

/// `content`, or another value of the same shape.
pub(super) struct MessageContent<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    pub(super) has_any: bool,
    /// Media in a part that is not in a list.
    media: PartMedia<'a>,
}

impl<'p, 'a> MessageContent<'p, 'a> {
    pub(super) fn of(prompt: &'p mut Prompt<'a>) -> Self {
        Self { prompt, has_any: false, media: PartMedia::default() }
    }

    fn part<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let mut part = ContentPart { prompt: &mut *self.prompt, media: PartMedia::default() };
        let is_some = element(list, &mut part)?;
        std::mem::take(&mut part.media).add_to(part.prompt);
        Ok(is_some)
    }
}

impl<'a> JsonVisitor<'a> for MessageContent<'_, 'a> {
    const FIELDS: &'static [&'static str] = ContentPart::FIELDS;

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.has_any |= !text.is_empty();
        self.prompt.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let is_some = self.part(list)?;
        self.has_any |= is_some;
        Ok(is_some)
    }

    /// Some callers send one part that is not in a list.
    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        self.has_any = true;
        let media = std::mem::take(&mut self.media);
        let mut part = ContentPart { prompt: &mut *self.prompt, media };
        part.field(name, object)?;
        self.media = part.media;
        Ok(())
    }

    fn object_end(&mut self) {
        std::mem::take(&mut self.media).add_to(self.prompt);
    }
}

/// The text, image or file of one part. Counted after all fields of the part were read.
#[derive(Default)]
struct PartMedia<'a> {
    text: Cow<'a, str>,
    /// The text is reasoning of an earlier answer.
    is_reasoning: bool,
    /// Whether the type of the part is an image, and whether it is a file.
    is_image: bool,
    is_file: bool,
    image: ImageUrl<'a>,
    /// Sound or video.
    recording: ImageUrl<'a>,
    file: FilePart<'a>,
}

impl<'a> PartMedia<'a> {
    fn add_to(self, prompt: &mut Prompt<'a>) {
        if self.is_reasoning {
            prompt.add_reasoning(self.text);
        } else {
            prompt.add_text(PromptPart::Messages, self.text, 1);
        }
        if self.is_image || !self.image.url.is_empty() {
            match media::data_url(&self.image.url) {
                Some((_, base64)) => prompt.add_image(media::image_size(base64), self.image.detail),
                None => prompt.add_image_at(&self.image.url, self.image.detail),
            }
        } else if let Some((kind, base64)) = media::data_url(&self.recording.url) {
            document(prompt, kind, "", base64);
        } else if !self.recording.url.is_empty() {
            prompt.identify(&self.recording.url);
            prompt.unseen += 1;
        } else if self.is_file || !self.file.is_empty() {
            self.file.add_to(prompt);
        }
    }
}

/// One part of a content list.
struct ContentPart<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    media: PartMedia<'a>,
}

impl<'a> JsonVisitor<'a> for ContentPart<'_, 'a> {
    const FIELDS: &'static [&'static str] = &[
        "type",
        "text",
        "refusal",
        "image_url",
        "video_url",
        "audio_url",
        "document_url",
        "detail",
        "input_audio",
        "file",
        "file_data",
        "file_id",
        "file_url",
        "filename",
        "encrypted_content",
        "thinking",
    ];

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.prompt.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "type" => match &*string(object)? {
                "image_url" | "input_image" => self.media.is_image = true,
                "file" | "input_file" => self.media.is_file = true,
                "reasoning_text" => self.media.is_reasoning = true,
                _ => {}
            },
            "text" => {
                let mut text = LooseText::default();
                value(object, &mut text)?;
                self.media.text = text.0;
            }
            "refusal" => {
                let mut text = LooseText::default();
                value(object, &mut text)?;
                self.prompt.add_text(PromptPart::Messages, text.0, 1);
            }
            "image_url" => value(object, &mut self.media.image)?,
            "video_url" | "audio_url" => value(object, &mut self.media.recording)?,
            "detail" => self.media.image.detail = ImageDetail::named(&string(object)?),
            "input_audio" => value(object, &mut InputAudio(self.prompt))?,
            // Mistral: a URL. The document's name is ignored.
            "document_url" => self.media.file.document(string(object)?),
            "file" => value(object, &mut self.media.file)?,
            "encrypted_content" => self.prompt.add_encrypted_reasoning(&string(object)?),
            // Mistral: the reasoning of an earlier answer.
            "thinking" => {
                let mut text = LooseText::default();
                value(object, &mut text)?;
                self.prompt.add_reasoning(text.0);
            }
            _ => self.media.file.field(name, object)?,
        }
        Ok(())
    }
}

/// `image_url`: an object, or the bare URL in some dialects.
#[derive(Default)]
struct ImageUrl<'a> {
    url: Cow<'a, str>,
    detail: ImageDetail,
}

impl<'a> JsonVisitor<'a> for ImageUrl<'a> {
    const FIELDS: &'static [&'static str] = &["url", "detail"];

    fn text(&mut self, url: Cow<'a, str>) -> Result<(), Expected> {
        self.url = url;
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "url" => self.url = string(object)?,
            _ => self.detail = ImageDetail::named(&string(object)?),
        }
        Ok(())
    }
}

/// `input_audio`: an object, or its data or URL as a text.
struct InputAudio<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> JsonVisitor<'a> for InputAudio<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["data"];

    fn text(&mut self, data: Cow<'a, str>) -> Result<(), Expected> {
        const UNKNOWN: Recording =
            Recording { milliseconds: UNKNOWN_AUDIO_MS, is_video: false, has_sound: true, size: None };
        if data.is_empty() {
            return Ok(());
        }
        let base64 = media::data_url(&data).map_or(&*data, |(_, base64)| base64);
        let is_url = base64.starts_with("http://") || base64.starts_with("https://");
        if is_url {
            self.0.identify(base64);
        }
        self.0.add_recording(media::sound(base64).filter(|_| !is_url).unwrap_or(UNKNOWN));
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, _: &'static str, object: &mut M) -> Result<(), M::Error> {
        value(object, self)
    }
}

/// `file`: its bytes, or a reference to them.
#[derive(Default)]
struct FilePart<'a> {
    data: Cow<'a, str>,
    name: Cow<'a, str>,
    /// The id or URL of a file that the request does not contain.
    reference: Cow<'a, str>,
}

impl<'a> JsonVisitor<'a> for FilePart<'a> {
    const FIELDS: &'static [&'static str] = &["file_data", "file_id", "file_url", "filename"];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        let text = string(object)?;
        self.set(name, text);
        Ok(())
    }
}

impl<'a> FilePart<'a> {
    fn set(&mut self, name: &str, text: Cow<'a, str>) {
        match name {
            _ if text.is_empty() => {}
            "file_data" => self.data = text,
            "filename" => self.name = text,
            _ => self.reference = text,
        }
    }

    fn is_empty(&self) -> bool {
        self.data.is_empty() && self.name.is_empty() && self.reference.is_empty()
    }

    fn document(&mut self, url: Cow<'a, str>) {
        if media::data_url(&url).is_some() {
            self.data = url;
        } else {
            self.reference = url;
        }
    }

    fn add_to(self, prompt: &mut Prompt<'a>) {
        if self.data.is_empty() {
            prompt.identify(&self.reference);
            prompt.unseen += 1;
            prompt.add_text(PromptPart::Messages, self.name, 1);
        } else {
            let (kind, base64) = media::data_url(&self.data).unwrap_or(("", &self.data));
            document(prompt, kind, &self.name, base64);
            prompt.add_file(self.name);
        }
    }
}

/// Counts the members of an object; 0 for any other value.
pub(super) fn member_count(json: &str) -> u64 {
    struct MemberCounter(u64);

    impl<'a> JsonVisitor<'a> for MemberCounter {
        fn other_field<M: MapAccess<'a>>(&mut self, _: Cow<'a, str>, object: &mut M) -> Result<(), M::Error> {
            self.0 += 1;
            object.next_value::<IgnoredAny>().map(drop)
        }
    }

    let mut members = MemberCounter(0);
    // Errors are ignored: the arguments of a call that was cut off are an incomplete object.
    let json = replace_lone_surrogates(json.as_bytes());
    drop(Visit(&mut members).deserialize(&mut serde_json::Deserializer::from_slice(&json)));
    members.0
}

/// Counts a file in base64: an image, sound, video or document.
pub(super) fn document(prompt: &mut Prompt<'_>, kind: &str, name: &str, base64: &str) {
    match Media::read(kind, name, base64, &mut prompt.inflated) {
        Media::Image(size) => prompt.add_image(size, ImageDetail::Auto),
        Media::Recording(recording) => prompt.add_recording(recording),
        Media::Pdf(pdf) => prompt.add_document(pdf),
        Media::Text(text) => {
            prompt.add_text(PromptPart::Messages, text.text.into(), 1);
            prompt.add_tokens(PromptPart::Messages, text.more_characters / CHARACTERS_PER_TOKEN);
        }
        Media::Unknown(bytes) => prompt.add_tokens(PromptPart::Messages, bytes / BYTES_PER_TOKEN),
    }
}
