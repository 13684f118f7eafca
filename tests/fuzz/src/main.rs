//! Feeds requests and streams to what reads them, as libFuzzer thinks them up. The first byte of an input says
//! what is read: `0` to `5` a body of an API, `6` the events of a stream, `7` a compressed answer; the second one
//! which model it is for, or how it is coded and cut. The rest is what is read.
#![no_main]
#![allow(clippy::unwrap_used, clippy::panic)] // how it tells what it found

mod bodies;
mod coded;
mod mutate;
mod streams;

/// The two bytes before what is read.
const HEAD: usize = 2;

libfuzzer_sys::fuzz_target!(init: tollgate::estimate::warm(), |input: &[u8]| {
    if let [what, how, rest @ ..] = input {
        match what.wrapping_sub(b'0') % 8 {
            6 => streams::check(*how, rest),
            7 => coded::check(*how, rest),
            api => bodies::check(bodies::APIS[usize::from(api)], *how, rest),
        }
    }
});

// Every other change is one of libFuzzer's own: bytes, and words of the dictionary.
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
