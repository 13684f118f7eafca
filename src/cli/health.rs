//! `tollgate health`: requests from a running gateway whether it is ready, for containers without a HTTP client.

mod tls;

use super::{load_or_explain, output};
use crate::clock::Stopwatch;
use anyhow::{Context as _, bail};
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs as _};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// The variable that sets `admin.listen`.
const ADDRESS_VARIABLE: &str = "TOLLGATE__ADMIN__LISTEN";
/// How long the gateway may take to answer.
const MAX_TIME: Duration = Duration::from_secs(3);
/// How long it may take for each piece of its answer.
const MAX_READ_TIME: Duration = Duration::from_secs(2);
/// Maximum bytes of the answer.
const MAX_BYTES: usize = 64 * 1024;
const MAX_HEADERS: usize = 32;

#[derive(clap::Args)]
pub(super) struct HealthArguments {
    /// Asks only whether the process runs (/livez), not whether it is ready (/readyz)
    #[arg(long)]
    live: bool,
    /// Address of the admin listener [default: $TOLLGATE__ADMIN__LISTEN, else admin.listen of the config]
    #[arg(long, value_name = "HOST:PORT", value_parser = first_address)]
    address: Option<SocketAddr>,
}

pub(super) fn run(config: Option<PathBuf>, arguments: &HealthArguments) -> anyhow::Result<ExitCode> {
    let address = match arguments.address.map_or_else(|| configured(config), |address| Ok(Ok(address)))? {
        Ok(address) => reachable(address),
        Err(code) => return Ok(code),
    };
    let path = if arguments.live { "/livez" } else { "/readyz" };
    let (status, body) =
        get(address, path).with_context(|| format!("no gateway answers at {address} (admin.listen)"))?;
    output::print(&body)?;
    Ok(if status == 200 { ExitCode::SUCCESS } else { ExitCode::from(super::FAILED) })
}

/// The first address of a host and port.
fn first_address(text: &str) -> Result<SocketAddr, String> {
    let mut addresses = text.to_socket_addrs().map_err(|error| error.to_string())?;
    addresses.next().ok_or_else(|| "the host has no address".to_owned())
}

/// The address in the config. The variable comes first: the config file may have a fault that a running gateway has
/// refused.
fn configured(config: Option<PathBuf>) -> anyhow::Result<Result<SocketAddr, ExitCode>> {
    if let Ok(text) = std::env::var(ADDRESS_VARIABLE) {
        let address =
            text.parse().with_context(|| format!("{ADDRESS_VARIABLE} is not an address and port: {text}"))?;
        return Ok(Ok(address));
    }
    Ok(load_or_explain(config).map(|loaded| loaded.config.admin.listen))
}

/// A listener at all addresses is reached at a loopback address.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => address.set_ip(Ipv4Addr::LOCALHOST.into()),
        IpAddr::V6(ip) if ip.is_unspecified() => address.set_ip(Ipv6Addr::LOCALHOST.into()),
        _ => {}
    }
    address
}

/// The status and the body of an answer. The listener may have TLS (`admin.tls`), which shows in its first bytes.
fn get(address: SocketAddr, path: &str) -> anyhow::Result<(u16, String)> {
    let began = Stopwatch::start();
    let connect = || -> anyhow::Result<TcpStream> {
        let stream = TcpStream::connect_timeout(&address, MAX_TIME)?;
        stream.set_read_timeout(Some(MAX_READ_TIME))?;
        stream.set_write_timeout(Some(MAX_READ_TIME))?;
        Ok(stream)
    };
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    match exchange(connect()?, &request, &began) {
        Ok(answer) if answer.starts_with(b"HTTP/") => parse(&answer),
        // A listener with TLS answers a plain request with an alert, or closes the connection.
        _ => parse(&exchange(tls::connect(address, connect()?)?, &request, &began)?),
    }
}

/// Sends the request and returns the bytes of the answer.
fn exchange(mut stream: impl Read + Write, request: &str, began: &Stopwatch) -> anyhow::Result<Vec<u8>> {
    stream.write_all(request.as_bytes())?;
    let (mut answer, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        if began.elapsed() > MAX_TIME || answer.len() > MAX_BYTES {
            bail!("the answer is too slow or too long");
        }
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(answer),
            Ok(length) => answer.extend_from_slice(buffer.get(..length).unwrap_or_default()),
            // A connection that is closed without TLS's own end.
            Err(error) if error.kind() == ErrorKind::UnexpectedEof && !answer.is_empty() => {
                return Ok(answer);
            }
            Err(error) => return Err(error.into()),
        }
    }
}

fn parse(answer: &[u8]) -> anyhow::Result<(u16, String)> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_HEADERS];
    let mut head = httparse::Response::new(&mut headers);
    let body = match head.parse(answer)? {
        httparse::Status::Complete(length) => answer.get(length..).unwrap_or_default(),
        httparse::Status::Partial => bail!("the answer is incomplete"),
    };
    Ok((head.code.unwrap_or_default(), String::from_utf8_lossy(body).into_owned()))
}
