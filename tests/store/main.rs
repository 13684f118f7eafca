//! The embedded store: what survives a restart, and what happens with a file that cannot be used.

#![allow(missing_docs, clippy::unwrap_used, clippy::panic, clippy::disallowed_methods)]

mod files;
mod upstreams;

use futures_util::FutureExt as _;
use rusqlite::Connection;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tollgate::calibrations::Calibrations;
use tollgate::config::{Config, parse};
use tollgate::ledger::{
    Account, Accounts, Demand, LimitChange, OverrideOrigin, Persistence, QuotaKey, Reservation, Snapshot,
};
use tollgate::quota::{Amounts, Kind, QuotaLevel, Scope, Subject};
use tollgate::store::{Store, StoreWriter, WriterControl};

const QUOTAS: &str = "{ total_tokens: [{ limit: 1000, per: day }, { limit: 5000, per: hour }], requests: { limit: 100, per: day } }";

/// A calendar month and a rolling window of 30 days. They have the same length in milliseconds.
const MONTHS: &str =
    "{ total_tokens: [{ limit: 1000, per: month }, { limit: 2000, per: 30d, window: rolling }] }";

/// One environment with a caller `web` that has a quota, and with a quota for a model.
fn config(path: &Path, quotas: &str, store: &str) -> Config {
    let text = format!(
        "upstreams: {{ u: {{ base_url: http://u/v1 }} }}\nenvironments:\n  e:\n    upstream: u\n    quotas: {quotas}\n    \
         keys: [{{ name: web, secret: sk-some-key-of-web-app, quotas: {{ total_tokens: {{ limit: 900, per: day }} }} }}]\n    \
         model_quotas: {{ 'gpt-4*': {{ total_tokens: {{ limit: 800, per: day }} }} }}\nstore: {{ path: '{}' {store} }}\n",
        path.display()
    );
    parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}")).config
}

/// An account with a running store.
struct Node {
    account: Arc<Account>,
    control: Arc<WriterControl>,
    _writer: StoreWriter,
}

impl Node {
    fn open(config: &Config) -> Self {
        Self::try_open(config).unwrap_or_else(|error| panic!("{error:#}"))
    }

    fn try_open(config: &Config) -> anyhow::Result<Self> {
        let store = Store::open(&config.store)?;
        let environment = &config.environments[0];
        let (control, restored) = (store.persistence(), store.restored_state(environment)?);
        let account = Arc::new(Account::open_with(environment, Some(control.clone()), &restored));
        let accounts = Accounts::default();
        accounts.add(&environment.name, account.clone());
        let writer = store.start(Arc::new(accounts), Arc::new(Calibrations::new([])))?;
        Ok(Self { account, control, _writer: writer })
    }

    fn reserve(&self, model: &str, prompt: u64, cap: u64) -> Reservation {
        let caller = "web".into();
        let subject = Subject { caller: Some(&caller), model };
        let demand = Demand {
            subject,
            prompt,
            generates: true,
            cap: Some(cap),
            completions: 1,
            backends: &[],
            may_clamp: true,
        };
        self.account.reserve(&demand, Duration::ZERO).now_or_never().unwrap().unwrap()
    }

    fn spend(&self, model: &str, prompt: u64, completion: u64) {
        let mut reservation = self.reserve(model, prompt, completion);
        reservation.observe(Amounts::of_request(prompt, completion));
        reservation.mark_complete();
    }

    /// The used amount of each quota: of the environment per day and per hour, its requests, the caller's, the model's.
    fn used(&self) -> Vec<u64> {
        let Snapshot { levels, .. } = self.account.snapshot();
        let limited = levels.iter().filter(|level| !level.quota.is_unlimited());
        limited.map(|level| level.used).collect()
    }
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn file(&self) -> PathBuf {
        self.0.path().join("data/tollgate.db")
    }

    /// Makes a file as a gateway with this version of the schema did.
    fn old_file(&self, version: usize) -> Connection {
        std::fs::create_dir(self.0.path().join("data")).unwrap();
        let db = Connection::open(self.file()).unwrap();
        let schemas = [
            include_str!("../../src/store/schema/1.sql"),
            include_str!("../../src/store/schema/2.sql"),
            include_str!("../../src/store/schema/3.sql"),
            include_str!("../../src/store/schema/4.sql"),
        ];
        schemas[..version].iter().for_each(|schema| db.execute_batch(schema).unwrap());
        db.execute_batch(&format!("PRAGMA user_version = {version}; PRAGMA application_id = 0x546c6c67"))
            .unwrap();
        db
    }

