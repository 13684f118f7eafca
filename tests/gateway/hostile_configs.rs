//! Files that are no config: a clear error, in bounded time and memory, at the command line and at a reload.

use crate::support::*;
use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// A file of this size is read only up to the maximum.
const HUGE_FILE_BYTES: u64 = 100 << 20;
/// The address space of `check`, in KiB. A read of the whole huge file would not fit beside the program.
const MAX_MEMORY_KIB: u32 = 250_000;

/// Nested aliases that expand to 9^9 elements.
fn bomb() -> String {
    let level = |n: usize| {
        let previous = format!("*a{}", n - 1);
        format!("a{n}: &a{n} [{}]\n", vec![previous; 9].join(","))
    };
    format!("a0: &a0 x\n{}", (1..=9).map(level).collect::<String>())
}

const MINIMAL: &str = "server: { listen: '127.0.0.1:0' }\nupstreams: { u: { base_url: 'http://127.0.0.1:9/v1' } }\nenvironments: { e: { upstream: u, quotas: { requests: { limit: 5, per: minute } } } }\nstore: { memory: true }\n";

/// Replaces the config by each broken file, and calls `check` with what its error must contain.
fn for_each_broken_file(path: &Path, mut check: impl FnMut(&str)) {
    let token = |bytes: usize| {
        format!("{MINIMAL}admin: {{ listen: '127.0.0.1:0', token: '{}' }}\n", "x".repeat(bytes))
    };
    for (text, expected) in [
        (bomb(), "the config is too large, or its aliases expand to too much"),
        (token(1 << 20), "admin.token: this key is longer than"),
        ("\u{1f}\u{8b}".repeat(1_000), "this is not YAML"),
        (String::new(), "\"upstreams\" is missing"),
    ] {
        fs::write(path, text).unwrap();
        check(expected);
    }
    fs::write(path, b"\x1f\x8b\x08\0\xff\xfe").unwrap();
    check("the file is not UTF-8");
    let mut huge = fs::File::create(path).unwrap();
    huge.write_all(b"# ").unwrap();
    huge.set_len(HUGE_FILE_BYTES).unwrap();
    check("the config is larger than 4 MiB");
    fs::remove_file(path).unwrap();
    fs::create_dir(path).unwrap();
    check("this is a directory; name the config file in it");
    fs::remove_dir(path).unwrap();
}

#[test]
fn check_refuses_broken_files_in_bounded_time_and_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.yaml");
    for_each_broken_file(&path, |expected| {
        let started = Instant::now();
        let script = format!("ulimit -v {MAX_MEMORY_KIB}; exec \"$0\" check --config \"$1\"");
        let program = env!("CARGO_BIN_EXE_tollgate");
        let output =
            Command::new("sh").args(["-c", &script, program, path.to_str().unwrap()]).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains(expected) && errors.len() < 20_000, "{expected}: {errors:.2000}");
        assert_eq!(output.status.code(), Some(2), "{errors:.2000}");
        assert!(started.elapsed() < Duration::from_secs(10), "{expected}: {:?}", started.elapsed());
    });
}

#[tokio::test]
async fn a_reload_refuses_broken_files_and_the_old_config_stays() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.yaml");
    let text =
        format!("{}default_environment: e\n", MINIMAL.replace("127.0.0.1:9", &upstream.address.to_string()))
            + "admin: { listen: '127.0.0.1:0' }\n";
    fs::write(&path, &text).unwrap();
    let gateway = Gateway::from_file(&path).await;
    let mut expected = Vec::new();
    let copies = tempfile::tempdir().unwrap();
    for_each_broken_file(&path, |message| {
        // The files are prepared first: a reload is awaited.
        let copy = copies.path().join(expected.len().to_string());
        if path.is_dir() {
            fs::create_dir(&copy).unwrap();
        } else {
            fs::copy(&path, &copy).unwrap();
        }
        expected.push(message.to_owned());
    });
    for (number, expected) in expected.iter().enumerate() {
        let copy = copies.path().join(number.to_string());
        if path.is_dir() {
            fs::remove_dir(&path).unwrap();
        } else {
            drop(fs::remove_file(&path));
        }
        fs::rename(&copy, &path).unwrap();
        let mut admin = Caller::connect(gateway.admin).await;
        let host = gateway.admin;
        let head = format!("POST /api/config/reload HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\n\r\n");
        admin.send(head.as_bytes()).await;
        let reply = admin.reply().await;
        assert!(
            reply.status == 422 && reply.text().contains(&expected.replace('"', "\\\"")),
            "{expected}: {:.2000}",
            reply.text()
        );
        assert_eq!(gateway.chat(HELLO).await.status, if number < 5 { 200 } else { 429 });
    }
}
