//! Reading a file in a request takes bounded memory, whatever the file contains.

#![allow(clippy::unwrap_used, clippy::panic)] // a test may panic

#[path = "common/documents.rs"]
mod documents;

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use std::alloc::System;
use tollgate::api::Api;
use tollgate::body::{Body, BodyText};
use tollgate::estimate::Models;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Bytes that may be allocated for a file of one megabyte, those that are freed at once included.
const MAX_ALLOCATED: usize = 8 << 20;

/// This is the only test of its program: the allocations of all threads are counted.
#[test]
fn a_megabyte_is_read_with_eight() {
    let model = Models::default().named("gpt-4o");
    for document in documents::hostile() {
        let request = document.request();
        let region = Region::new(ALLOCATOR);
        let text = BodyText::of(request.as_bytes()).unwrap();
        let body = Body::read(Api::Chat, &text).unwrap();
        let allocated = region.change().bytes_allocated;
        println!("{:<30} {:>8} KiB", document.name, allocated >> 10);
        assert!(allocated <= MAX_ALLOCATED, "{}: {allocated} bytes", document.name);
        // A token has at least a byte, of the file or of what it decompresses to.
        let tokens = body.prompt.estimate(&model).tokens();
        assert!(tokens < 16_000_000, "{}: {tokens} tokens", document.name);
    }
}
