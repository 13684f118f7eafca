//! SIGUSR2: this process starts the program that is installed now, which then replaces it.
//!
//! Under a service manager this is the way to upgrade without a gap. A process that an administrator starts would not
//! belong to the service.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::{env, io, thread};

/// The program of this process.
#[derive(Debug)]
pub(in crate::cli) struct Program {
    file: PathBuf,
}

impl Program {
    /// The file of the running program. `None`: the system does not name it. A later upgrade may replace the file.
    pub(super) fn current() -> Option<Self> {
        env::current_exe().ok().map(|file| Self { file })
    }

    /// Starts the program with the arguments of this process. The outcome is logged.
    pub(super) fn start(&self) {
        if std::process::id() == 1 {
            tracing::warn!(
                "SIGUSR2 has no effect: this is process 1 of a container, which would end with it; start a new container"
            );
            return;
        }
        match self.spawn() {
            Ok(pid) => {
                tracing::info!(pid, program = %self.file.display(), "started a new process to replace this one")
            }
            Err(error) => {
                tracing::error!(%error, program = %self.file.display(), "no new process could be started: this one continues");
            }
        }
    }

    fn spawn(&self) -> io::Result<u32> {
        let mut child = Command::new(&self.file)
            .args(env::args_os().skip(1))
            // The watchdog of the service applies to the new process too.
            .env_remove("WATCHDOG_PID")
            .stdin(Stdio::null())
            .spawn()?;
        let pid = child.id();
        // If the new process fails, its end must be noticed. Otherwise this process ends first.
        thread::Builder::new().name("successor".into()).spawn(move || match child.wait() {
            Ok(status) => tracing::warn!(pid, %status, "the process that was to replace this one has ended"),
            Err(error) => {
                tracing::warn!(pid, %error, "the process that was to replace this one cannot be observed")
            }
        })?;
        Ok(pid)
    }
}
