//! Which models read a text of a tool call.

/// The models that read a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Readers(u8);

impl Readers {
    /// Models that read each call by itself, and its arguments as they were sent.
    pub(super) const AS_SENT: Self = Self(1);
    /// Models that read several calls of a message as one call, and arguments without white space.
    pub(super) const JOINED: Self = Self(2);
    /// Models that read each call by itself, and arguments without white space.
    pub(super) const APART: Self = Self(4);
    pub(super) const ALL: Self = Self(7);

    /// Whether all of these models read the text.
    pub(super) const fn include(self, models: Self) -> bool {
        self.0 & models.0 == models.0
    }

    pub(super) const fn without(self, models: Self) -> Self {
        Self(self.0 & !models.0)
    }
}
