//! Processes of the gateway that follow each other at one address.

use super::http::{MAX_WAIT, get};
use super::port::free_port;
use serde_json::Value;
use std::fs::{self, File};
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The folder, the ports and the config that the processes share.
pub struct Place {
    pub folder: tempfile::TempDir,
    pub port: u16,
    pub admin: u16,
    started: AtomicUsize,
}

pub struct Process {
    pub child: Child,
    log: PathBuf,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Place {
    /// Writes a config. `server`: further settings of the server. `environment`: settings of the environment. `store`: the
    /// settings of the store; `@` stands for the folder.
    pub fn new(upstream: u16, server: &str, environment: &str, store: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (port, admin) = (free_port(), free_port());
        let place = Self { folder, port, admin, started: AtomicUsize::new(0) };
        place.write("t.yaml", &place.config(port, admin, upstream, (server, environment, store)));
        place
    }

    pub fn config(
        &self,
        port: u16,
        admin: u16,
        upstream: u16,
        (server, environment, store): (&str, &str, &str),
    ) -> String {
        let store = store.replace('@', &self.folder.path().display().to_string());
        format!(
            "server: {{ listen: '127.0.0.1:{port}', flood_guard: 0, {server} }}\nadmin: {{ listen: '127.0.0.1:{admin}' }}\n\
             upstreams: {{ u: {{ base_url: 'http://127.0.0.1:{upstream}/v1' }} }}\n\
             environments: {{ e: {{ upstream: u, {environment} }} }}\ndefault_environment: e\nstore: {{ {store} }}\n"
        )
    }

    /// Gives the upstream a limit that refuses nothing, so that it has an account and a usage history.
    pub fn limit_upstream(&self) {
        let text = fs::read_to_string(self.folder.path().join("t.yaml")).unwrap();
        let limited = text.replace("/v1' } }", "/v1', max_in_flight: 100000 } }");
        assert_ne!(limited, text);
        self.write("t.yaml", &limited);
    }

    /// Waits until the usage history of the upstream has this many tokens.
    pub fn wait_for_upstream_usage(&self, tokens: u64) {
        let began = Instant::now();
        loop {
            let report = get(self.admin, "/api/usage?upstream=u&step=day&from=2d&to=2099-01-01").unwrap();
            let report: Value = serde_json::from_slice(&report.body).unwrap();
            let rows = report["rows"].as_array().unwrap();
            if rows.iter().map(|row| row["total_tokens"].as_u64().unwrap()).sum::<u64>() == tokens {
                return;
            }
            assert!(began.elapsed() < MAX_WAIT, "not {tokens} tokens: {report:#}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub fn write(&self, name: &str, text: &str) {
        fs::write(self.folder.path().join(name), text).unwrap();
    }

    /// Starts a process and does not wait for it.
    pub fn spawn(&self, config: &str) -> Process {
        self.spawn_with(config, &[])
    }

    /// Starts a process with further environment variables and does not wait for it.
    pub fn spawn_with(&self, config: &str, variables: &[(&str, &str)]) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
        command.args(["serve", "--config"]).arg(self.folder.path().join(config));
        command.envs(variables.iter().copied()).stdin(Stdio::null());
        self.run(command)
    }

    /// Starts a process that may open this many files, and does not wait for it.
    pub fn spawn_with_max_files(&self, max: u32) -> Process {
        let mut command = Command::new("bash");
        let serve = r#"ulimit -n "$1" && exec "$0" serve --config "$2""#;
        command.args(["-c", serve, env!("CARGO_BIN_EXE_tollgate"), &max.to_string()]);
        command.arg(self.folder.path().join("t.yaml")).stdin(Stdio::null());
        self.run(command)
    }

    /// Starts a process with this socket for callers, as a service manager does, and waits until it serves.
    pub fn start_with_socket(&self, socket: &TcpListener) -> Process {
        let mut command = Command::new("bash");
        let serve = r#"exec 3<&0 </dev/null; LISTEN_FDS=1 LISTEN_FDNAMES=callers LISTEN_PID=$$ exec "$0" serve --config "$1""#;
        command.args(["-c", serve, env!("CARGO_BIN_EXE_tollgate")]).arg(self.folder.path().join("t.yaml"));
        command.stdin(OwnedFd::from(socket.try_clone().unwrap()));
        let mut process = self.run(command);
        process.wait_for("\"serving\"");
        process
    }

    fn run(&self, mut command: Command) -> Process {
        let number = self.started.fetch_add(1, Ordering::Relaxed);
        let log = self.folder.path().join(format!("{number}.log"));
        let output = File::create(&log).unwrap();
        let child = command
            .env("RUST_LOG", "info")
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        Process { child, log }
    }

    /// Starts a process and waits until it serves.
    pub fn start(&self) -> Process {
        let mut process = self.spawn("t.yaml");
        process.wait_for("\"serving\"");
        process
    }

    pub fn environment(&self) -> Value {
        let all: Value = serde_json::from_slice(&get(self.admin, "/api/environments").unwrap().body).unwrap();
        all["environments"][0].clone()
    }

    /// Waits until nothing is in flight, and returns the environment.
    pub fn settled(&self) -> Value {
        let began = Instant::now();
        loop {
            let environment = self.environment();
            let is_held = |quota: &Value| quota["held"] != 0;
            if environment["in_flight"] == 0 && !environment["quotas"].as_array().unwrap().iter().any(is_held)
            {
                return environment;
            }
            assert!(began.elapsed() < MAX_WAIT, "requests stay in flight: {environment:#}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Process {
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    pub fn wait_for(&mut self, text: &str) {
        let began = Instant::now();
        while !self.log().contains(text) {
            let has_ended = self.child.try_wait().unwrap().is_some() && !self.log().contains(text);
            assert!(!has_ended && began.elapsed() < MAX_WAIT, "no {text}: {}", self.log());
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until the process has ended, and returns its exit code.
    pub fn exit_code(&mut self, max_wait: Duration) -> Option<i32> {
        let began = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(began.elapsed() < max_wait, "the process does not end: {}", self.log());
            thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn terminate(&self) {
        assert!(Command::new("kill").arg(self.child.id().to_string()).status().unwrap().success());
    }
}
