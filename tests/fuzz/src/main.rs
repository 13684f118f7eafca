//! Fuzz target for the readers of requests and answers, run by libFuzzer. The first byte of an input selects the
//! reader: `0` to `5` a body of an API, `6` the events of a stream, `7` a compressed answer. The second byte selects the
//! model, or the coding and the cuts. The rest is the body, stream or answer.
#![no_main]
#![allow(clippy::unwrap_used, clippy::panic)] // a panic reports a finding

mod bodies;
mod coded;
mod mutate;
mod streams;

/// The two selecting bytes.
const HEAD: usize = 2;

libfuzzer_sys::fuzz_target!(init: tollgate::estimate::warm(), |input: &[u8]| {
    if let [reader, variant, rest @ ..] = input {
        match reader.wrapping_sub(b'0') % 8 {
            6 => streams::check(*variant, rest),
            7 => coded::check(*variant, rest),
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
