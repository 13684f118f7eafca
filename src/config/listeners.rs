//! `server` and `admin`: the two listeners.

use super::description::{
    ADDRESS, DefaultSpec, KeySpec, NONE, PATH, SECRET, SectionSpec, TextSpec, ValueSpec, Word,
};
use super::setting::{Section, Setting};
use super::tree::YamlValue;
use super::{AddressBound, AdminSettings, FloodGuard, ServerSettings, TlsFiles, TlsLocations, units};
use ipnet::IpNet;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

pub(super) const SERVER: SectionSpec = SectionSpec {
    name: "server",
    keys: &[
        KeySpec::new(
            "listen",
            ADDRESS,
            DefaultSpec::Value("127.0.0.1:8080"),
            "address of the listener for callers; it must differ from `admin.listen`",
        )
        .example("0.0.0.0:8080")
        .fixed(),
        KeySpec::new(
            "max_request_body",
            ValueSpec::Size,
            DefaultSpec::Value("32MiB"),
            "a larger body gets a 413",
        )
        .example("8MiB"),
        KeySpec::new(
            "drain_delay",
            ValueSpec::Duration,
            DefaultSpec::Value("0s"),
            "after SIGTERM the gateway still accepts connections and serves requests for this time, and closes each connection after its answer ([operations.md](operations.md#shutdown)). `/readyz` answers 503 at once. Set it if a load balancer needs time to detect that, for example 5 s in Kubernetes",
        )
        .example("5s"),
        KeySpec::new(
            "drain_timeout",
            ValueSpec::Duration,
            DefaultSpec::Value("30s"),
            "at shutdown, answers in flight may end within this time; then the gateway ends them with the error `shutting_down`",
        )
        .example("2m"),
        KeySpec::new(
            "flood_guard",
            ValueSpec::Either(&[
                ValueSpec::Section(&FLOOD_GUARD),
                ValueSpec::Words(&[Word("0", "turns the guard off")]),
            ]),
            DefaultSpec::Absent("1,000 a second, but not for addresses of this machine"),
            "maximum rate of requests per peer address (IPv6: per /64). The gateway checks it before it reads a request; further requests get a 429",
        )
        .example("{ requests: 5000, per: second }"),
        KeySpec::new(
            "trusted_proxies",
            ValueSpec::List(&NETWORK),
            NONE,
            "networks of proxies in front of the gateway, such as `10.0.0.0/8`. If a request comes from one of them, the last address of its `X-Forwarded-For` that is not in these networks is the caller's address, for the flood guard, the log and the estimates. Without this key, and from any other address, the header is ignored",
        )
        .example("[10.0.0.0/8]"),
        KeySpec::new(
            "tls",
            ValueSpec::Section(&TLS),
            NONE,
            "serves callers over HTTPS: HTTP/2 and HTTP/1.1 by ALPN. The files are watched; a new pair is in force once both files match ([operations.md](operations.md#certificates)). Without this key callers are served without encryption",
        ),
        KeySpec::new(
            "http2",
            ValueSpec::Boolean,
            DefaultSpec::Value("true"),
            "whether callers may use HTTP/2: with `tls` by ALPN, without it by prior knowledge (h2c)",
        ),
        KeySpec::new(
            "max_connections",
            ValueSpec::Amount { min: 1, max: u32::MAX as u64 },
            DefaultSpec::Value("10000"),
            "maximum number of open connections. Further ones wait in the kernel's queue until another one ends",
        )
        .example("20k"),
        KeySpec::new(
            "max_connections_per_address",
            ValueSpec::Amount { min: 0, max: u32::MAX as u64 },
            DefaultSpec::Absent("1,000, but not for addresses of this machine"),
            "maximum number of open connections per peer address (IPv6: per /64). Further ones are closed. It does not apply to `trusted_proxies`. `0` turns the bound off",
        )
        .example("200"),
        KeySpec::new(
            "body_timeout",
            ValueSpec::Duration,
            DefaultSpec::Value("60s"),
            "the whole body of a request must arrive within this time; otherwise the request gets a 400",
        )
        .example("2m"),
        KeySpec::new(
            "buffered_bodies",
            ValueSpec::Size,
            DefaultSpec::Value("1GiB"),
            "maximum size of the bodies of all requests that are being received, or wait for their answer. A body without room waits for 5 s at most; then its request gets a 503 `overloaded`",
        )
        .example("2GiB"),
    ],
};

