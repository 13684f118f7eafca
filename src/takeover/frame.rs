//! Messages on the control socket: a length of four bytes, and JSON.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{self, ErrorKind, Read, Write};
use tokio::io::{AsyncRead, AsyncReadExt as _};

/// Maximum bytes of a message.
const MAX_BYTES: u32 = 64 * 1024 * 1024;

/// The bytes of a message.
pub(super) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; 4];
    serde_json::to_writer(&mut bytes, message)?;
    let length = u32::try_from(bytes.len() - 4).ok().filter(|length| *length <= MAX_BYTES);
    let length = length.ok_or_else(|| io::Error::new(ErrorKind::InvalidData, "a message is too large"))?;
    bytes.splice(..4, length.to_be_bytes());
    Ok(bytes)
}

/// Writes a message.
pub(super) fn write(mut to: impl Write, message: &impl Serialize) -> io::Result<()> {
    to.write_all(&encode(message)?)
}

/// Reads a message.
pub(super) fn read<T: DeserializeOwned>(mut from: impl Read) -> io::Result<T> {
    let mut length = [0; 4];
    from.read_exact(&mut length)?;
    let mut bytes = vec![0; checked(length)?];
    from.read_exact(&mut bytes)?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Reads a message. Dropping the future may lose a part of it.
pub(super) async fn receive<T: DeserializeOwned>(from: &mut (impl AsyncRead + Unpin)) -> io::Result<T> {
    let mut length = [0; 4];
    from.read_exact(&mut length).await?;
    let mut bytes = vec![0; checked(length)?];
    from.read_exact(&mut bytes).await?;
    Ok(serde_json::from_slice(&bytes)?)
}

fn checked(length: [u8; 4]) -> io::Result<usize> {
    let length = u32::from_be_bytes(length);
    if length > MAX_BYTES {
        return Err(io::Error::new(ErrorKind::InvalidData, "a message is too large"));
    }
    usize::try_from(length).map_err(|_| ErrorKind::InvalidData.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_they_were_written_and_others_are_faults() {
        let mut bytes = encode(&("one", 1)).unwrap();
        bytes.extend(encode(&("two", 2)).unwrap());
        let mut from = bytes.as_slice();
        assert_eq!(read::<(String, u64)>(&mut from).unwrap(), ("one".to_owned(), 1));
        assert_eq!(read::<(String, u64)>(&mut from).unwrap(), ("two".to_owned(), 2));
        assert_eq!(read::<u64>(&mut from).unwrap_err().kind(), ErrorKind::UnexpectedEof);
        assert!(read::<u64>(&[0xff; 8][..]).unwrap_err().to_string().contains("too large"));
        assert!(read::<u64>(&[0, 0, 0, 1, b'x'][..]).is_err());
    }
}
