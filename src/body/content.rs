//! Content in OpenAI's shapes: text, or a list of parts.

use crate::estimate::{ImageDetail, Prompt, PromptPart, media};
use crate::json::{Expected, LooseText, Take, To, element, string, value};
use serde::de::{DeserializeSeed as _, IgnoredAny, MapAccess, SeqAccess};
use std::borrow::Cow;

/// What stands around a file besides its name. Fitted to 19 exchanges.
const AROUND_A_FILE: u64 = 10;
/// Sound whose length cannot be told: a minute, in tenths of a second.
const UNKNOWN_SOUND: u64 = 600;

/// `content`, or another value of its shape.
pub(super) struct Content<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    pub(super) has_any: bool,
    /// Of a part without a list around it.
    found: Found<'a>,
}

impl<'p, 'a> Content<'p, 'a> {
    pub(super) fn of(prompt: &'p mut Prompt<'a>) -> Self {
        Self { prompt, has_any: false, found: Found::default() }
    }

    fn part<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let mut part = ContentPart { prompt: &mut *self.prompt, found: Found::default() };
        let there_is = element(list, &mut part)?;
        std::mem::take(&mut part.found).add_to(part.prompt);
        Ok(there_is)
    }
}

impl<'a> Take<'a> for Content<'_, 'a> {
    const FIELDS: &'static [&'static str] = ContentPart::FIELDS;

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.has_any |= !text.is_empty();
        self.prompt.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        let there_is = self.part(list)?;
        self.has_any |= there_is;
        Ok(there_is)
    }

    /// Some callers send one part without a list around it.
    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        self.has_any = true;
        let found = std::mem::take(&mut self.found);
        let mut part = ContentPart { prompt: &mut *self.prompt, found };
        part.field(name, object)?;
        self.found = part.found;
        Ok(())
    }

    fn object_end(&mut self) {
        std::mem::take(&mut self.found).add_to(self.prompt);
    }
}

/// What was found of one part, to be counted when all of it was seen.
#[derive(Default)]
struct Found<'a> {
    image: Option<Image<'a>>,
    file: Option<File<'a>>,
}

impl<'a> Found<'a> {
    fn add_to(self, prompt: &mut Prompt<'a>) {
        if let Some(image) = self.image {
            let data = media::data_url(&image.url);
            prompt.add_image(data.and_then(|(_, base64)| media::image_size(base64)), image.detail);
        } else if let Some(file) = self.file {
            file.add_to(prompt);
        }
    }
}

/// One part.
struct ContentPart<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    found: Found<'a>,
}

impl<'a> Take<'a> for ContentPart<'_, 'a> {
    const FIELDS: &'static [&'static str] = &[
        "type",
        "text",
        "refusal",
        "image_url",
        "document_url",
        "detail",
        "input_audio",
        "file",
        "file_data",
        "file_id",
        "file_url",
        "filename",
        "encrypted_content",
    ];

    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.prompt.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        match name {
            "type" => match &*string(object)? {
                "image_url" | "input_image" => drop(self.found.image.get_or_insert_default()),
                "file" | "input_file" => drop(self.found.file.get_or_insert_default()),
                _ => {}
            },
            "text" | "refusal" => {
                let mut text = LooseText::default();
                value(object, &mut text)?;
                self.prompt.add_text(PromptPart::Messages, text.0, 1);
            }
            "image_url" => value(object, self.found.image.get_or_insert_default())?,
            "detail" => {
                self.found.image.get_or_insert_default().detail = ImageDetail::named(&string(object)?)
            }
            "input_audio" => value(object, &mut Sound(self.prompt))?,
            // Mistral's: a URL, and a name that is not read.
            "document_url" => self.found.file.get_or_insert_default().document(string(object)?),
            "file" => value(object, self.found.file.get_or_insert_default())?,
            "encrypted_content" => super::responses::encrypted(self.prompt, &string(object)?),
            _ => self.found.file.get_or_insert_default().field(name, object)?,
        }
        Ok(())
    }
}

/// `image_url`: an object, or in some dialects the bare URL.
#[derive(Default)]
struct Image<'a> {
    url: Cow<'a, str>,
    detail: ImageDetail,
}

