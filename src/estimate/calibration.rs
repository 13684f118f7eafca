//! How far estimates were off, learned from what answers reported.

/// What a request is like, as far as estimates differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Text alone.
    #[default]
    Plain,
    /// With definitions of tools, or a schema for the answer.
    Tools,
    /// With images or documents.
    Images,
}

/// How estimates are corrected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Correction;

/// What was learned of one upstream, model and kind of request.
#[derive(Clone, Debug, Default)]
pub struct Calibration;