const NETWORK: ValueSpec =
    ValueSpec::Text(TextSpec { label: "network", pattern: r"^[0-9A-Fa-f.:]+(/[0-9]{1,3})?$" });

const FLOOD_GUARD: SectionSpec = SectionSpec {
    name: "flood_guard",
    keys: &[
        KeySpec::new(
            "requests",
            ValueSpec::Amount { min: 0, max: u32::MAX as u64 },
            DefaultSpec::Value("1000"),
            "maximum number of requests per period",
        )
        .example("5000"),
        KeySpec::new("per", ValueSpec::Duration, DefaultSpec::Value("second"), "length of the period")
            .example("minute"),
    ],
};

const TLS: SectionSpec = SectionSpec {
    name: "tls",
    keys: &[
        KeySpec::new("cert", PATH, DefaultSpec::Required("cert.pem"), "PEM file of the certificate chain"),
        KeySpec::new("key", PATH, DefaultSpec::Required("key.pem"), "PEM file of the private key"),
    ],
};

pub(super) const ADMIN: SectionSpec = SectionSpec {
    name: "admin",
    keys: &[
        KeySpec::new(
            "listen",
            ADDRESS,
            DefaultSpec::Value("127.0.0.1:9090"),
            "address of the [admin listener](operations.md#the-admin-listener)",
        )
        .example("127.0.0.1:9191")
        .fixed(),
        KeySpec::new(
            "token",
            SECRET,
            NONE,
            "required as `Authorization: Bearer ...`; must be set unless `listen` is a loopback address",
        )
        .example("${TOLLGATE_ADMIN_TOKEN}"),
        KeySpec::new(
            "tls",
            ValueSpec::Section(&TLS),
            NONE,
            "serves the admin listener over HTTPS, as `server.tls` does for callers",
        ),
    ],
};

/// Reads the settings of both listeners and checks that they fit together.
pub(super) fn read(top: &Section<'_>) -> (ServerSettings, AdminSettings) {
    let (server, admin) = (server(top), admin(top));
    check_addresses(top, &server, &admin);
    (server, admin)
}

