//! What the store has of upstreams with limits.

use super::{Folder, soon};
use futures_util::FutureExt as _;
use rusqlite::Connection;
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tollgate::calibrations::Calibrations;
use tollgate::config::{Config, parse};
use tollgate::ledger::{Account, Accounts, Backend, Demand, Owner, Reservation};
use tollgate::quota::{Amounts, Subject};
use tollgate::store::{Store, StoreWriter};

const LIMITS: &str = "quotas: { total_tokens: { limit: 5000, per: hour } }, model_quotas: { 'gpt-*': { total_tokens: { limit: 4000, per: day } } }";

/// One environment with an upstream that has these limits.
fn config(folder: &Folder, limits: &str, store: &str) -> Config {
    let text = format!(
        "upstreams: {{ u: {{ base_url: http://u/v1, {limits} }} }}\nenvironments: {{ e: {{ upstream: u }} }}\nstore: {{ path: '{}' {store} }}\n",
        folder.file().display()
    );
    parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}")).config
}

/// The accounts of the environment and of its upstream, with a running store.
struct Node {
    environment: Arc<Account>,
    upstream: Arc<Account>,
    _writer: StoreWriter,
}

impl Node {
    fn open(config: &Config) -> Self {
        let store = Store::open(&config.store).unwrap_or_else(|error| panic!("{error:#}"));
        let accounts = Accounts::default();
        let owners = [Owner::from(&config.environments[0]), Owner::from(&config.upstreams[0])];
        let [environment, upstream] = owners.map(|owner| {
            let restored = store.restored_state(owner).unwrap();
            let account = Arc::new(Account::open_with(owner, Some(store.persistence()), &restored));
            accounts.add(&owner.key(), account.clone());
            account
        });
        let writer = store.start(Arc::new(accounts), Arc::new(Calibrations::new([]))).unwrap();
        Self { environment, upstream, _writer: writer }
    }

    /// A request for the model `m`, which the upstream gets as `sent`.
    fn try_reserve(&self, sent: &str, prompt: u64) -> Option<Reservation> {
        let backends = [Backend { account: Some(&self.upstream), model: sent }];
        let subject = Subject { caller: None, model: "m" };
        let demand = Demand {
            subject,
            prompt,
            generates: true,
            cap: Some(70),
            completions: 1,
            backends: &backends,
            may_clamp: true,
        };
        self.environment.reserve(&demand, Duration::ZERO).now_or_never().unwrap().ok()
    }

    fn spend(&self, sent: &str, prompt: u64, completion: u64) {
        let mut reservation = self.try_reserve(sent, prompt).unwrap();
        reservation.observe(Amounts::of_request(prompt, completion));
        reservation.mark_complete();
    }

    fn used(&self) -> Vec<u64> {
        self.upstream.snapshot().levels.iter().map(|level| level.used).collect()
    }
}

/// A copy of the file as it is now, as after a kill of the process.
fn crashed(folder: &Folder) -> Folder {
    let copy = Folder::new();
    fs::create_dir_all(copy.file().parent().unwrap()).unwrap();
    for suffix in ["", "-wal"] {
        let of = |file: PathBuf| PathBuf::from(format!("{}{suffix}", file.display()));
        fs::copy(of(folder.file()), of(copy.file())).unwrap();
    }
    copy
}

#[tokio::test]
async fn a_crash_charges_the_quotas_of_the_upstream_in_full() {
    let folder = Folder::new();
    let node = Node::open(&config(&folder, LIMITS, ""));
    node.spend("gpt-4o", 30, 10);
    let mut held = node.try_reserve("gpt-4o", 30).unwrap();
    held.wait_until_durable().await;
    let crashed = crashed(&folder);
    let recovered = Node::open(&config(&crashed, LIMITS, ""));
    // The quota of an hour refills a token in 0.7 s.
    let all = recovered.used();
    assert!((135..=140).contains(&all[0]), "{all:?}");
    assert_eq!(all[1], held.reserved().total + 40);
    assert_eq!(recovered.upstream.in_flight(), 0);
    drop(recovered);
    // The history has what was held too. Its model is not recorded.
    let of = |model| crashed.sql(&format!("SELECT total_tokens FROM upstream_usage WHERE model = '{model}'"));
    assert_eq!((of("gpt-4o"), of("other")), (40, 100));
    let again = Node::open(&config(&crashed, LIMITS, ""));
    assert_eq!(again.upstream.snapshot().totals.total, 140);
    drop(again);
    assert_eq!(crashed.sql("SELECT sum(total_tokens) FROM upstream_usage"), 140);
}

