//! Fuzz target for the readers of bytes from outside, run by libFuzzer. The variable `FUZZ_READER` selects the reader. The
//! first byte of an input selects the model, or the coding and the cuts. The rest is what the reader gets.
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

use rustix::time::{ClockId, clock_gettime};
use std::sync::OnceLock;
use std::time::Duration;
use tollgate::api::Api;

struct Reader {
    name: &'static str,
    check: fn(variant: u8, input: &[u8]),
    mutate: mutate::Mutate,
}

/// `tests/fuzz/run` lists the same names. Each has a directory of seeds.
static READERS: [Reader; 15] = [
    Reader { name: "chat", check: |n, body| bodies::check(Api::Chat, n, body), mutate: mutate::json },
    Reader {
        name: "completions",
        check: |n, body| bodies::check(Api::Completions, n, body),
        mutate: mutate::json,
    },
    Reader {
        name: "responses",
        check: |n, body| bodies::check(Api::Responses, n, body),
        mutate: mutate::json,
    },
    Reader {
        name: "embeddings",
        check: |n, body| bodies::check(Api::Embeddings, n, body),
        mutate: mutate::json,
    },
    Reader { name: "messages", check: |n, body| bodies::check(Api::Messages, n, body), mutate: mutate::json },
    Reader { name: "gemini", check: |n, body| bodies::check(Api::Gemini, n, body), mutate: mutate::json },
    Reader { name: "documents", check: documents::check, mutate: mutate::lines },
    Reader { name: "forms", check: |_, form| forms::check(form), mutate: mutate::lines },
    Reader { name: "configs", check: |_, text| configs::check(text), mutate: mutate::lines },
    Reader { name: "heads", check: heads::check, mutate: mutate::lines },
    Reader { name: "answers", check: answers::check, mutate: mutate::lines },
    Reader { name: "coded", check: coded::check, mutate: mutate::lines },
    Reader { name: "usage", check: usage::check, mutate: mutate::json },
    Reader { name: "streams", check: streams::check, mutate: mutate::events },
    Reader { name: "oracle", check: |_, stream| oracle::check(stream), mutate: mutate::events },
];

/// Every input must use less CPU time. Five times the time of the slowest 64 KiB, which are documents to inflate.
const MAX_TIME: Duration = Duration::from_secs(1);

fn reader() -> &'static Reader {
    static READER: OnceLock<&Reader> = OnceLock::new();
    READER.get_or_init(|| {
        let name = std::env::var("FUZZ_READER").unwrap_or_default();
        READERS.iter().find(|reader| reader.name == name).expect("FUZZ_READER must be the name of a reader")
    })
}

libfuzzer_sys::fuzz_target!(init: tollgate::estimate::warm(), |input: &[u8]| {
    if let [variant, input @ ..] = input {
        let began = processor_time();
        (reader().check)(*variant, input);
        let took = processor_time().saturating_sub(began);
        assert!(took < MAX_TIME, "{took:?} for {} bytes", input.len());
    }
});

// Every second mutation is one of libFuzzer's own: of bytes, or with words of the dictionary.
libfuzzer_sys::fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    if seed.is_multiple_of(2)
        && size > 1
        && max_size > 1
        && let Some(changed) = (reader().mutate)(&data[1..size], max_size - 1, seed)
    {
        let end = 1 + changed.len();
        data[1..end].copy_from_slice(&changed);
        return end;
    }
    libfuzzer_sys::fuzzer_mutate(data, size, max_size)
});

/// CPU time of this thread. Unlike wall-clock time it is independent of other processes.
fn processor_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec.unsigned_abs(), u32::try_from(time.tv_nsec).unwrap_or(0))
}