impl<'a> Take<'a> for Image<'a> {
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

/// `input_audio`.
struct Sound<'p, 'a>(&'p mut Prompt<'a>);

impl<'a> Take<'a> for Sound<'_, 'a> {
    const FIELDS: &'static [&'static str] = &["data"];

    fn field<M: MapAccess<'a>>(&mut self, _: &'static str, object: &mut M) -> Result<(), M::Error> {
        let data = string(object)?;
        let base64 = media::data_url(&data).map_or(&*data, |(_, base64)| base64);
        self.0.add_audio(media::audio_tenths(base64).unwrap_or(UNKNOWN_SOUND));
        Ok(())
    }
}

/// `file`: its bytes, or where they are.
#[derive(Default)]
struct File<'a> {
    data: Cow<'a, str>,
    name: Cow<'a, str>,
}

impl<'a> Take<'a> for File<'a> {
    const FIELDS: &'static [&'static str] = &["file_data", "file_id", "file_url", "filename"];

    fn field<M: MapAccess<'a>>(&mut self, name: &'static str, object: &mut M) -> Result<(), M::Error> {
        let text = string(object)?;
        match name {
            "file_data" => self.data = text,
            "filename" => self.name = text,
            _ => {}
        }
        Ok(())
    }
}

impl<'a> File<'a> {
    fn document(&mut self, url: Cow<'a, str>) {
        if media::data_url(&url).is_some() {
            self.data = url;
        }
    }

    fn add_to(self, prompt: &mut Prompt<'a>) {
        if self.data.is_empty() {
            prompt.unseen += 1;
        } else {
            let (kind, base64) = media::data_url(&self.data).unwrap_or(("", &self.data));
            document(prompt, kind, &self.name, base64);
            prompt.add_tokens(PromptPart::Messages, AROUND_A_FILE);
        }
        prompt.add_text(PromptPart::Messages, self.name, 1);
    }
}

/// How many members an object has; 0: it is none.
pub(super) fn members(json: &str) -> u64 {
    struct Members(u64);

    impl<'a> Take<'a> for Members {
        fn any_field<M: MapAccess<'a>>(&mut self, _: Cow<'a, str>, object: &mut M) -> Result<(), M::Error> {
            self.0 += 1;
            object.next_value::<IgnoredAny>().map(drop)
        }
    }

    let mut members = Members(0);
    // As far as it goes: the arguments of a call that was cut off are no whole object.
    drop(To(&mut members).deserialize(&mut serde_json::Deserializer::from_str(json)));
    members.0
}

/// A document that a request carries in base64: its pages, its text, or a guess by its size.
pub(super) fn document(prompt: &mut Prompt<'_>, kind: &str, name: &str, base64: &str) {
    /// Of a word processor's or a spreadsheet's compressed file, for each token.
    const BYTES_OF_A_TOKEN: u64 = 20;
    let name = name.to_ascii_lowercase();
    let ends = |endings: &[&str]| endings.iter().any(|ending| name.ends_with(ending));
    // Every PDF begins with "%PDF".
    if kind == "application/pdf" || ends(&[".pdf"]) || base64.starts_with("JVBER") {
        let pdf = media::pdf(base64, &mut prompt.inflated);
        prompt.add_pages(pdf.pages, pdf.characters);
    } else if kind.starts_with("image/") {
        prompt.add_image(media::image_size(base64), ImageDetail::Auto);
    } else if kind.starts_with("audio/") {
        prompt.add_audio(media::audio_tenths(base64).unwrap_or(UNKNOWN_SOUND));
    } else if kind.starts_with("text/") || kind.ends_with("json") || kind.ends_with("xml") || ends(TEXTS) {
        prompt.add_text(PromptPart::Messages, Cow::Owned(media::text(base64)), 1);
    } else {
        prompt.add_tokens(PromptPart::Messages, base64.len() as u64 * 3 / 4 / BYTES_OF_A_TOKEN);
    }
}

const TEXTS: &[&str] =
    &[".txt", ".md", ".csv", ".json", ".html", ".xml", ".yaml", ".yml", ".py", ".js", ".ts"];
