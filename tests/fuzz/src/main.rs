//! Fuzz target for the readers of bytes from outside, run by libFuzzer. The first byte of an input selects the reader:
//! `0` to `5` a body of an API, `6` the events of a stream, `7` a compressed answer, `8` the check of request heads, `9`
//! the events of a stream beside another parser, `:` the usage of a JSON answer, `;` a form, `<` a config, `=` an answer
//! of an upstream, `>` a file in a request. The variable `FUZZ_READER` overrides it. The second byte selects the model, or
//! the coding and the cuts. The rest is what the reader gets.
#![no_main]
#![allow(clippy::unwrap_used, clippy::panic)] // a panic reports a finding

mod answers;
mod bodies;
mod coded;
mod configs;
mod documents;
mod forms;
mod heads;
mod mutate;
mod oracle;
mod streams;
mod usage;

use std::sync::OnceLock;

/// The two selecting bytes.
const HEAD: usize = 2;

/// The only reader to fuzz, if the variable `FUZZ_READER` names one.
fn only_reader() -> Option<u8> {
    static READER: OnceLock<Option<u8>> = OnceLock::new();
    *READER.get_or_init(|| std::env::var("FUZZ_READER").ok().and_then(|reader| reader.bytes().next()))
}

libfuzzer_sys::fuzz_target!(init: tollgate::estimate::warm(), |input: &[u8]| {
    if let [reader, variant, rest @ ..] = input {
        match only_reader().unwrap_or(*reader).wrapping_sub(b'0') % 15 {
            6 => streams::check(*variant, rest),
            7 => coded::check(*variant, rest),
            8 => heads::check(*variant, rest),
            9 => oracle::check(rest),
            10 => usage::check(*variant, rest),
            11 => forms::check(rest),
            12 => configs::check(rest),
            13 => answers::check(*variant, rest),
            14 => documents::check(*variant, rest),
            api => bodies::check(bodies::APIS[usize::from(api)], *variant, rest),
        }
    }
});

// Every second mutation is one of libFuzzer's own: of bytes, or with words of the dictionary.
libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed.is_multiple_of(2)
        && size > HEAD
        && max_size > HEAD
        && let Some(changed) = mutate::json(&data[HEAD..size], max_size - HEAD, seed)
    {
        let end = HEAD + changed.len();
        data[HEAD..end].copy_from_slice(&changed);
        return end;
    }
    libfuzzer_sys::fuzzer_mutate(data, size, max_size)
});