#[tokio::test]
async fn usage_of_an_upstream_is_recorded_by_the_name_that_is_sent_and_apart_from_its_environments() {
    let folder = Folder::new();
    let node = Node::open(&config(&folder, "quotas: { total_tokens: { limit: 200, per: day } }", ""));
    node.spend("gpt-4o", 10, 20);
    node.spend("gpt-4o", 1, 2);
    node.spend("o3", 5, 5);
    assert!(node.try_reserve("o3", 190).is_none());
    let waived = node.try_reserve("claude-5", 10).unwrap();
    drop(waived);
    drop(node);
    let of = |view: &str, column: &str, model: &str| {
        folder.sql(&format!("SELECT coalesce(sum({column}), -1) FROM {view} WHERE model = '{model}'"))
    };
    let minutes = "upstream_usage_by_minute";
    assert_eq!((of(minutes, "requests", "gpt-4o"), of(minutes, "total_tokens", "gpt-4o")), (2, 33));
    assert_eq!((of(minutes, "requests", "o3"), of(minutes, "rejections", "o3")), (1, 1));
    assert_eq!(of(minutes, "requests", "claude-5"), -1, "nothing was charged");
    assert_eq!(
        (of("upstream_usage_by_day", "prompt_tokens", "gpt-4o"), of("usage_by_day", "total_tokens", "m")),
        (11, 43)
    );
    assert_eq!(folder.sql("SELECT count(*) FROM usage WHERE environment <> 'e'"), 0);
    assert_eq!(folder.sql("SELECT count(*) FROM upstream_usage WHERE upstream <> 'u'"), 0);
}

#[tokio::test]
async fn old_usage_of_upstreams_is_merged_into_days_without_loss() {
    let folder = Folder::new();
    let config = config(&folder, LIMITS, ", history: 1d");
    drop(Node::open(&config));
    // Three days of two upstreams and two models each, beside one environment. The last hour stays.
    Connection::open(folder.file())
        .unwrap()
        .execute_batch(
            "WITH RECURSIVE m(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM m WHERE n < 4320)
             INSERT INTO upstream_usage
             SELECT unixepoch() / 60 - 1500 - n, 'u' || (n % 2), 'm' || (n % 4 / 2), 1, 2, 3, 4, 7 FROM m;
             INSERT INTO upstream_usage VALUES (unixepoch() / 60, 'u', 'now', 1, 2, 3, 4, 7);
             INSERT INTO usage SELECT minute, 'e', 'm', '', 1, 2, 3, 4, 7 FROM upstream_usage;",
        )
        .unwrap();
    let _node = Node::open(&config);
    for (minutes, days, rows_per_day) in
        [("upstream_usage", "upstream_usage_daily", 4), ("usage", "usage_daily", 1)]
    {
        soon("old rows are merged", || folder.sql(&format!("SELECT count(*) FROM {minutes}")) == 1).await;
        assert_eq!(folder.sql(&format!("SELECT sum(requests) FROM {days}")), 4_320);
        let of_days = folder.sql(&format!("SELECT count(DISTINCT day) FROM {days}"));
        assert!((3..=4).contains(&of_days));
        // The first and the last day may have minutes of some rows only.
        let rows = folder.sql(&format!("SELECT count(*) FROM {days}"));
        let of_all = of_days * rows_per_day;
        assert!((of_all - 2 * (rows_per_day - 1)..=of_all).contains(&rows), "{rows}");
    }
    assert_eq!(folder.sql("SELECT sum(total_tokens) FROM upstream_usage_by_day"), 4_321 * 7);
}

