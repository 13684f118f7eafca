//! Reservations in the quotas of an environment and of its upstream.

use super::*;
use crate::quota::Wait;

/// The accounts of the environments and of the upstreams of a config, by name.
struct Tied {
    accounts: Vec<(String, Arc<Account>)>,
}

impl Tied {
    /// `upstreams`, `environments`: the lines of these sections.
    fn new(upstreams: &str, environments: &str) -> Self {
        let text =
            format!("upstreams:\n{upstreams}\nenvironments:\n{environments}\nstore: {{ memory: true }}\n");
        let loaded = parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}"));
        let of_environments = loaded.config.environments.iter().map(Owner::from);
        let owners = of_environments.chain(loaded.config.upstreams.iter().map(Owner::from));
        let open = |owner: Owner<'_>| (owner.key().into_owned(), Arc::new(Account::open(owner)));
        Self { accounts: owners.map(open).collect() }
    }

    fn of(&self, name: &str) -> &Arc<Account> {
        &self.accounts.iter().find(|(known, _)| known == name).unwrap().1
    }

    fn backend<'a>(&'a self, upstream: &str, model: &'a str) -> Backend<'a> {
        Backend { account: Some(self.of(&format!("upstream:{upstream}"))), model }
    }

    fn reserve(&self, name: &str, backends: &[Backend<'_>], cap: u64) -> Result<Reservation, NoRoom> {
        let demand = Demand { backends, ..demand(cap) };
        self.of(name).reserve(&demand, Duration::ZERO).now_or_never().unwrap()
    }

    /// Level and held amount of each quota of an account.
    fn levels(&self, name: &str) -> Vec<(i64, u64)> {
        self.of(name).snapshot().levels.iter().map(|level| (level.level, level.held)).collect()
    }
}

const TWO: &str = "  a: { upstream: u, reserve: { completion: max_tokens }, quotas: { total_tokens: { limit: 1000, per: day, window: rolling } } }
  b: { upstream: u, reserve: { completion: max_tokens }, quotas: { total_tokens: { limit: 1000, per: day, window: rolling } } }
  shadow: { upstream: u, enforce: false, reserve: { completion: max_tokens }, quotas: { total_tokens: { limit: 10, per: day, window: rolling } } }";

const U: &str =
    "  u: { base_url: 'http://u/v1', quotas: { total_tokens: { limit: 300, per: day, window: rolling } } }";

#[test]
fn environments_share_the_quotas_of_their_upstream() {
    let tied = Tied::new(U, TWO);
    let u = [tied.backend("u", "m")];
    let mut first = tied.reserve("a", &u, 142).unwrap();
    assert_eq!(tied.levels("upstream:u"), [(150, 150)]);
    assert_eq!(first.standing()[0].map(|status| (status.limit, status.remaining)), Some((300, 150)));
    let denied = tied.reserve("b", &u, 200).unwrap_err();
    let worst = denied.worst().unwrap();
    assert_eq!(worst.quota.scope.describe("b"), "upstream 'u'");
    assert_eq!((worst.remaining, worst.requested), (150, 208));
    assert_eq!(tied.levels("b")[0], (1_000, 0), "nothing is reserved in the environment");
    assert_eq!(tied.of("upstream:u").snapshot().totals.rejected, 1);
    assert_eq!(tied.of("b").snapshot().totals.rejected, 1);
    let second = tied.reserve("b", &u, 142).unwrap();
    first.observe(Amounts::of_request(8, 10));
    drop(first);
    drop(second);
    assert_eq!((tied.levels("upstream:u"), tied.levels("a")[0]), (vec![(282, 0)], (982, 0)));
    assert_eq!(tied.of("upstream:u").snapshot().totals.total, 18);
    assert_eq!(tied.of("upstream:u").in_flight(), 0);
}

#[test]
fn shadow_mode_does_not_lift_the_limits_of_the_upstream() {
    let tied = Tied::new(U, TWO);
    let u = [tied.backend("u", "m")];
    let held = tied.reserve("shadow", &u, 192).unwrap();
    let would = held.would_deny().and_then(NoRoom::worst).unwrap();
    assert_eq!(would.quota.scope.as_str(), "environment");
    let denied = tied.reserve("shadow", &u, 192).unwrap_err();
    let NoRoom::Quota(all) = &denied else { panic!("{denied:?}") };
    let scopes: Vec<&str> = all.shortfalls().iter().map(|short| short.quota.scope.as_str()).collect();
    assert_eq!(scopes, ["upstream"], "its own quotas deny nothing");
    assert_eq!(tied.of("upstream:u").in_flight(), 1);
}

