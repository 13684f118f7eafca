//! A gateway in a separate process, for tests of environment variables.

use super::Caller;
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

pub struct Process {
    child: Child,
    pub address: SocketAddr,
    pub admin: SocketAddr,
    log: Arc<Mutex<Vec<serde_json::Value>>>,
    folder: tempfile::TempDir,
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
        let serving = tokio::task::spawn_blocking(move || {
            let line = lines.find(|line| line.contains("\"serving\"")).unwrap();
            // The log pipe must be read, or the gateway blocks when it is full.
            std::thread::spawn(move || {
                lines.for_each(|line| further.lock().unwrap().push(serde_json::from_str(&line).unwrap()));
            });
            serde_json::from_str::<serde_json::Value>(&line).unwrap()
        })
        .await
        .unwrap();
        let address = |name: &str| serving[name].as_str().unwrap().parse().unwrap();
        Self { child, address: address("address"), admin: address("admin"), log, folder }
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

    /// Waits for a log line in which this field has this value.
    pub async fn log_line(&self, field: &str, value: &str) -> serde_json::Value {
        loop {
            if let Some(line) = self.log.lock().unwrap().iter().find(|line| line[field] == value) {
                return line.clone();
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    }

    /// All log lines so far, as the gateway wrote them.
    pub fn log_text(&self) -> String {
        self.log.lock().unwrap().iter().flat_map(|line| [line.to_string(), "\n".to_owned()]).collect()
    }

    pub async fn caller(&self) -> Caller {
        Caller::connect(self.address).await
    }

    pub async fn chat(&self, body: &str) -> super::Reply {
        let mut caller = self.caller().await;
        caller.request("POST", super::CHAT, "", body.as_bytes()).await;
        caller.reply().await
    }

    pub async fn admin_get(&self, target: &str) -> super::Reply {
        super::gateway::admin_get_at(self.admin, target).await
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
