//! The cost of images that requests have by URL only. The gateway does not fetch them: answers report what they cost.

use super::{EstimateScope, Learned};
use crate::api::Api;
use crate::estimate::ImageUrlKey;

/// Distinguishes these keys from those of other entries.
const URL_KEY: u64 = 0x75_726c;
/// A learned cost of an image differs from the assumed one by at most this number of tokens.
const MAX_DIFFERENCE: i64 = 1 << 16;

/// The images by URL of a prompt, without those of its known prefix, whose cost the last report includes.
#[derive(Debug, Default)]
pub(super) struct ImageUrls {
    /// The sum of what the known images cost more than assumed.
    more: i64,
    /// The keys of the other images.
    unknown: Vec<u64>,
}

impl ImageUrls {
    /// The estimate with the known costs. The assumed costs of these images are in `tokens`.
    pub(super) fn apply(&self, tokens: u64) -> u64 {
        tokens.saturating_add_signed(self.more)
    }
}

impl Learned {
    /// Looks up the costs of these images. They belong to one principal, upstream, API and model.
    pub(super) fn image_urls(
        &self,
        scope: EstimateScope,
        api: Api,
        model: &str,
        images: impl Iterator<Item = ImageUrlKey>,
    ) -> ImageUrls {
        let mut urls = ImageUrls::default();
        for image in images {
            let key = scope.hash(model).with(api as u64).with(URL_KEY).with(image.hash).value();
            match self.table.get(key) {
                Some([more, ..]) => urls.more = urls.more.saturating_add(i64::from(more.cast_signed())),
                None => urls.unknown.push(key),
            }
        }
        urls
    }

    /// Learns the costs of the images that were unknown: in equal shares what the prompt cost more than predicted.
    pub(super) fn learn_image_urls(&self, urls: &ImageUrls, predicted: u64, reported: u64) {
        if urls.unknown.is_empty() {
            return;
        }
        let signed = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        let number = i64::try_from(urls.unknown.len()).unwrap_or(1);
        let share = (signed(reported) - signed(predicted)) / number;
        let Ok(share) = i32::try_from(share.clamp(-MAX_DIFFERENCE, MAX_DIFFERENCE)) else { return };
        for &key in &urls.unknown {
            self.table.update(key, |_| [share.cast_unsigned(), 0, 0, 0, 0]);
        }
    }
}