#[test]
fn a_request_is_clamped_only_if_no_upstream_has_room_for_all_of_it() {
    let of = |name: &str, limit: u64| {
        format!(
            "  {name}: {{ base_url: 'http://{name}/v1', quotas: {{ total_tokens: {{ limit: {limit}, per: day, window: rolling }} }} }}\n"
        )
    };
    let clamps = "  a: { upstream: u, reserve: { completion: max_tokens, when_short: clamp }, quotas: { total_tokens: { limit: 1000, per: day, window: rolling } } }";
    let tied = Tied::new(&(of("u", 100) + &of("v", 300)), clamps);
    let both = [tied.backend("u", "m"), tied.backend("v", "m")];
    let whole = tied.reserve("a", &both, 200).unwrap();
    assert_eq!((whole.backend(), whole.clamped_to()), (1, None), "the second one has room for all of it");
    let clamped = tied.reserve("a", &both, 200).unwrap();
    assert_eq!(
        (clamped.backend(), clamped.clamped_to()),
        (0, Some(92)),
        "no upstream has room for all of it"
    );
}

#[test]
fn a_denial_lists_the_quotas_of_both() {
    let tied = Tied::new(U, TWO);
    let denied = tied.reserve("a", &[tied.backend("u", "m")], 5_000).unwrap_err();
    let NoRoom::Quota(all) = denied else { panic!("{denied:?}") };
    let scopes: Vec<&str> = all.shortfalls().iter().map(|short| short.quota.scope.as_str()).collect();
    assert_eq!(scopes, ["environment", "upstream"]);
    assert!(all.shortfalls().iter().all(|short| short.wait == Wait::Never));
}

#[test]
fn quotas_of_models_go_by_the_name_that_is_sent() {
    let upstreams = "  u: { base_url: 'http://u/v1', model_quotas: { 'gpt-*': { requests: { limit: 1, per: day, window: rolling } } } }";
    let tied = Tied::new(upstreams, TWO);
    let held = tied.reserve("a", &[tied.backend("u", "gpt-4o")], 1).unwrap();
    let denied = tied.reserve("b", &[tied.backend("u", "gpt-5")], 1).unwrap_err();
    let scope = &denied.worst().unwrap().quota.scope;
    assert_eq!((scope.as_str(), scope.name()), ("upstream_model", "u/gpt-*"));
    assert_eq!(scope.describe("b"), "model 'gpt-*' of upstream 'u'");
    drop(tied.reserve("b", &[tied.backend("u", "claude")], 1).unwrap());
    drop(held);
}

#[test]
fn the_maximum_in_flight_of_an_upstream_counts_all_environments() {
    let tied = Tied::new("  u: { base_url: 'http://u/v1', max_in_flight: 1 }", TWO);
    let u = [tied.backend("u", "m")];
    let held = tied.reserve("a", &u, 1).unwrap();
    let full = NoRoom::InFlight { limit: 1, upstream: Some("u".into()) };
    assert_eq!(tied.reserve("b", &u, 1).unwrap_err(), full);
    assert_eq!(tied.reserve("shadow", &u, 1).unwrap_err(), full);
    drop(held);
    drop(tied.reserve("b", &u, 1).unwrap());
}

const U_AND_V: &str =
    "  u: { base_url: 'http://u/v1', quotas: { total_tokens: { limit: 300, per: day, window: rolling } } }
  v: { base_url: 'http://v/v1', quotas: { total_tokens: { limit: 200, per: hour } } }";

#[test]
fn the_first_upstream_with_room_is_taken() {
    let tied = Tied::new(U_AND_V, TWO);
    let both = [tied.backend("u", "m"), tied.backend("v", "m")];
    let first = tied.reserve("a", &both, 192).unwrap();
    let second = tied.reserve("b", &both, 92).unwrap();
    assert_eq!((first.backend(), second.backend()), (0, 0));
    let third = tied.reserve("b", &both, 92).unwrap();
    assert_eq!(third.backend(), 1);
    let denied = tied.reserve("b", &both, 142).unwrap_err();
    assert_eq!(denied.worst().unwrap().quota.scope.name(), "v", "an hour's quota fits first");
    let unlimited = [both[0], Backend { account: None, model: "m" }];
    assert_eq!(tied.reserve("b", &unlimited, 142).unwrap().backend(), 1);
    drop((first, second, third));
}

#[test]
fn a_reservation_moves_to_another_upstream_or_stays() {
    let tied = Tied::new(U_AND_V, TWO);
    let mut moved = tied.reserve("a", &[tied.backend("u", "m")], 142).unwrap();
    let v = tied.backend("v", "other");
    moved.move_to(1, &v).now_or_never().unwrap().unwrap();
    assert_eq!((moved.backend(), moved.reserved().total), (1, 150));
    assert_eq!((tied.levels("upstream:u"), tied.levels("upstream:v")), (vec![(300, 0)], vec![(50, 150)]));
    assert_eq!(tied.levels("a")[0], (850, 150));
    assert_eq!(moved.standing()[0].map(|status| status.limit), Some(200));

    let mut stays = tied.reserve("b", &[tied.backend("u", "m")], 142).unwrap();
    assert!(stays.move_to(1, &v).now_or_never().unwrap().is_err());
    assert_eq!((tied.levels("upstream:u"), tied.levels("upstream:v")), (vec![(150, 150)], vec![(50, 150)]));
    stays.observe(Amounts::of_request(8, 0));
    drop(stays);
    assert_eq!(tied.levels("upstream:u"), [(292, 0)]);

    // Within an upstream a reservation does not need its room twice.
    moved.move_to(1, &tied.backend("v", "third")).now_or_never().unwrap().unwrap();
    assert_eq!(tied.levels("upstream:v"), [(50, 150)]);
    moved.move_to(2, &Backend { account: None, model: "m" }).now_or_never().unwrap().unwrap();
    moved.observe(Amounts::of_request(8, 142));
    drop(moved);
    assert_eq!((tied.levels("upstream:v"), tied.levels("a")[0]), (vec![(200, 0)], (850, 0)));
    assert_eq!((tied.of("upstream:u").in_flight(), tied.of("upstream:v").in_flight()), (0, 0));
}

