//! Runs the command line program.

use std::io::Write as _;
use std::process::{Command, Stdio};

/// A command that runs `tollgate` with piped input and output.
pub fn tollgate(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tollgate"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.current_dir(env!("CARGO_MANIFEST_DIR"));
    command
}

/// Runs `tollgate` and returns exit code, standard output and standard error.
pub fn run(arguments: &[&str], input: &str) -> (i32, String, String) {
    let mut child = tollgate(arguments).spawn().unwrap();
    // The write fails if the program exits before it reads, for example because of wrong arguments.
    drop(child.stdin.take().unwrap().write_all(input.as_bytes()));
    let output = child.wait_with_output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}
