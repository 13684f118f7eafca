//! Output of commands. A reader may close the pipe early, as `head` does.

use std::io::{self, Write as _};

/// Writes to standard output. The error `BrokenPipe` ends a command without a message.
///
/// # Errors
/// Standard output cannot be written.
pub(super) fn print(text: &str) -> io::Result<()> {
    let mut output = io::stdout().lock();
    output.write_all(text.as_bytes())?;
    output.flush()
}

/// Writes a line to standard error, if that is possible.
pub(super) fn report(text: &str) {
    // There is nowhere else to report a failure.
    let _ = writeln!(io::stderr(), "{text}");
}

/// Writes whole lines to standard error, if that is possible.
pub(super) fn report_all(text: &str) {
    let _ = io::stderr().write_all(text.as_bytes());
}

/// Whether a command failed only because the reader of its output closed the pipe.
pub(super) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let io_error = |cause: &(dyn std::error::Error + 'static)| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
    };
    error.chain().any(io_error)
}
