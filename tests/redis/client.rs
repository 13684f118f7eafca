//! A node that reserves through its own [`FailFastConnection`].

use super::node::full_states;
use std::time::Duration;
use tollgate::clock::{self, Stopwatch};
use tollgate::quota::{Amounts, Kind, Period, Quota, Scope, Window};
use tollgate::redis::{
    Cells, CommandBuilder, FailFastConnection, HeldReservation, OnShortage, Piece, ReserveRequest,
    Unavailable, Verdict,
};

/// A node uses a server again within this time after it has become available.
pub const MAX_RECOVERY_TIME: Duration = Duration::from_secs(2);

/// `store.redis.timeout` of the clients.
pub const TIMEOUT: Duration = Duration::from_millis(100);

/// A node with one quota that is never exhausted.
pub struct Client {
    pub connection: FailFastConnection,
    environment: &'static str,
    commands: CommandBuilder,
    quotas: Vec<Quota>,
    timeout: Duration,
    last_id: u64,
}

impl Client {
    /// Joins in the environment `staging`.
    pub async fn connect(url: &str) -> Self {
        Self::connect_to(url, "staging").await
    }

    /// Joins in this environment.
    pub async fn connect_to(url: &str, environment: &'static str) -> Self {
        let mut client = Self::start(url, environment);
        client.wait_until_available().await;
        client
    }

    /// Joins with this timeout in the environment `staging`.
    pub async fn connect_with(url: &str, timeout: Duration) -> Self {
        let mut client = Self::start_with(url, "staging", timeout);
        client.wait_until_available().await;
        client
    }

    /// Starts to connect and does not wait.
    pub fn start(url: &str, environment: &'static str) -> Self {
        Self::start_with(url, environment, TIMEOUT)
    }

    fn start_with(url: &str, environment: &'static str, timeout: Duration) -> Self {
        let per = Period { text: "minute".into(), ms: 60_000 };
        let (kind, limit, window) = (Kind::Requests, 1 << 30, Window::Rolling { burst: 1 << 30 });
        let quotas = vec![Quota { scope: Scope::Environment, kind, limit, per, window }];
        let slot_key = format!("test:{{{environment}}}:q");
        let connection = FailFastConnection::new(url, "test", &slot_key, timeout).unwrap();
        tokio::spawn(connection.clone().run());
        let now = clock::now();
        let commands = CommandBuilder::new(Cells::new(&quotas, now), "one", now);
        Self { connection, environment, commands, quotas, timeout, last_id: 0 }
    }

    /// Another user of the same connection and session, whose requests have ids above `last_id`.
    pub fn with_ids_from(&self, last_id: u64) -> Self {
        let Self { connection, environment, commands, quotas, timeout, .. } = self;
        let (connection, commands, quotas) = (connection.clone(), commands.clone(), quotas.clone());
        Self { connection, environment, commands, quotas, timeout: *timeout, last_id }
    }

    fn keys(&self) -> [String; 3] {
        self.commands.keys("test", None, self.environment)
    }

    /// Reserves for a request and does not settle it.
    pub async fn reserve(&mut self) -> Result<Verdict, Unavailable> {
        self.last_id += 1;
        let id = self.last_id.to_string();
        let reserve = ReserveRequest {
            id: &id,
            max_in_flight: 0,
            on_shortage: OnShortage::Reject,
            generates: true,
            amounts: Amounts::of_request(1, 1),
            completions: 1,
        };
        let command = self.commands.reserve(&reserve, &[0]);
        let keys = self.keys();
        self.connection.call(&keys, &command).await.map(|reply| reply.verdict)
    }

    /// Sends a long command: it holds this number of reservations.
    pub async fn hold(&mut self, count: u32) -> Result<Verdict, Unavailable> {
        let piece =
            Piece { reserved: Amounts::of_request(1, 1), spent: Amounts::default(), cells: vec![(0, 0); 4] };
        let held = (0..count).map(|n| HeldReservation {
            id: format!("held-{n}"),
            settled_by: 0,
            pieces: vec![piece.clone()],
        });
        let held: Vec<_> = held.collect();
        let hold = self.commands.hold(true, &held);
        self.connection.call(&self.keys(), &hold).await.map(|reply| reply.verdict)
    }

    /// Waits until a connection is established.
    pub async fn wait_until_connected(&self) {
        let mut generation = self.connection.watch_generation();
        let connected = generation.wait_for(|&number| number > 0);
        drop(
            tokio::time::timeout(Duration::from_secs(10), connected).await.expect("Redis is available again"),
        );
    }

    /// Waits until calls succeed again, and joins. Returns how long that took.
    pub async fn wait_until_available(&mut self) -> Duration {
        let clock = Stopwatch::start();
        let keys = self.keys();
        loop {
            self.wait_until_connected().await;
            let join = self.commands.join(1, None, &full_states(&self.quotas, clock::now()), None);
            // A server that was frozen may still be busy with commands that it received before.
            if self.connection.call(&keys, &join).await.is_ok()
                && self.reserve().await == Ok(Verdict::Admitted)
            {
                println!("available after {:?}", clock.elapsed());
                return clock.elapsed();
            }
        }
    }

    /// Asserts that the first call fails soon after the timeout, and the calls after it at once, for this time.
    pub async fn expect_unavailable(&mut self, outage: Duration) {
        let clock = Stopwatch::start();
        assert_eq!(self.reserve().await, Err(Unavailable));
        let first = clock.elapsed();
        // A fifth is for catching up. A busy machine gets up to 250 ms more.
        let limit = self.timeout * 6 / 5 + Duration::from_millis(300);
        assert!(first <= limit, "the first failing call took {first:?}");
        let mut times = Vec::new();
        while clock.elapsed() < outage {
            let one = Stopwatch::start();
            assert_eq!(self.reserve().await, Err(Unavailable));
            times.push(one.elapsed());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        times.sort_unstable();
        let median = times[times.len() / 2];
        println!("the first failing call took {first:?}, later calls {median:?}");
        assert!(median <= Duration::from_millis(1), "later calls take {median:?}");
        assert!(self.connection.unavailable_reason().is_some());
    }
}
