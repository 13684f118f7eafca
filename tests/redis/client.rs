//! A node that reserves by a connection of its own.

use super::server::full;
use std::time::Duration;
use tollgate::clock::{self, Stopwatch};
use tollgate::quota::{Amounts, Kind, Period, Quota, Scope, Window};
use tollgate::redis::{
    Cells, CommandBuilder, FailFastConnection, HeldReservation, OnShortage, Piece, ReserveRequest,
    Unavailable, Verdict,
};

/// Within this time of its return a server is in use again.
pub const SOON: Duration = Duration::from_secs(2);

/// A node with one quota that nothing exhausts.
pub struct Client {
    pub connection: FailFastConnection,
    environment: &'static str,
    commands: CommandBuilder,
    quotas: Vec<Quota>,
    next: u64,
}

impl Client {
    /// Of the environment `staging`, when it has joined.
    pub async fn of(url: &str) -> Self {
        Self::in_environment(url, "staging").await
    }

    pub async fn in_environment(url: &str, environment: &'static str) -> Self {
        let mut client = Self::waiting(url, environment);
        client.is_back().await;
        client
    }

    /// That has not joined yet.
    pub fn waiting(url: &str, environment: &'static str) -> Self {
        let per = Period { text: "minute".into(), ms: 60_000 };
        let (kind, limit, window) = (Kind::Requests, 1 << 30, Window::Rolling { burst: 1 << 30 });
        let quotas = vec![Quota { scope: Scope::Environment, kind, limit, per, window }];
        let connection = FailFastConnection::new(url, "test", &format!("test:{{{environment}}}:q")).unwrap();
        tokio::spawn(connection.clone().run());
        let now = clock::now();
        let commands = CommandBuilder::new(Cells::new(&quotas, now), "one", now);
        Self { connection, environment, commands, quotas, next: 0 }
    }

    /// Another user of its connection, which numbers its requests from here.
    pub fn twin(&self, next: u64) -> Self {
        let Self { connection, environment, commands, quotas, .. } = self;
        Self {
            connection: connection.clone(),
            environment,
            commands: commands.clone(),
            quotas: quotas.clone(),
            next,
        }
    }

    fn keys(&self) -> [String; 3] {
        self.commands.keys("test", self.environment)
    }

    pub async fn reserve(&mut self) -> Result<Verdict, Unavailable> {
        self.next += 1;
        let id = self.next.to_string();
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
        self.connection.call(&keys, &command).await.map(|answer| answer.verdict)
    }

    /// Has so many reservations held again.
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
        self.connection.call(&self.keys(), &hold).await.map(|answer| answer.verdict)
    }

    /// Waits until calls are answered again, joins anew, and tells how long that took.
    pub async fn is_back(&mut self) -> Duration {
        let clock = Stopwatch::start();
        let mut up = self.connection.watch_generation();
        let keys = self.keys();
        loop {
            let waited = tokio::time::timeout(Duration::from_secs(10), up.wait_for(|&number| number > 0));
            drop(waited.await.expect("Redis is back"));
            let join = self.commands.join(1, false, &full(&self.quotas, clock::now()));
            // A server that is thawed may still be busy with what it was sent before.
            if self.connection.call(&keys, &join).await.is_ok()
                && self.reserve().await == Ok(Verdict::Admitted)
            {
                println!("back after {:?}", clock.elapsed());
                return clock.elapsed();
            }
        }
    }

    /// The first call fails within 50 ms, the others at once, for this long.
    pub async fn is_away(&mut self, longest: Duration) {
        let clock = Stopwatch::start();
        assert_eq!(self.reserve().await, Err(Unavailable));
        let first = clock.elapsed();
        assert!(first <= Duration::from_millis(50), "the first failing call took {first:?}");
        let mut took = Vec::new();
        while clock.elapsed() < longest {
            let one = Stopwatch::start();
            assert_eq!(self.reserve().await, Err(Unavailable));
            took.push(one.elapsed());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        took.sort_unstable();
        let usual = took[took.len() / 2];
        println!("the first failing call took {first:?}, later ones {usual:?}");
        assert!(usual <= Duration::from_millis(1), "later calls take {usual:?}");
        assert!(self.connection.unavailable_reason().is_some());
    }
}
