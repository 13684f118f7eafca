//! The suite runs on shared counters too: with `TOLLGATE_TEST_STORE=redis` every gateway keeps its counters in one Redis
//! server, under a prefix of its own.

use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

/// What gateways of the tests have for a store.
const OWN: &str = "store: { memory: true }";

struct Server {
    port: u16,
    folder: tempfile::TempDir,
    /// It ends when its standard input does: when this process does.
    _child: Child,
}

/// A config's text with the store that the suite runs on.
pub fn with_store(text: &str) -> String {
    if std::env::var("TOLLGATE_TEST_STORE").as_deref() != Ok("redis") {
        return text.to_owned();
    }
    static SERVER: OnceLock<Server> = OnceLock::new();
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let Server { port, folder, .. } = SERVER.get_or_init(start);
    let (n, folder) = (NEXT.fetch_add(1, Ordering::Relaxed), folder.path().display());
    let shared = format!(
        "store: {{ path: '{folder}/{n}.db', redis: {{ url: 'redis://127.0.0.1:{port}', prefix: 't{n}' }} }}"
    );
    text.replace(OWN, &shared)
}

fn start() -> Server {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let folder = tempfile::tempdir().unwrap();
    let script = "redis-server --bind 127.0.0.1 --port $2 --save '' --dir \"$1\" >/dev/null & read -r _; kill -9 $!; wait";
    let mut server = Command::new("sh");
    server.args(["-c", script, "sh"]).arg(folder.path()).arg(port.to_string());
    let child = server.stdin(Stdio::piped()).spawn().unwrap();
    for _ in 0..2_000 {
        if std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() {
            return Server { port, folder, _child: child };
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("redis-server does not start: is the package redis-server installed?");
}
