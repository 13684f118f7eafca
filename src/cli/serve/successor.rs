//! SIGUSR2: this process starts the program that is installed now, which then replaces it.
//!
//! Under a service manager this is the way to upgrade without a gap. A process that an administrator starts would not
//! belong to the service.
//!
//! The new process must not be a child of this one. systemd waits only for the end of its own children: at a later stop it
//! would kill any other main process at once. Therefore an intermediate process starts the new one and ends, and the new
//! one gets the service manager as its parent.

use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::{env, io, thread};

/// Set for the intermediate process.
const INTERMEDIATE: &str = "TOLLGATE_START_AND_EXIT";

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

    /// Whether this process is the intermediate one.
    pub(super) fn is_intermediate() -> bool {
        env::var_os(INTERMEDIATE).is_some()
    }

    /// Starts the new process. The intermediate process calls this and then ends.
    pub(super) fn start(&self) -> io::Result<ExitCode> {
        let mut command = self.command();
        // The watchdog of the service applies to the new process too.
        command.env_remove(INTERMEDIATE).env_remove("WATCHDOG_PID").spawn()?;
        Ok(ExitCode::SUCCESS)
    }

    /// Starts the program as the successor of this process, with the arguments of this process. What it does is logged.
    pub(super) fn start_successor(&self) {
        let program = self.file.display();
        if std::process::id() == 1 {
            tracing::warn!(
                "SIGUSR2 has no effect: this is process 1 of a container, which would end with it; start a new container"
            );
            return;
        }
        let started = self.command().env(INTERMEDIATE, "1").spawn().and_then(observe);
        match started {
            Ok(()) => tracing::info!(%program, "starting a new process to replace this one"),
            Err(error) => {
                tracing::error!(%error, %program, "no new process could be started: this one continues");
            }
        }
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.file);
        command.args(env::args_os().skip(1)).stdin(Stdio::null());
        command
    }
}

/// Waits for the end of the intermediate process in a thread.
fn observe(mut intermediate: Child) -> io::Result<()> {
    let wait = move || match intermediate.wait() {
        Ok(status) if status.success() => {}
        Ok(status) => tracing::error!(%status, "no new process could be started: this one continues"),
        Err(error) => tracing::error!(%error, "it is unknown whether a new process was started"),
    };
    thread::Builder::new().name("successor".into()).spawn(wait)?;
    Ok(())
}
