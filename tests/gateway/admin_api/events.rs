//! `GET /api/events`: the stream that feeds the page.

use super::{TOKEN, bearer, gateway, request, sign_in};
use crate::support::redis::has_shared_counters;
use crate::support::*;
use serde_json::{Value, json};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// A client of the stream.
struct Events(Caller);

/// An event: its name, its number, and its data.
type Event = (String, u64, Value);

impl Events {
    async fn open(admin: SocketAddr, headers: &str) -> Self {
        let mut caller = Caller::connect(admin).await;
        caller.send(format!("GET /api/events HTTP/1.1\r\nhost: {admin}\r\n{headers}\r\n").as_bytes()).await;
        let head = caller.head().await;
        assert!(head.starts_with("HTTP/1.1 200"), "{head}");
        assert!(head.contains("content-type: text/event-stream"), "{head}");
        Self(caller)
    }

    /// The next event. `None`: the stream has ended.
    async fn next(&mut self) -> Option<Event> {
        let chunk = self.0.chunk().await?;
        let text = String::from_utf8(chunk).unwrap();
        if text.is_empty() {
            return None;
        }
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        let (id, data) = (field("id: ").parse().unwrap_or(0), field("data: "));
        Some((field("event: ").to_owned(), id, serde_json::from_str(data).unwrap()))
    }

    /// The data of the next update.
    async fn update(&mut self) -> Value {
        let (name, _, data) = self.next().await.unwrap();
        assert_eq!(name, "update");
        data
    }
}

fn names(list: &Value) -> Vec<&str> {
    list.as_array().map(|all| all.iter().map(|e| e["name"].as_str().unwrap()).collect()).unwrap_or_default()
}

async fn two_environments(upstream: &Upstream) -> Gateway {
    let environments = "  staging: { upstream: backend, quotas: { total_tokens: { limit: 1000, per: day }, requests: { limit: 3, per: day } } }\n  \
                        idle: { upstream: backend, quotas: { requests: { limit: 5, per: minute } } }\ndefault_environment: staging";
    Gateway::with(upstream, "", environments).await
}

