//! The processes of the compared proxies, and their CPU time.

#[path = "../../tests/common/port.rs"]
mod port;

use crate::bodies::KEY;
use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// A running process; it is killed when dropped.
pub(crate) struct Peer {
    pub(crate) name: String,
    process: Child,
}

impl Drop for Peer {
    fn drop(&mut self) {
        // SIGTERM first: after a SIGKILL of the nginx master, its workers would survive.
        let _ = Command::new("kill").arg(self.process.id().to_string()).status();
        std::thread::sleep(Duration::from_millis(50));
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A free loopback address.
pub(crate) fn free_address() -> SocketAddr {
    ([127, 0, 0, 1], port::free_port()).into()
}

/// Starts the peer with this name.
pub(crate) fn start(
    name: &str,
    address: SocketAddr,
    upstream: SocketAddr,
    folder: &Path,
) -> Result<Peer, String> {
    match name {
        "nginx" => nginx(address, upstream, folder),
        "tollgate" | "tollgate-multi" | "tollgate-other" => tollgate(name, address, upstream, folder),
        "pool" | "pool-percore" | "reqwest" => {
            Ok(Peer::this_binary(name, name, &[address.to_string(), upstream.to_string()]))
        }
        _ => Err("there is no peer with this name".to_owned()),
    }
}

fn tollgate(name: &str, address: SocketAddr, upstream: SocketAddr, folder: &Path) -> Result<Peer, String> {
    let config = folder.join(format!("{name}.yaml"));
    let quota = "[{ limit: 1000000G, per: minute }, { limit: 1000000G, per: day }]";
    let text = format!(
        "server: {{ listen: '{address}' }}\nadmin: {{ listen: '{}' }}\nupstreams: {{ mock: {{ base_url: 'http://{upstream}/v1', api_key: sk-upstream }} }}\n\
         environments:\n  production:\n    upstream: mock\n    keys: [{{ name: bench, secret: {KEY} }}]\n    quotas: {{ total_tokens: {quota}, prompt_tokens: {quota}, completion_tokens: {quota}, requests: {quota} }}\n\
         store: {{ memory: true }}\n",
        free_address()
    );
    fs::write(&config, text).unwrap();
    let log = File::create(folder.join(format!("{name}.log"))).unwrap();
    let program = match std::env::var_os("TOLLGATE_OTHER") {
        Some(other) if name == "tollgate-other" => other,
        None if name == "tollgate-other" => return Err("TOLLGATE_OTHER names no binary".to_owned()),
        _ => std::env::var_os("TOLLGATE_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_tollgate").into()),
    };
    let mut command = Command::new(program);
    command.args(["serve", "--config"]).arg(config).stderr(log);
    if name == "tollgate-multi" {
        command.env("TOLLGATE_RUNTIME", "multi");
    }
    Peer::spawn(name, &mut command)
}

fn nginx(address: SocketAddr, upstream: SocketAddr, folder: &Path) -> Result<Peer, String> {
    let (config, here) = (folder.join("nginx.conf"), folder.display());
    let text = format!(
        "daemon off; worker_processes 2; pid {here}/nginx.pid; error_log {here}/nginx.log warn;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; client_body_buffer_size 128k;\n\
         client_body_temp_path {here}/b; proxy_temp_path {here}/p; fastcgi_temp_path {here}/f; uwsgi_temp_path {here}/u; scgi_temp_path {here}/s;\n\
         upstream mock {{ server {upstream}; keepalive 1024; keepalive_requests 1000000000; }}\n\
         server {{ listen {address} reuseport; location / {{ proxy_pass http://mock; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_buffering off; }} }} }}\n"
    );
    fs::write(&config, text).unwrap();
    let path = if Path::new("/usr/sbin/nginx").exists() { "/usr/sbin/nginx" } else { "nginx" };
    Peer::spawn("nginx", Command::new(path).arg("-c").arg(config).stderr(Stdio::null()))
}

impl Peer {
    /// Starts this binary in another role.
    pub(crate) fn this_binary(name: &str, role: &str, arguments: &[String]) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        Self::spawn(name, command.args(["--role", role]).args(arguments)).unwrap()
    }

    fn spawn(name: &str, command: &mut Command) -> Result<Self, String> {
        let process =
            command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().map_err(|e| e.to_string())?;
        Ok(Self { name: name.to_owned(), process })
    }

    /// Waits until the process accepts connections.
    pub(crate) fn ready(mut self, address: SocketAddr) -> Result<Self, String> {
        let until = Instant::now() + Duration::from_secs(10);
        while Instant::now() < until {
            if let Ok(Some(status)) = self.process.try_wait() {
                return Err(format!("the process ended with {status}"));
            }
            if TcpStream::connect(address).is_ok() {
                return Ok(self);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Err("the process does not accept connections".to_owned())
    }

    /// Resident memory in bytes.
    pub(crate) fn resident(&self) -> u64 {
        resident_of_process(self.process.id())
    }

    /// User and system time so far, of all threads and child processes (nginx's workers).
    pub(crate) fn cpu(&self) -> Duration {
        let processes = [self.process.id()].into_iter().chain(children(self.process.id()));
        Duration::from_nanos(processes.map(cpu_of_process).sum())
    }
}

/// Resident memory of a process in bytes.
fn resident_of_process(process: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{process}/status")).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|l| l.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
}

fn children(process: u32) -> Vec<u32> {
    let list = fs::read_to_string(format!("/proc/{process}/task/{process}/children")).unwrap_or_default();
    list.split_whitespace().filter_map(|id| id.parse().ok()).collect()
}

/// User and system time of a process in nanoseconds, including ended threads. The kernel's resolution is 10 ms.
fn cpu_of_process(process: u32) -> u64 {
    const NS_PER_TICK: u64 = 10_000_000;
    let text = fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    // The second field, the process name in parentheses, may contain spaces.
    let fields = text.rsplit(')').next().unwrap_or_default();
    let ticks = fields.split_whitespace().skip(11).take(2).filter_map(|n| n.parse::<u64>().ok());
    ticks.sum::<u64>() * NS_PER_TICK
}
