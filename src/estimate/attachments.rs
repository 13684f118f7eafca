//! The images, documents, sound and video of a prompt.

use super::count_cache::HashedText;
use super::images::PromptImage;
use super::media::{Pdf, Recording};
use super::media_rules::MediaRules;
use crate::api::Api;

/// Characters per token of text that was only measured.
const CHARACTERS_PER_TOKEN: u64 = 4;

/// What a prompt has besides text.
#[derive(Debug, Default)]
pub(super) struct Attachments<'a> {
    images: Vec<PromptImage>,
    /// Width and height of document pages in points, with the number of these pages.
    pages: Vec<((u32, u32), u64)>,
    /// The texts on document pages, and the names of files.
    texts: Vec<(AttachedText, HashedText<'a>)>,
    /// Characters on pages that are not in `texts`.
    page_characters: u64,
    recordings: Vec<Recording>,
    /// Number of documents with pages.
    documents: u64,
    /// Number of files.
    files: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AttachedText {
    Page,
    FileName,
}

/// The tokens of all attachments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct AttachmentTokens {
    /// Of images and of pages.
    pub(super) images: u64,
    /// Of names of files, sound and video.
    pub(super) others: u64,
}

impl<'a> Attachments<'a> {
    pub(super) fn add_image(&mut self, image: PromptImage) {
        self.images.push(image);
    }

    pub(super) fn add_document(&mut self, pdf: Pdf) -> &HashedText<'a> {
        self.documents += 1;
        self.pages.extend(pdf.pages);
        self.page_characters = self.page_characters.saturating_add(pdf.text.more_characters);
        self.add_text(AttachedText::Page, HashedText::of(pdf.text.text.into()))
    }

    pub(super) fn add_recording(&mut self, recording: Recording) {
        self.recordings.push(recording);
    }

    pub(super) fn add_file(&mut self, name: HashedText<'a>) {
        self.files += 1;
        self.add_text(AttachedText::FileName, name);
    }

    fn add_text(&mut self, kind: AttachedText, text: HashedText<'a>) -> &HashedText<'a> {
        self.texts.push((kind, text));
        &self.texts[self.texts.len() - 1].1
    }

    pub(super) fn is_empty(&self) -> bool {
        self.images.is_empty() && self.pages.is_empty() && self.recordings.is_empty()
    }

    /// Bytes of text.
    pub(super) fn text_bytes(&self) -> usize {
        self.texts.iter().map(|(_, text)| text.text.len()).sum()
    }

    /// `None` as soon as `count` returns `None`.
    pub(super) fn tokens(
        &self,
        rules: &MediaRules,
        api: Api,
        count: &mut dyn FnMut(&HashedText<'_>) -> Option<u64>,
    ) -> Option<AttachmentTokens> {
        let page_count = self.pages.iter().map(|(_, count)| count).sum::<u64>();
        let is_alone = self.images.len() as u64 + page_count == 1;
        let mut images: u64 = self.images.iter().map(|&image| rules.image(image, is_alone)).sum();
        for &(size, pages) in &self.pages {
            images = images.saturating_add(rules.page(size, api, is_alone).saturating_mul(pages));
        }
        let parts = self.images.len() as u64 + self.documents + self.recordings.len() as u64;
        let mut others = self.files.saturating_mul(rules.file()) + parts.saturating_mul(rules.part());
        for (kind, text) in &self.texts {
            match kind {
                AttachedText::Page if rules.reads_page_text() => images += count(text)?,
                AttachedText::FileName if rules.reads_file_names() => others += count(text)?,
                _ => {}
            }
        }
        if rules.reads_page_text() {
            images = images.saturating_add(self.page_characters / CHARACTERS_PER_TOKEN);
        }
        for recording in &self.recordings {
            others = others.saturating_add(rules.recording(recording));
        }
        Some(AttachmentTokens { images, others })
    }
}