#[test]
fn a_new_time_zone_keeps_the_usage_of_the_current_period_of_an_upstream() {
    let folder = Folder::new();
    let of = |zone: &str| {
        let quotas = format!(
            "quotas: {{ total_tokens: {{ limit: 100000, per: day, timezone: {zone} }} }}, model_quotas: {{ 'gpt-*': {{ total_tokens: {{ limit: 100000, per: day, timezone: {zone} }} }} }}"
        );
        config(&folder, &quotas, "")
    };
    let node = Node::open(&of("Pacific/Kiritimati"));
    node.spend("gpt-4o", 30, 70);
    drop(node);
    // The day of Honolulu begins 24 hours after that of Kiritimati, or at the same time of the day before.
    Connection::open(folder.file())
        .unwrap()
        .execute_batch(
            "WITH RECURSIVE h(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM h WHERE n < 48)
             INSERT INTO upstream_usage SELECT unixepoch() / 60 - n * 60, 'u', 'gpt-4o', 1, 0, 1, 0, 1 FROM h;
             INSERT INTO upstream_usage SELECT minute, 'u', 'o3', 1, 0, 2, 0, 2 FROM upstream_usage WHERE total_tokens = 1;",
        )
        .unwrap();
    let day =
        |zone| jiff::Timestamp::now().in_tz(zone).unwrap().start_of_day().unwrap().timestamp().as_second();
    let earlier = (day("Pacific/Kiritimati") - day("Pacific/Honolulu")).max(0) / 3_600;
    let used = Node::open(&of("Pacific/Honolulu")).used();
    let [all, models] = [used[0], used[1]].map(|used| i64::try_from(used).unwrap() - 100);
    assert!(
        (all - earlier * 3).abs() <= 3 && (models - earlier).abs() <= 1,
        "{used:?}, {earlier} hours earlier"
    );
}

#[test]
fn the_history_of_an_upstream_has_one_row_per_model_whatever_the_number_of_environments() {
    let folder = Folder::new();
    let environments: Vec<String> = (0..500).map(|n| format!("  env-{n}: {{ upstream: u }}\n")).collect();
    let environments = environments.concat();
    let text = format!(
        "upstreams: {{ u: {{ base_url: http://u/v1, {LIMITS}, max_in_flight: 9 }} }}\nenvironments:\n{environments}store: {{ path: '{}' }}\n",
        folder.file().display()
    );
    let text = text.replace("limit: 5000", "limit: 1G").replace("limit: 4000", "limit: 1G");
    let config = parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}")).config;
    let store = Store::open(&config.store).unwrap();
    let accounts = Arc::new(Accounts::default());
    let open = |owner: Owner<'_>| {
        let restored = store.restored_state(owner).unwrap();
        let account = Arc::new(Account::open_with(owner, Some(store.persistence()), &restored));
        accounts.add(&owner.key(), account.clone());
        account
    };
    let upstream = open(Owner::from(&config.upstreams[0]));
    let environments: Vec<_> =
        config.environments.iter().map(|environment| open(environment.into())).collect();
    let names: Vec<(Arc<str>, String)> =
        (0..20).map(|n| (format!("caller-{n}").into(), format!("model-{n}"))).collect();
    for environment in &environments {
        for (caller, model) in &names {
            let backends = [Backend { account: Some(&upstream), model }];
            let subject = Subject { caller: Some(caller), model };
            let demand = Demand {
                subject,
                prompt: 1,
                generates: true,
                cap: Some(1),
                completions: 1,
                backends: &backends,
                may_clamp: true,
            };
            let mut reservation =
                environment.reserve(&demand, Duration::ZERO).now_or_never().unwrap().unwrap();
            reservation.observe(Amounts::of_request(1, 1));
            reservation.mark_complete();
        }
    }
    let clock = Instant::now();
    drop(store.start(accounts, Arc::new(Calibrations::new([]))).unwrap());
    println!(
        "a commit of 500 environments with 20 callers each, and of their upstream: {} ms",
        clock.elapsed().as_millis()
    );
    // The requests may be of two minutes.
    let minutes = folder.sql("SELECT count(DISTINCT minute) FROM upstream_usage");
    let rows = folder.sql("SELECT count(*) FROM upstream_usage");
    assert!(
        (1..=2).contains(&minutes) && (20..=minutes * 20).contains(&rows),
        "{rows} rows in {minutes} minutes"
    );
    assert_eq!(folder.sql("SELECT sum(total_tokens) FROM upstream_usage"), 20_000);
    assert_eq!(folder.sql("SELECT count(*) FROM usage"), 10_000);
}

