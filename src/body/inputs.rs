//! `prompt` of completions and `input` of embeddings: a string, a list of strings, a list of tokens, or a list
//! of token lists.

use crate::estimate::{Prompt, PromptPart};
use crate::json::{Expected, JsonVisitor, element, raw};
use serde::de::{MapAccess, SeqAccess};
use std::borrow::Cow;

pub(super) struct Inputs<'p, 'a> {
    prompt: &'p mut Prompt<'a>,
    /// The current list has tokens, which together are one prompt.
    has_tokens: bool,
}

impl<'p, 'a> Inputs<'p, 'a> {
    pub(super) fn of(prompt: &'p mut Prompt<'a>) -> Self {
        Self { prompt, has_tokens: false }
    }
}

impl<'a> JsonVisitor<'a> for Inputs<'_, 'a> {
    fn text(&mut self, text: Cow<'a, str>) -> Result<(), Expected> {
        self.prompt.prompts += 1;
        self.prompt.add_text(PromptPart::Messages, text, 1);
        Ok(())
    }

    fn number(&mut self, _: Option<u64>) -> Result<(), Expected> {
        self.has_tokens = true;
        self.prompt.add_tokens(PromptPart::Messages, 1);
        Ok(())
    }

    fn element<S: SeqAccess<'a>>(&mut self, list: &mut S) -> Result<bool, S::Error> {
        element(list, self)
    }

    fn list_end(&mut self) {
        self.prompt.prompts += u64::from(std::mem::take(&mut self.has_tokens));
    }

    fn object(&mut self) -> Result<(), Expected> {
        self.prompt.prompts += 1;
        Ok(())
    }

    /// Some providers embed more than text. Four bytes count as one token.
    fn other_field<M: MapAccess<'a>>(&mut self, _: Cow<'a, str>, object: &mut M) -> Result<(), M::Error> {
        let tokens = raw(object)?.len() as u64 / 4;
        self.prompt.add_tokens(PromptPart::Messages, tokens);
        Ok(())
    }
}