#[test]
fn a_stream_is_extended_in_both_or_in_none() {
    let environments = "  a: { upstream: u, reserve: { completion: 10 }, quotas: { total_tokens: { limit: 1000, per: day, window: rolling } } }";
    let tied = Tied::new(U, environments);
    let mut stream = tied.reserve("a", &[tied.backend("u", "m")], 5_000).unwrap();
    assert_eq!(stream.progress(Amounts::of_request(8, 50)), Progress::Within);
    let reserved = stream.reserved().total;
    assert!(reserved >= 58);
    let held = i64::try_from(reserved - 58).unwrap();
    assert_eq!(tied.levels("upstream:u"), [(300 - held - 58, reserved - 58)]);
    assert_eq!(stream.progress(Amounts::of_request(8, 400)), Progress::Overrun, "the upstream has no room");
    stream.observe(Amounts::of_request(8, 400));
    drop(stream);
    assert_eq!((tied.levels("upstream:u"), tied.levels("a")[0]), (vec![(-108, 0)], (592, 0)));
}

#[test]
fn an_allowance_does_not_exceed_what_the_upstream_can_hold() {
    let environments = "  a: { upstream: u, quotas: { total_tokens: { limit: 100000, per: day } } }";
    let tied = Tied::new(U, environments);
    let backends = [tied.backend("u", "m")];
    let reservation = tied.reserve("a", &backends, 5_000).unwrap();
    assert_eq!(reservation.reserved().completion, 146, "half of the room of 300 after the prompt");
}

#[test]
fn clamping_takes_the_upstream_into_account() {
    let environments = "  a: { upstream: u, reserve: { completion: max_tokens, when_short: clamp }, quotas: { total_tokens: { limit: 1000, per: day } } }";
    let tied = Tied::new(U, environments);
    let clamped = tied.reserve("a", &[tied.backend("u", "m")], 900).unwrap();
    assert_eq!((clamped.clamped_to(), clamped.reserved().total), (Some(292), 300));
    let denied = tied.reserve("a", &[tied.backend("u", "m")], 900).unwrap_err();
    assert_eq!(denied.worst().unwrap().quota.scope.name(), "u");
}

#[tokio::test]
async fn a_request_waits_as_long_as_any_of_its_upstreams_may_have_room() {
    let upstreams =
        "  u: { base_url: 'http://u/v1', quotas: { requests: { limit: 1, per: day, window: rolling } } }
  v: { base_url: 'http://v/v1', max_in_flight: 1 }";
    let tied = Tied::new(upstreams, TWO);
    let both = [tied.backend("u", "m"), tied.backend("v", "m")];
    let mut spent = tied.reserve("a", &both, 1).unwrap();
    spent.observe(Amounts::of_request(8, 1));
    drop(spent);
    let held = tied.reserve("a", &both, 1).unwrap();
    assert_eq!(held.backend(), 1);
    let denied = tied.reserve("b", &both, 1).unwrap_err();
    let full = NoRoom::InFlight { limit: 1, upstream: Some("v".into()) };
    assert_eq!(denied, full, "a request in flight ends before a day is over");
    let waits = Demand { backends: &both, ..demand(1) };
    let mut waiting = pin!(tied.of("b").reserve(&waits, LONG));
    assert!(timeout(Duration::from_millis(20), &mut waiting).await.is_err());
    drop(held);
    assert_eq!(at_once(waiting).await.unwrap().backend(), 1);
    // The quota of u alone would not be refilled in time.
    let only_u = Demand { backends: &both[..1], ..demand(1) };
    assert!(at_once(tied.of("b").reserve(&only_u, LONG)).await.is_err());
}

#[tokio::test]
async fn a_release_in_one_environment_wakes_a_request_of_another() {
    let tied = Tied::new(U, TWO);
    let u = [tied.backend("u", "m")];
    let held = tied.reserve("a", &u, 282).unwrap();
    let waits = Demand { backends: &u, ..demand(282) };
    let mut waiting = pin!(tied.of("b").reserve(&waits, LONG));
    assert!(timeout(Duration::from_millis(20), &mut waiting).await.is_err());
    drop(held);
    let reservation = at_once(waiting).await.unwrap();
    assert_eq!(reservation.reserved().total, 290);
}