/// The file of a gateway of version 4 of the schema, with quotas and usage of an environment and of its upstream.
fn file_of_version_4(folder: &Folder) {
    let db = folder.old_file(4);
    db.execute_batch(
        "INSERT INTO quota VALUES
             ('upstream:u', 'upstream', 'u', 'total_tokens', 3600000, 'rolling', 'hour', 5000, 900, 0, 0, unixepoch() * 1000, 0, 0, 0),
             ('upstream:u', 'upstream_model', 'u/gpt-*', 'total_tokens', 86400000, 'calendar', 'day', 4000, 800, 0, 0,
              unixepoch() / 86400 * 86400000, (unixepoch() / 86400 + 1) * 86400000, 0, 0);
         INSERT INTO totals VALUES ('e', 9, 1, 600, 300, 900, 0, 0, 0, 0), ('upstream:u', 9, 1, 600, 300, 900, 0, 0, 0, 0);
         INSERT INTO usage VALUES (unixepoch() / 60, 'e', 'm', '', 9, 1, 600, 300, 900);
         INSERT INTO usage_daily VALUES (20000, 'e', 'm', '', 5, 0, 10, 10, 20);
         INSERT INTO limit_override VALUES
             ('upstream:u', 'upstream', 'u', 'total_tokens', 3600000, 'rolling', 'hour', 6000, 6000, 'token', 1000, NULL, 'more');",
    )
    .unwrap();
}

#[test]
fn a_file_of_the_fourth_version_is_migrated_with_everything_that_it_has() {
    let folder = Folder::new();
    file_of_version_4(&folder);
    let node = Node::open(&config(&folder, LIMITS, ""));
    let used = node.used();
    assert!((899..=900).contains(&used[0]) && used[1] == 800, "{used:?}");
    let snapshot = node.upstream.snapshot();
    assert_eq!((snapshot.totals.total, snapshot.levels[0].quota.limit), (900, 6_000));
    assert_eq!(node.environment.snapshot().totals.requests, 9);
    node.spend("gpt-4o", 10, 10);
    drop((snapshot, node));
    assert_eq!(folder.sql("PRAGMA user_version"), 6);
    assert_eq!(folder.sql("SELECT sum(total_tokens) FROM usage_by_day WHERE environment = 'e'"), 940);
    assert_eq!(folder.sql("SELECT total_tokens FROM upstream_usage_by_day WHERE upstream = 'u'"), 20);
}

#[test]
fn a_process_of_the_fourth_version_can_still_write_to_a_migrated_file() {
    // A takeover that fails after the migration leaves the file to the old process.
    let folder = Folder::new();
    drop(Node::open(&config(&folder, LIMITS, "")));
    let db = Connection::open(folder.file()).unwrap();
    db.execute_batch(
        "INSERT OR REPLACE INTO quota VALUES ('e', 'environment', '', 'requests', 60000, 'rolling', 'minute', 1, 0, 0, 0, 0, 0, 0, 0);
         INSERT OR REPLACE INTO totals VALUES ('e', 1, 0, 1, 1, 2, 0, 0, 0, 0);
         INSERT INTO usage VALUES (1, 'e', 'm', '', 1, 0, 1, 1, 2);
         INSERT INTO usage_daily VALUES (1, 'e', 'm', '', 1, 0, 1, 1, 2);
         INSERT OR REPLACE INTO limit_override VALUES ('e', 'environment', '', 'requests', 60000, 'rolling', 'minute', 1, 1, 'token', 0, NULL, NULL);",
    )
    .unwrap();
    assert_eq!(folder.sql("SELECT sum(total_tokens) FROM usage_by_day"), 4);
}