#[tokio::test]
async fn a_stream_begins_with_the_whole_state_and_then_has_only_what_changed() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = two_environments(&upstream).await;
    let mut events = Events::open(gateway.admin, "").await;
    let (name, id, snapshot) = events.next().await.unwrap();
    assert_eq!(name, "snapshot");
    assert_eq!(names(&snapshot["environments"]), ["staging", "idle"]);
    let listed = gateway.admin_get("/api/environments/staging").await.json();
    let fields = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(fields(&snapshot["environments"][0]), fields(&listed));
    assert_eq!(fields(&snapshot["environments"][0]["quotas"][0]), fields(&listed["quotas"][0]));
    assert_eq!((&snapshot["rejections"], &snapshot["config"]["faults"]), (&json!([]), &json!([])));
    assert_eq!(gateway.chat(&hello(r#""max_tokens":2"#)).await.status, 200);
    let (name, next, update) = events.next().await.unwrap();
    assert_eq!((name.as_str(), next), ("update", id + 1));
    // When a minute begins in this moment, its quota changes `idle` too.
    assert!(matches!(names(&update["environments"])[..], ["staging"] | ["staging", "idle"]), "{update}");
    let staging = &update["environments"][0];
    assert_eq!((&staging["complete"], &staging["totals"]["total_tokens"]), (&json!(false), &json!(10)));
    assert_eq!((&staging["quotas"][0]["level"], &staging["quotas"][1]["level"]), (&json!(990), &json!(2)));
    assert!(update.get("config").is_none() && update.get("rejections").is_none(), "{update}");
    // A second client gets the whole state too.
    let (name, number, second) = Events::open(gateway.admin, "").await.next().await.unwrap();
    assert_eq!((name.as_str(), number), ("snapshot", next));
    assert_eq!(second["environments"][0]["quotas"][0]["level"], 990);
}

#[tokio::test]
async fn refusals_and_refused_configs_are_in_the_stream() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = two_environments(&upstream).await;
    let mut events = Events::open(gateway.admin, "").await;
    events.next().await.unwrap();
    let denied = gateway.chat(&hello(r#""max_tokens":900"#)).await;
    assert_eq!(denied.status, 200);
    for _ in 0..3 {
        gateway.chat(&hello(r#""max_tokens":2"#)).await;
    }
    let mut update = events.update().await;
    while update.get("rejections").is_none() {
        update = events.update().await;
    }
    assert_eq!(update["rejections"].as_array().unwrap().len(), 1);
    assert_eq!(update["rejections"][0]["quotas"][0]["kind"], "requests");
    let staging = &update["environments"][0];
    let of_kind = |kind: &str| staging["quotas"].as_array().unwrap().iter().find(|q| q["kind"] == kind);
    assert_eq!(staging["refused_last_minute"], 1);
    assert_eq!(of_kind("requests").unwrap()["refused_last_minute"], 1);
    assert!(of_kind("total_tokens").is_none_or(|quota| quota["refused_last_minute"] == 0));
    assert_eq!(request(&gateway, "POST", "/api/config/reload", "", "").await.status, 422);
    let update = events.update().await;
    assert_eq!(update["config"]["faults"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn updates_are_at_least_a_second_apart() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = Gateway::in_front_of(&upstream, "{ total_tokens: { limit: 100000, per: day } }").await;
    let mut events = Events::open(gateway.admin, "").await;
    events.next().await.unwrap();
    let traffic = async {
        loop {
            gateway.chat(&hello(r#""max_tokens":2"#)).await;
        }
    };
    let arrivals = async {
        let mut arrivals = Vec::new();
        for _ in 0..4 {
            events.update().await;
            arrivals.push(Instant::now());
        }
        arrivals
    };
    let arrivals = tokio::select! { () = traffic => unreachable!(), arrivals = arrivals => arrivals };
    // On a busy machine an update may arrive late, so single gaps say little.
    assert!(arrivals[3] - arrivals[0] > Duration::from_millis(2_500), "{arrivals:?}");
}

#[tokio::test]
async fn a_stream_needs_authorization_and_ends_with_it() {
    let (upstream, folder) = (Upstream::always(Answer::chat(8, 2)).await, tempfile::tempdir().unwrap());
    let gateway = gateway(&upstream, &folder).await;
    assert_eq!(request(&gateway, "GET", "/api/events", "", "").await.status, 401);
    let (session, csrf) = sign_in(&gateway).await;
    let cookie = format!("cookie: tollgate_session={session}\r\n");
    let mut of_session = Events::open(gateway.admin, &cookie).await;
    let mut of_token = Events::open(gateway.admin, &bearer(TOKEN)).await;
    assert_eq!(of_session.next().await.unwrap().0, "snapshot");
    assert_eq!(of_token.next().await.unwrap().0, "snapshot");
    let repeated = format!("{cookie}x-tollgate-csrf: {csrf}\r\n");
    assert_eq!(request(&gateway, "DELETE", "/api/session", &repeated, "").await.status, 204);
    assert_eq!(of_session.next().await, None);
    // The other one ends with the gateway.
    let shutdown = tokio::spawn(gateway.shutdown());
    while of_token.next().await.is_some() {}
    soon("the shutdown", shutdown).await.unwrap();
}

#[tokio::test]
async fn the_number_of_streams_is_bounded() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = two_environments(&upstream).await;
    let mut streams = Vec::new();
    for _ in 0..100 {
        streams.push(Events::open(gateway.admin, "").await);
    }
    let refused = request(&gateway, "GET", "/api/events", "", "").await;
    assert_eq!((refused.status, refused.code()), (503, "too_many_streams".into()));
    assert_eq!(refused.header("retry-after"), Some("5"));
    streams.truncate(50);
    let opened = async {
        while !gateway_accepts(gateway.admin).await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    soon("room for another stream", opened).await;
}

async fn gateway_accepts(admin: SocketAddr) -> bool {
    let mut caller = Caller::connect(admin).await;
    caller.send(format!("GET /api/events HTTP/1.1\r\nhost: {admin}\r\n\r\n").as_bytes()).await;
    caller.head().await.starts_with("HTTP/1.1 200")
}

#[tokio::test]
async fn a_heartbeat_comes_each_15_seconds() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let gateway = two_environments(&upstream).await;
    let mut socket = tokio::net::TcpStream::connect(gateway.admin).await.unwrap();
    let head = format!("GET /api/events HTTP/1.1\r\nhost: {}\r\n\r\n", gateway.admin);
    socket.write_all(head.as_bytes()).await.unwrap();
    let (opened, mut received) = (Instant::now(), Vec::new());
    while !String::from_utf8_lossy(&received).contains("event: heartbeat") {
        let read = tokio::time::timeout(Duration::from_secs(25), socket.read_buf(&mut received)).await;
        assert!(read.unwrap().unwrap() > 0);
    }
    assert!((14..20).contains(&opened.elapsed().as_secs()), "{:?}", opened.elapsed());
    // Nothing changed, so there was no update. In Redis the node joins meanwhile.
    let is_quiet = !String::from_utf8_lossy(&received).contains("event: update");
    assert!(is_quiet || has_shared_counters());
}

/// The state is larger than the buffers of the sockets, so the gateway cannot send updates before the client reads.
#[tokio::test]
async fn a_client_that_reads_slowly_gets_the_newest_state_instead_of_all_updates() {
    let upstream = Upstream::always(Answer::chat(8, 2)).await;
    let mut callers = String::new();
    for n in 0..10_000 {
        let quotas = "{ requests: [{ limit: 9, per: day }, { limit: 9, per: hour }] }";
        write!(callers, "{{ name: c{n}, sha256: '{n:064x}', quotas: {quotas} }}, ").unwrap();
    }
    let environments = format!(
        "  large: {{ upstream: backend, keys: [{callers}] }}\n  busy: {{ upstream: backend, quotas: {{ requests: {{ limit: 1000, per: day }} }} }}\ndefault_environment: busy"
    );
    let gateway = Gateway::with(&upstream, "", &environments).await;
    let mut slow = Events::open(gateway.admin, "").await;
    for _ in 0..8 {
        gateway.chat(&hello(r#""max_tokens":2"#)).await;
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
    // The state of so many quotas takes its time.
    tokio::time::sleep(Duration::from_secs(3)).await;
    let (name, first, _) = slow.next().await.unwrap();
    assert_eq!(name, "snapshot");
    let (name, newest, state) = slow.next().await.unwrap();
    assert_eq!((name.as_str(), &state["environments"][1]["totals"]["requests"]), ("snapshot", &json!(8)));
    assert!(newest > first + 4, "{first} {newest}");
}