    fn sql(&self, text: &str) -> i64 {
        Connection::open(self.file()).unwrap().query_row(text, [], |row| row.get(0)).unwrap()
    }
}

async fn soon(what: &str, mut is_so: impl FnMut() -> bool) {
    let began = Instant::now();
    while !is_so() {
        assert!(began.elapsed() < Duration::from_secs(10), "timeout: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn settled_usage_survives_a_restart() {
    let folder = Folder::new();
    let config = config(&folder.file(), QUOTAS, "");
    let first = Node::open(&config);
    first.spend("gpt-4o", 30, 70);
    first.spend("o3", 1, 9);
    assert_eq!(first.used()[0], 110);
    drop(first);
    let second = Node::open(&config);
    assert_eq!(second.used(), [110, 110, 2, 110, 100]);
    let totals = second.account.snapshot().totals;
    assert_eq!((totals.requests, totals.prompt, totals.completion, totals.total), (2, 31, 79, 110));
}

#[test]
fn a_changed_limit_keeps_the_used_amount() {
    let folder = Folder::new();
    Node::open(&config(&folder.file(), QUOTAS, "")).spend("gpt-4o", 30, 70);
    let raised = config(&folder.file(), &QUOTAS.replace("limit: 1000", "limit: 2000"), "");
    let node = Node::open(&raised);
    let levels = node.account.snapshot().levels;
    assert_eq!((levels[0].used, levels[0].level), (100, 1_900));
    drop(node);
    let lowered = config(&folder.file(), &QUOTAS.replace("limit: 1000", "limit: 60"), "");
    let levels = Node::open(&lowered).account.snapshot().levels;
    assert_eq!((levels[0].used, levels[0].level), (60, 0), "usage beyond the new limit is no debt");
}

#[tokio::test]
async fn a_crash_charges_requests_in_flight_in_full() {
    let folder = Folder::new();
    let config = config(&folder.file(), QUOTAS, "");
    let node = Node::open(&config);
    node.spend("gpt-4o", 10, 10);
    let mut reservation = node.reserve("gpt-4o", 100, 200);
    reservation.wait_until_durable().await;

    // A copy of the files is what a crash leaves behind.
    let crashed = Folder::new();
    fs::create_dir_all(crashed.file().parent().unwrap()).unwrap();
    for suffix in ["", "-wal"] {
        let of = |file: PathBuf| PathBuf::from(format!("{}{suffix}", file.display()));
        fs::copy(of(folder.file()), of(crashed.file())).unwrap();
    }
    let recovered = Node::open(&self::config(&crashed.file(), QUOTAS, ""));
    assert_eq!(recovered.used(), [320, 320, 2, 320, 320]);
    let Snapshot { levels, totals, in_flight, .. } = recovered.account.snapshot();
    assert!(levels.iter().all(|level| level.held == 0) && in_flight == 0);
    assert_eq!((totals.requests, totals.prompt, totals.completion, totals.total), (2, 110, 210, 320));
    drop(recovered);
    assert_eq!(
        crashed.sql("SELECT total_tokens FROM usage WHERE model = 'other'"),
        300,
        "the model of requests in flight is not recorded"
    );
    assert_eq!(crashed.sql("SELECT sum(total_tokens) FROM usage"), 320);
    // A second restart does not charge them again.
    assert_eq!(Node::open(&self::config(&crashed.file(), QUOTAS, "")).used(), [320, 320, 2, 320, 320]);
}

#[tokio::test]
async fn a_reservation_is_durable_before_its_request_continues() {
    let folder = Folder::new();
    let node = Node::open(&config(&folder.file(), QUOTAS, ""));
    for n in 1..=20 {
        let mut reservation = node.reserve("gpt-4o", 3, 4);
        reservation.wait_until_durable().await;
        let held = folder.sql(
            "SELECT held FROM quota WHERE per = 'day' AND kind = 'total_tokens' AND scope = 'environment'",
        );
        let used = folder.sql(
            "SELECT used FROM quota WHERE per = 'day' AND kind = 'total_tokens' AND scope = 'environment'",
        );
        assert!(held >= 7 && held + used >= 7 * n, "{n}: {held} {used}");
        reservation.observe(Amounts::of_request(3, 4));
    }
}

#[tokio::test]
async fn usage_beyond_a_reservation_is_durable_before_the_answer_ends() {
    let folder = Folder::new();
    let node = Node::open(&config(&folder.file(), QUOTAS, ""));
    let used = || folder.sql("SELECT used FROM quota WHERE per = 'day' AND scope = 'model'");
    for n in 1..=5 {
        let mut reservation = node.reserve("gpt-4o", 3, 4);
        reservation.wait_until_durable().await;
        reservation.observe(Amounts::of_request(3, 97));
        reservation.settle().expect("the usage exceeds the reservation").await;
        assert_eq!(used(), n * 100);
    }
    let mut within = node.reserve("gpt-4o", 3, 4);
    within.observe(Amounts::of_request(3, 4));
    assert!(within.settle().is_none(), "there is no commit to wait for");
}

#[tokio::test]
async fn usage_can_be_queried_by_minute_model_and_caller() {
    let folder = Folder::new();
    let node = Node::open(&config(&folder.file(), QUOTAS, ""));
    node.spend("gpt-4o", 10, 20);
    node.spend("gpt-4o", 1, 2);
    node.spend("o3", 5, 5);
    let caller = "web".into();
    let subject = Subject { caller: Some(&caller), model: "o3" };
    let too_large = Demand {
        subject,
        prompt: 5_000,
        generates: true,
        cap: Some(1),
        completions: 1,
        backends: &[],
        may_clamp: true,
    };
    assert!(node.account.reserve(&too_large, Duration::ZERO).now_or_never().unwrap().is_err());
    drop(node);
    let of = |column: &str, model: &str| {
        folder.sql(&format!(
            "SELECT sum({column}) FROM usage_by_minute WHERE environment = 'e' AND caller = 'web' AND model = '{model}'"
        ))
    };
    assert_eq!(
        (of("requests", "gpt-4o"), of("prompt_tokens", "gpt-4o"), of("completion_tokens", "gpt-4o")),
        (2, 11, 22)
    );
    assert_eq!((of("requests", "o3"), of("total_tokens", "o3"), of("rejections", "o3")), (1, 10, 1));
    assert_eq!(
        folder.sql("SELECT sum(total_tokens) FROM usage_by_day WHERE day >= date('now', '-1 day')"),
        43
    );
}

#[tokio::test]
async fn old_usage_is_merged_into_days_without_loss() {
    let folder = Folder::new();
    let config = config(&folder.file(), QUOTAS, ", history: 1d");
    drop(Node::open(&config));
    let db = Connection::open(folder.file()).unwrap();
    // One row per minute for three days, of two models.
    db.execute_batch(
        "WITH RECURSIVE m(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM m WHERE n < 4320)
         INSERT INTO usage SELECT unixepoch() / 60 - 1500 - n, 'e', 'm' || (n % 2), 'web', 1, 2, 3, 4, 7 FROM m",
    )
    .unwrap();
    let _node = Node::open(&config);
    soon("old rows are merged", || folder.sql("SELECT count(*) FROM usage") == 0).await;
    assert_eq!(folder.sql("SELECT sum(requests) FROM usage_daily"), 4_320);
    assert_eq!(folder.sql("SELECT sum(total_tokens) FROM usage_by_day"), 4_320 * 7);
    let days = folder.sql("SELECT count(DISTINCT day) FROM usage_daily");
    assert!((3..=4).contains(&days) && folder.sql("SELECT count(*) FROM usage_daily") == days * 2);
}

fn limit(limit: u64) -> LimitChange {
    LimitChange { limit, burst: limit, origin: OverrideOrigin::default() }
}

fn limits(node: &Node) -> Vec<u64> {
    node.account.snapshot().levels[..2].iter().map(|level| level.quota.limit).collect()
}

#[tokio::test]
async fn an_override_applies_to_one_of_two_quotas_of_the_same_length() {
    let folder = Folder::new();
    let config = config(&folder.file(), MONTHS, "");
    let node = Node::open(&config);
    let key = |per| QuotaKey { scope: "environment", name: "", kind: Kind::TotalTokens, per };
    assert!(node.account.set_limit(key("month"), Some(&limit(77))).await.unwrap());
    assert_eq!(limits(&node), [77, 2_000]);
    drop(node);
    let node = Node::open(&config);
    assert_eq!(limits(&node), [77, 2_000]);
    assert!(node.account.set_limit(key("30d"), Some(&limit(88))).await.unwrap());
    drop(node);
    assert_eq!(limits(&Node::open(&config)), [77, 88]);
}

#[test]
fn a_new_time_zone_keeps_the_usage_of_its_current_period() {
    let zones = ["UTC", "Pacific/Kiritimati", "Pacific/Honolulu", "America/New_York", "Asia/Kolkata"];
    for (before, after) in zones.iter().flat_map(|before| zones.map(|after| (before, after))) {
        let folder = Folder::new();
        let of = |zone: &str| {
            let quotas = format!("{{ total_tokens: {{ limit: 100000, per: day, timezone: {zone} }} }}");
            config(&folder.file(), &quotas, "")
        };
        let node = Node::open(&of(before));
        node.spend("gpt-4o", 30, 70);
        drop(node);
        // Usage of every hour of two days. Periods before the saved one have counted it.
        Connection::open(folder.file())
            .unwrap()
            .execute_batch(
                "WITH RECURSIVE h(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM h WHERE n < 48)
                 INSERT INTO usage SELECT unixepoch() / 60 - n * 60, 'e', 'm', 'web', 1, 0, 1, 0, 1 FROM h",
            )
            .unwrap();
        let used = Node::open(&of(after)).used()[0];
        let now = jiff::Timestamp::now().in_tz(after).unwrap();
        let hours = u64::try_from(now.hour()).unwrap();
        if before == &after {
            assert_eq!(used, 100, "{before}");
        } else {
            let offset =
                |zone| jiff::Timestamp::now().in_tz(zone).unwrap().start_of_day().unwrap().timestamp();
            let of_history = if offset(before) > offset(after) { hours } else { 0 };
            assert!(used >= 100 && used <= 100 + hours, "{before} to {after}: {used}");
            let missed = (offset(before).as_second() - offset(after).as_second()).max(0) / 3_600;
            assert!(used + 1 >= 100 + missed.unsigned_abs().min(of_history), "{before} to {after}: {used}");
        }
    }
}

/// The used amounts of the environment's quotas with a limit in a node with these quotas.
fn used_with(folder: &Folder, quotas: &str) -> Vec<u64> {
    let environment =
        |level: &&QuotaLevel| level.quota.scope == Scope::Environment && !level.quota.is_unlimited();
    let levels = Node::open(&config(&folder.file(), quotas, "")).account.snapshot().levels;
    levels.iter().filter(environment).map(|level| level.used).collect()
}

#[test]
fn a_changed_period_or_window_keeps_the_used_amount_up_to_the_new_limit() {
    const DAY: &str = "{ total_tokens: { limit: 1000, per: day } }";
    for (changed, expected) in [
        ("{ total_tokens: { limit: 1000, per: week } }", 100),
        ("{ total_tokens: { limit: 1000, per: month } }", 100),
        ("{ total_tokens: { limit: 1000, per: day, window: rolling } }", 100),
        ("{ total_tokens: { limit: 60, per: day, window: rolling } }", 60),
        ("{ total_tokens: { limit: 1000, per: 3d, window: rolling, burst: 80 } }", 80),
        ("{ total_tokens: { limit: 70, per: month } }", 70),
        ("{ total_tokens: { limit: 70, per: day } }", 70),
        ("{ total_tokens: { limit: 1000, per: day, timezone: Asia/Tokyo } }", 100),
        ("{ total_tokens: [{ limit: 1000, per: week }, { limit: 90, per: 12h }] }", 100),
        ("{ completion_tokens: { limit: 1000, per: week } }", 0),
    ] {
        let folder = Folder::new();
        Node::open(&config(&folder.file(), DAY, "")).spend("gpt-4o", 30, 70);
        for start in 0..3 {
            let used = used_with(&folder, changed);
            assert_eq!(used[0], expected, "{changed}, start {start}");
            assert!(used.get(1).is_none_or(|&used| (88..=90).contains(&used)), "{changed}: {used:?}");
        }
    }
}

#[test]
fn a_removed_quota_that_comes_back_has_the_used_amount_of_its_period() {
    const BOTH: &str =
        "{ total_tokens: [{ limit: 1000, per: day }, { limit: 5000, per: 3d, window: rolling }] }";
    let folder = Folder::new();
    Node::open(&config(&folder.file(), BOTH, "")).spend("gpt-4o", 30, 70);
    assert_eq!(used_with(&folder, "{ total_tokens: { limit: 1000, per: day } }"), [100]);
    assert_eq!(used_with(&folder, "{ requests: { limit: 10, per: day } }"), [0]);
    assert_eq!(used_with(&folder, BOTH), [100, 100]);
    // Amounts of an ended period do not come back.
    let ended = "UPDATE quota SET at_ms = at_ms - 864000000, until_ms = until_ms - 864000000";
    Connection::open(folder.file()).unwrap().execute_batch(ended).unwrap();
    assert_eq!(used_with(&folder, "{ total_tokens: { limit: 1000, per: week } }"), [0]);
}

#[test]
fn a_period_that_is_changed_back_and_forth_counts_all_usage_once() {
    let folder = Folder::new();
    for (round, per) in ["day", "week", "day", "month"].into_iter().enumerate() {
        let quotas = format!("{{ total_tokens: {{ limit: 1000, per: {per} }} }}");
        let node = Node::open(&config(&folder.file(), &quotas, ""));
        assert_eq!(node.used()[0], 100 * round as u64, "{per}");
        node.spend("gpt-4o", 30, 70);
    }
    assert_eq!(
        folder.sql("SELECT count(*) FROM quota WHERE scope = 'environment' AND kind = 'total_tokens'"),
        1
    );
}

#[tokio::test]
async fn merging_old_usage_does_not_delay_requests() {
    let folder = Folder::new();
    let config = config(&folder.file(), QUOTAS, ", history: 1d");
    drop(Node::open(&config));
    // A busy day that is older than `history`: 100 rows per minute.
    Connection::open(folder.file())
        .unwrap()
        .execute_batch(
            "WITH RECURSIVE m(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM m WHERE n < 143999)
             INSERT INTO usage SELECT (unixepoch() / 86400 - 3) * 1440 + n / 100, 'e', 'm' || (n % 100), 'web', 1, 0, 3, 4, 7 FROM m",
        )
        .unwrap();
    let node = Node::open(&config);
    let mut longest = Duration::ZERO;
    let began = Instant::now();
    while folder.sql("SELECT count(*) FROM usage WHERE minute < unixepoch() / 60 - 1440") > 0 {
        assert!(began.elapsed() < Duration::from_mins(1), "the merge does not end");
        let clock = Instant::now();
        let mut reservation = node.reserve("gpt-4o", 0, 1);
        reservation.wait_until_durable().await;
        longest = longest.max(clock.elapsed());
    }
    assert!(longest < Duration::from_millis(500), "{longest:?}");
    assert_eq!(folder.sql("SELECT sum(requests) FROM usage_daily"), 144_000);
    assert_eq!(folder.sql("SELECT count(*) FROM usage_daily"), 100);
}

#[tokio::test]
async fn requests_continue_while_the_file_cannot_be_written() {
    let folder = Folder::new();
    let config = config(&folder.file(), QUOTAS, "");
    let node = Node::open(&config);
    node.spend("gpt-4o", 10, 10);
    soon("the first commit", || folder.sql("SELECT coalesce(sum(total_tokens), 0) FROM usage") == 20).await;
    let elsewhere = Connection::open(folder.file()).unwrap();
    elsewhere.execute_batch("BEGIN IMMEDIATE").unwrap();
    node.spend("gpt-4o", 10, 10);
    soon("the store is reported as unavailable", || node.control.unavailable_reason().is_some()).await;
    assert!(!node.control.is_writing());
    let began = Instant::now();
    for _ in 0..5 {
        let mut reservation = node.reserve("gpt-4o", 10, 10);
        reservation.wait_until_durable().await;
        reservation.observe(Amounts::of_request(10, 10));
    }
    assert!(began.elapsed() < Duration::from_millis(500), "no request waits for a commit");
    elsewhere.execute_batch("ROLLBACK").unwrap();
    soon("the store is available again", || node.control.unavailable_reason().is_none()).await;
    soon("all usage is durable", || folder.sql("SELECT sum(total_tokens) FROM usage") == 140).await;
    assert_eq!(folder.sql("SELECT total_tokens FROM totals"), 140);
}

#[test]
fn a_million_usage_rows_do_not_delay_the_start() {
    let folder = Folder::new();
    let config = config(&folder.file(), QUOTAS, ", history: 365d");
    drop(Node::open(&config));
    let db = Connection::open(folder.file()).unwrap();
    db.execute_batch(
        "WITH RECURSIVE m(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM m WHERE n < 999999)
         INSERT INTO usage SELECT unixepoch() / 60 - n / 10, 'e', 'm' || (n % 10), 'web', 1, 0, 3, 4, 7 FROM m",
    )
    .unwrap();
    drop(db);
    let began = Instant::now();
    let node = Node::open(&config);
    let took = began.elapsed();
    println!("opened with 1,000,000 rows of usage in {} ms", took.as_millis());
    assert!(took < Duration::from_millis(200), "{took:?}");
    drop(node);
}
