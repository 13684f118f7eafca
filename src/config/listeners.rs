//! `server` and `admin`: the two listeners.

use super::setting::{Section, Setting};
use super::tree::YamlValue;
use super::{AdminSettings, FloodGuard, ServerSettings, TlsFiles, units};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

/// Reads the settings of both listeners and checks that they fit together.
pub(super) fn read(top: &Section<'_>) -> (ServerSettings, AdminSettings) {
    let (server, admin) = (server(top), admin(top));
    check_addresses(top, &server, &admin);
    (server, admin)
}

fn check_addresses(top: &Section<'_>, server: &ServerSettings, admin: &AdminSettings) {
    let listen = |name: &str| match top.get(name)?.node.value {
        YamlValue::Map(_) => top.get(name)?.map("a mapping")?.get("listen"),
        _ => None,
    };
    if server.listen == admin.listen
        && server.listen.port() != 0
        && let Some(setting) = listen("admin").or_else(|| listen("server"))
    {
        setting.fault("server.listen and admin.listen are the same address; set different ports");
    }
    if !admin.listen.ip().is_loopback()
        && admin.token.is_none()
        && let Some(setting) = listen("admin")
    {
        setting.fault(
            "other machines can reach this address, so admin.token must be set, for example to \
             ${TOLLGATE_ADMIN_TOKEN}; or listen on 127.0.0.1",
        );
    }
}

/// An address with its port; `port` on 127.0.0.1 if the setting is absent.
fn address(setting: Option<Setting<'_>>, port: u16) -> SocketAddr {
    let expected = "an address and port, such as 127.0.0.1:8080 or [::]:8080";
    let address = setting.and_then(|setting| setting.parsed(|text| text.parse().ok(), expected));
    address.unwrap_or_else(|| SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
}

fn server(top: &Section<'_>) -> ServerSettings {
    let section =
        top.section("server", &["listen", "max_request_body", "flood_guard", "drain_timeout", "tls"]);
    ServerSettings {
        listen: address(section.get("listen"), 8080),
        max_request_body: section.get("max_request_body").and_then(|s| body_size(&s)).unwrap_or(32 << 20),
        flood_guard: match section.get("flood_guard") {
            None => Some(FloodGuard { requests: 1_000, per: Duration::from_secs(1), guards_loopback: false }),
            Some(setting) => flood_guard(&setting),
        },
        drain_timeout: section
            .get("drain_timeout")
            .and_then(|s| s.duration())
            .unwrap_or(Duration::from_secs(30)),
        tls: section.get("tls").and_then(|s| tls_files(&s)),
    }
}

fn body_size(setting: &Setting<'_>) -> Option<usize> {
    let size = setting.size()?;
    if size == 0 {
        setting.fault("0 would refuse every request that has a body");
    }
    Some(size)
}

/// `0`, or `{ requests, per }`.
fn flood_guard(setting: &Setting<'_>) -> Option<FloodGuard> {
    if let YamlValue::Scalar(_) = setting.node.value {
        setting.parsed(|text| (text == "0").then_some(()), "0 (off) or { requests: 1000, per: second }")?;
        return None;
    }
    let section = setting.section(&["requests", "per"])?;
    let whole = |text: &str| units::amount(text).and_then(|n| u32::try_from(n).ok());
    let requests =
        section.get("requests").map_or(Some(1_000), |s| s.parsed(whole, "a number of requests"))?;
    let per = section.get("per").map_or(Some(Duration::from_secs(1)), |s| s.duration())?;
    if per.is_zero() {
        section.fault("\"per\" must not be 0; flood_guard: 0 turns the guard off");
    }
    (requests > 0).then_some(FloodGuard { requests, per, guards_loopback: true })
}

fn tls_files(setting: &Setting<'_>) -> Option<TlsFiles> {
    let section = setting.section(&["cert", "key"])?;
    let file = |name, example| section.require(name, example).and_then(|s| s.path());
    let (cert, key) = (file("cert", "cert.pem"), file("key", "key.pem"));
    Some(TlsFiles { cert: cert?, key: key? })
}

fn admin(top: &Section<'_>) -> AdminSettings {
    let section = top.section("admin", &["listen", "token"]);
    AdminSettings {
        listen: address(section.get("listen"), 9090),
        token: section.get("token").and_then(|s| s.secret()),
    }
}
