//! A gateway in a separate process, for tests of environment variables and of the log.

use super::Caller;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

pub struct Process {
    child: Child,
    pub address: SocketAddr,
    pub admin: SocketAddr,
    log: Arc<Mutex<Vec<String>>>,
    folder: tempfile::TempDir,
}

/// The addresses of both listeners, as the log reports them in either form.
#[derive(Default)]
struct Addresses {
    callers: Option<SocketAddr>,
    admin: Option<SocketAddr>,
}

impl Addresses {
    fn read(&mut self, line: &str) {
        if let Ok(event) = serde_json::from_str::<serde_json::Value>(line) {
            if event["message"] == "serving" {
                self.callers = event["address"].as_str().unwrap().parse().ok();
                self.admin = event["admin"].as_str().unwrap().parse().ok();
            }
            return;
        }
        let word = |name: &str| line.trim().strip_prefix(name)?.trim().strip_prefix("http://");
        let address = |text: &str| text.split('/').next().unwrap().parse().ok();
        self.callers = word("base_url").and_then(address).or(self.callers);
        self.admin = word("admin").and_then(address).or(self.admin);
    }
}

impl Process {
    /// Starts a gateway with these `upstreams` and `environments` (YAML) and these variables.
    pub async fn start(sections: &str, variables: &[(&str, &str)]) -> Self {
        let listeners = "server: { listen: '127.0.0.1:0' }\nadmin: { listen: '127.0.0.1:0' }\n";
        Self::run(&format!("{listeners}{sections}\nstore: {{ memory: true }}\n"), variables).await
    }

    /// Starts a gateway with this config.
    pub async fn of_config(text: &str) -> Self {
        Self::run(text, &[]).await
    }

    async fn run(text: &str, variables: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("t.yaml");
        std::fs::write(&config, text).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_tollgate"))
            .args(["serve", "--config", config.to_str().unwrap()])
            .envs(variables.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let log = Arc::new(Mutex::new(Vec::new()));
        let further = log.clone();
        let (address, admin) = tokio::task::spawn_blocking(move || {
            let mut addresses = Addresses::default();
            let found = loop {
                let line = lines.next().expect("the gateway starts");
                addresses.read(&line);
                further.lock().unwrap().push(line);
                if let Addresses { callers: Some(callers), admin: Some(admin) } = addresses {
                    break (callers, admin);
                }
            };
            // The log pipe must be read, or the gateway blocks when it is full.
            std::thread::spawn(move || lines.for_each(|line| further.lock().unwrap().push(line)));
            found
        })
        .await
        .unwrap();
        Self { child, address, admin, log, folder }
    }

    /// Replaces the config file.
    pub fn write_config(&self, text: &str) {
        std::fs::write(self.folder.path().join("t.yaml"), text).unwrap();
    }

    /// Limits the open files of the process.
    pub fn limit_descriptors(&self, files: usize) {
        let limit = rustix::process::Rlimit { current: Some(files as u64), maximum: Some(files as u64) };
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::prlimit(Some(pid), rustix::process::Resource::Nofile, limit).unwrap();
    }

    /// The process id.
    pub fn id(&self) -> String {
        self.child.id().to_string()
    }

    /// Ends the gateway by a signal, and waits until it has ended.
    pub async fn stop(mut self) -> Vec<String> {
        let status = Command::new("kill").arg(self.id()).status().unwrap();
        assert!(status.success());
        while self.child.try_wait().unwrap().is_none() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        // The thread that reads the pipe ends with it.
        while Arc::strong_count(&self.log) > 1 {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        self.lines()
    }

    /// Waits for a line of JSON in which this field has this value.
    pub async fn log_line(&self, field: &str, value: &str) -> serde_json::Value {
        let is_it = |line: &serde_json::Value| line[field] == value;
        loop {
            if let Some(line) = self.json_lines().into_iter().find(is_it) {
                return line;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    /// Waits for a line with this text.
    pub async fn line_with(&self, text: &str) -> String {
        loop {
            if let Some(line) = self.lines().into_iter().find(|line| line.contains(text)) {
                return line;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    /// All lines so far.
    pub fn lines(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }

    /// All lines of JSON so far.
    pub fn json_lines(&self) -> Vec<serde_json::Value> {
        self.lines().iter().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// All log lines so far, as the gateway wrote them.
    pub fn log_text(&self) -> String {
        self.lines().iter().flat_map(|line| [line, "\n"]).collect()
    }

    pub async fn caller(&self) -> Caller {
        Caller::connect(self.address).await
    }

    pub async fn chat(&self, body: &str) -> super::Reply {
        self.chat_with("", body).await
    }

    /// Sends a chat request with these header lines.
    pub async fn chat_with(&self, headers: &str, body: &str) -> super::Reply {
        let mut caller = self.caller().await;
        caller.request("POST", super::CHAT, headers, body.as_bytes()).await;
        caller.reply().await
    }

    pub async fn admin_get(&self, target: &str) -> super::Reply {
        super::gateway::admin_get_at(self.admin, target).await
    }

    /// Sends a request to the admin listener.
    pub async fn admin_send(&self, method: &str, target: &str, body: &str) -> super::Reply {
        let mut caller = Caller::connect(self.admin).await;
        let head = format!(
            "{method} {target} HTTP/1.1\r\nhost: {}\r\ncontent-length: {}\r\n\r\n",
            self.admin,
            body.len()
        );
        caller.send(format!("{head}{body}").as_bytes()).await;
        caller.reply().await
    }

    /// Waits until no request is in flight and returns requests, prompt, completion and total tokens charged.
    pub async fn settled_charges(&self) -> [u64; 4] {
        super::gateway::settled_at(self.admin).await;
        super::gateway::charged_at(self.admin).await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
