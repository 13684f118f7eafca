//! The gateway as a process whose instructions or allocations are counted.

#[path = "../../tests/common/port.rs"]
mod port;

use crate::exchange::{Exchange, KEY, ROUTED_KEY};
use port::free_port;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// The gateway takes some seconds to start under callgrind.
const MAX_START: Duration = Duration::from_mins(2);

pub(crate) struct Gateway {
    process: Child,
    address: SocketAddr,
    folder: TempDir,
    counters: Counters,
}

enum Counters {
    Allocations(BufReader<ChildStdout>),
    Instructions,
}

impl Drop for Gateway {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Gateway {
    /// Whether instructions can be counted.
    pub(crate) fn has_valgrind() -> bool {
        Command::new("valgrind").arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok()
    }

    /// This binary as the gateway. Its counters: allocations, bytes allocated.
    pub(crate) fn counting_allocations(exchange: &Exchange) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        let mut gateway = Self::start(&mut command, exchange);
        let stdout = gateway.process.stdout.take().unwrap();
        gateway.counters = Counters::Allocations(BufReader::new(stdout));
        gateway
    }

    /// The gateway's binary under callgrind, or the one that `TOLLGATE_BIN` names. The first counter is the number of
    /// instructions, the second stays 0.
    pub(crate) fn in_callgrind(exchange: &Exchange) -> Self {
        let program =
            std::env::var_os("TOLLGATE_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_tollgate").into());
        let mut command = Command::new("valgrind");
        command.args(["--tool=callgrind", "--callgrind-out-file=callgrind", "--quiet"]).arg(program);
        Self::start(&mut command, exchange)
    }

    fn start(command: &mut Command, exchange: &Exchange) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let [address, admin] =
            [free_port(), free_port()].map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
        let quota = "{ limit: 1000000G, per: minute }";
        let pair = format!("[{quota}, {{ limit: 1000000G, per: day }}]");
        let quotas = format!(
            "{{ total_tokens: {pair}, prompt_tokens: {pair}, completion_tokens: {pair}, requests: {pair} }}"
        );
        let of_upstream = format!(
            "{{ total_tokens: {quota}, prompt_tokens: {quota}, completion_tokens: {quota}, requests: {quota} }}"
        );
        let base_url = format!("base_url: 'http://{}/v1', api_key: sk-upstream", exchange.address());
        let config = format!(
            "server: {{ listen: '{address}', flood_guard: {{ requests: 0, per: second }} }}\n\
             admin: {{ listen: '{admin}' }}\n\
             upstreams:\n  mock: {{ {base_url} }}\n  limited: {{ {base_url}, quotas: {of_upstream} }}\n\
             environments:\n  production: {{ upstream: mock, keys: [{{ name: bench, secret: {KEY} }}], quotas: {quotas} }}\n  \
             routed: {{ upstream: mock, keys: [{{ name: bench, secret: {ROUTED_KEY} }}], quotas: {quotas}, \
             routes: [{{ models: ['gpt-4o*'], upstream: [limited, mock] }}] }}\n\
             store: {{ memory: true }}\n"
        );
        fs::write(folder.path().join("config.yaml"), config).unwrap();
        let log = fs::File::create(folder.path().join("log")).unwrap();
        command.args(["serve", "--config", "config.yaml"]).current_dir(folder.path());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log);
        let process = command.spawn().unwrap();
        let mut gateway = Self { process, address, folder, counters: Counters::Instructions };
        gateway.wait_until_it_listens();
        gateway
    }

    fn wait_until_it_listens(&mut self) {
        let until = Instant::now() + MAX_START;
        while TcpStream::connect(self.address).is_err() {
            let ended = self.process.try_wait().unwrap();
            let log = || fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(
                ended.is_none() && Instant::now() < until,
                "the gateway does not start: {ended:?}\n{}",
                log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The counts since the start.
    pub(crate) fn counters(&mut self) -> [f64; 2] {
        // The last request is settled and logged after its answer.
        std::thread::sleep(Duration::from_millis(200));
        match &mut self.counters {
            Counters::Allocations(stdout) => {
                writeln!(self.process.stdin.as_mut().unwrap()).unwrap();
                let mut line = String::new();
                stdout.read_line(&mut line).unwrap();
                let mut numbers = line.split_whitespace().map(|number| number.parse().unwrap());
                [numbers.next().unwrap(), numbers.next().unwrap()]
            }
            Counters::Instructions => {
                let dumped = Command::new("callgrind_control")
                    .args(["--dump", &self.process.id().to_string()])
                    .current_dir(self.folder.path())
                    .output()
                    .unwrap();
                assert!(dumped.status.success(), "callgrind_control: {dumped:?}");
                [instructions(self.folder.path()), 0.0]
            }
        }
    }
}

/// The instructions of all dumps so far.
fn instructions(folder: &std::path::Path) -> f64 {
    let dumps = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let dumps = dumps.filter(|path| path.file_name().unwrap().to_string_lossy().starts_with("callgrind."));
    let total = |path: std::path::PathBuf| -> f64 {
        let text = fs::read_to_string(path).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("totals: ")).unwrap();
        line.trim().parse().unwrap()
    };
    dumps.map(total).sum()
}