fn check_addresses(top: &Section<'_>, server: &ServerSettings, admin: &AdminSettings) {
    let listen = |name: &str| top.get(name)?.as_map()?.get("listen");
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

/// An address with its port.
fn address(section: &Section<'_>) -> SocketAddr {
    let expected = "an address and port, such as 127.0.0.1:8080 or [::]:8080";
    let address = section.parsed("listen", |text| text.parse().ok(), expected);
    address.unwrap_or_else(|| SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
}

fn server(top: &Section<'_>) -> ServerSettings {
    let section = top.section("server");
    let settings = ServerSettings {
        listen: address(&section),
        max_request_body: section.size("max_request_body", body_size),
        flood_guard: match section.get("flood_guard") {
            None => Some(FloodGuard { requests: 1_000, per: Duration::from_secs(1), guards_loopback: false }),
            Some(setting) => flood_guard(&setting),
        },
        trusted_proxies: section.get("trusted_proxies").map(|s| networks(&s)).unwrap_or_default(),
        drain_delay: section.duration("drain_delay"),
        drain_timeout: section.duration("drain_timeout"),
        tls: section.get("tls").and_then(|s| tls_files(&s)),
        http2: section.boolean("http2"),
        max_connections: section.amount("max_connections", connections).try_into().unwrap_or(usize::MAX),
        max_connections_per_address: per_address(&section),
        body_timeout: section.duration("body_timeout"),
        buffered_bodies: section.size("buffered_bodies", Setting::size),
    };
    check_bodies(&section, &settings);
    settings
}

/// A body of the maximum size must fit.
fn check_bodies(section: &Section<'_>, settings: &ServerSettings) {
    if settings.buffered_bodies < settings.max_request_body
        && let Some(setting) = section.get("buffered_bodies").or_else(|| section.get("max_request_body"))
    {
        setting.fault("server.buffered_bodies is smaller than server.max_request_body, so a large body would never have room; raise buffered_bodies, or lower max_request_body");
    }
    if settings.body_timeout.is_zero()
        && let Some(setting) = section.get("body_timeout")
    {
        setting.fault("0 would refuse every request that has a body");
    }
}

fn connections(setting: &Setting<'_>) -> Option<u64> {
    setting.positive(u64::from(u32::MAX), "0 would refuse every connection")
}

fn per_address(section: &Section<'_>) -> Option<AddressBound> {
    let Some(setting) = section.get("max_connections_per_address") else {
        return Some(AddressBound { connections: 1_000, bounds_loopback: false });
    };
    let whole = |text: &str| units::amount(text).and_then(|n| u32::try_from(n).ok());
    let connections = setting.parsed(whole, "a number of connections, or 0 (no bound)")?;
    let connections = usize::try_from(connections).ok().filter(|&connections| connections > 0)?;
    Some(AddressBound { connections, bounds_loopback: true })
}

fn body_size(setting: &Setting<'_>) -> Option<usize> {
    let size = setting.size()?;
    if size == 0 {
        setting.fault("0 would refuse every request that has a body");
    }
    Some(size)
}

/// Networks, or single addresses.
fn networks(setting: &Setting<'_>) -> Vec<IpNet> {
    let network = |text: &str| {
        let address = || text.parse::<IpAddr>().ok().map(IpNet::from);
        text.parse::<IpNet>().ok().or_else(address).map(|network| network.trunc())
    };
    let expected = "a network or an address, such as 10.0.0.0/8, 2001:db8::/32 or 192.0.2.7";
    let items = setting.list().unwrap_or_default();
    items.iter().filter_map(|item| item.parsed(network, expected)).collect()
}

/// `0`, or `{ requests, per }`.
fn flood_guard(setting: &Setting<'_>) -> Option<FloodGuard> {
    if let YamlValue::Scalar(_) = setting.node.value {
        setting.parsed(|text| (text == "0").then_some(()), "0 (off) or { requests: 1000, per: second }")?;
        return None;
    }
    let section = setting.section(&FLOOD_GUARD)?;
    let whole = |text: &str| units::amount(text).and_then(|n| u32::try_from(n).ok());
    let requests = section.parsed("requests", whole, "a number of requests")?;
    let per = section.duration("per");
    if per.is_zero() {
        section.fault("\"per\" must not be 0; flood_guard: 0 turns the guard off");
    }
    (requests > 0).then_some(FloodGuard { requests, per, guards_loopback: true })
}

fn tls_files(setting: &Setting<'_>) -> Option<TlsFiles> {
    let section = setting.section(&TLS)?;
    let file = |name| {
        let setting = section.require(name)?;
        Some((setting.file()?, setting.location()))
    };
    let (cert, key) = (file("cert"), file("key"));
    let ((cert, cert_location), (key, key_location)) = (cert?, key?);
    Some(TlsFiles { cert, key, locations: TlsLocations { cert: cert_location, key: key_location } })
}

fn admin(top: &Section<'_>) -> AdminSettings {
    let section = top.section("admin");
    AdminSettings {
        listen: address(&section),
        token: section.get("token").and_then(|s| s.secret()),
        tls: section.get("tls").and_then(|s| tls_files(&s)),
    }
}
