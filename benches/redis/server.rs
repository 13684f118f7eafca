//! A Redis server on a loopback port.

use crate::port::free_port;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

pub struct Server {
    child: Option<Child>,
    pub port: u16,
    folder: tempfile::TempDir,
}

impl Server {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let mut server = Self { child: None, port, folder };
        server.restart();
        server
    }

    /// Starts the server on the same port, without data.
    pub fn restart(&mut self) {
        let child = Command::new("redis-server")
            .args(["--bind", "127.0.0.1", "--port", &self.port.to_string(), "--save", "", "--dir"])
            .arg(self.folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("redis-server cannot be started ({error}): is it installed?"));
        self.child = Some(child);
        let begun = Instant::now();
        while self.connect().is_none() {
            assert!(begun.elapsed() < Duration::from_secs(10), "redis-server does not answer");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            drop(child.kill());
            drop(child.wait());
        }
    }

    pub fn connect(&self) -> Option<redis::Connection> {
        redis::Client::open(format!("redis://127.0.0.1:{}/", self.port)).ok()?.get_connection().ok()
    }

    /// Microseconds that the server itself took for a call of the script, on average since the last reset.
    pub fn time_per_call(&self) -> String {
        let info: String =
            redis::cmd("INFO").arg("commandstats").query(&mut self.connect().unwrap()).unwrap();
        let line = info.lines().find(|line| line.starts_with("cmdstat_evalsha:")).unwrap_or_default();
        let field = line.split(',').find_map(|field| field.strip_prefix("usec_per_call="));
        field.unwrap_or("?").to_owned()
    }

    pub fn reset_statistics(&self) {
        let (): () = redis::cmd("CONFIG").arg("RESETSTAT").query(&mut self.connect().unwrap()).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}
