//! Answers in every framing of HTTP/1.1, sent in pieces that are cut at given positions.

use super::{Answer, Step};

/// How the end of a body is marked.
#[derive(Clone, Copy, Debug)]
pub enum Framing {
    Length,
    Chunks,
    UntilClosed,
}

/// The header line `content-type` with this media type.
pub fn of_type(kind: &str) -> String {
    format!("content-type: {kind}\r\n")
}

/// An answer with these header lines. Its body is sent in pieces, cut at the positions `cuts`.
pub fn framed(status: u16, headers: &str, body: &[u8], framing: Framing, mut cuts: Vec<usize>) -> Answer {
    cuts.sort_unstable();
    let field = match framing {
        Framing::Length => format!("content-length: {}\r\n", body.len()),
        Framing::Chunks => "transfer-encoding: chunked\r\n".to_owned(),
        Framing::UntilClosed => String::new(),
    };
    let mut answer =
        Answer::of(vec![Step::Send(format!("HTTP/1.1 {status} Some\r\n{headers}{field}\r\n").into())]);
    let mut from = 0;
    for cut in cuts.into_iter().chain([body.len()]) {
        let cut = cut.clamp(from, body.len());
        let piece = &body[from..cut];
        from = cut;
        if piece.is_empty() {
            continue;
        }
        answer = answer.then(Step::Send(match framing {
            Framing::Chunks => [format!("{:x}\r\n", piece.len()).as_bytes(), piece, b"\r\n"].concat(),
            _ => piece.to_vec(),
        }));
    }
    match framing {
        Framing::Length => answer,
        Framing::Chunks => answer.end(),
        Framing::UntilClosed => answer.then(Step::Cut),
    }
}
