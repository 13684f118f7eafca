//! Many nodes that reserve from one quota at once, by the server's own clock.

use super::server::Server;
use tollgate::clock;
use tollgate::quota::{Amounts, Kind, Period, Quota, Scope, Window};
use tollgate::redis::{OnShortage, ReserveRequest, Verdict};

#[test]
fn a_burst_from_two_four_and_eight_nodes_admits_exactly_the_quota() {
    for nodes in [2_u64, 4, 8] {
        let server = Server::start();
        // The quota admits 50 requests of 100 tokens. It hardly refills while the test runs.
        let per = Period { text: "day".into(), ms: 86_400_000 };
        let window = Window::Rolling { burst: 5_050 };
        let quota = Quota { scope: Scope::Environment, kind: Kind::TotalTokens, limit: 10, per, window };
        let now = clock::now();
        let burst = |n: u64| {
            let mut node = server.node(&format!("node-{n}"), std::slice::from_ref(&quota), now);
            node.join(now);
            (0..1_000 / nodes)
                .filter(|k| {
                    let id = format!("{n}-{k}");
                    let reserve = ReserveRequest {
                        id: &id,
                        max_in_flight: 0,
                        on_shortage: OnShortage::Reject,
                        generates: true,
                        amounts: Amounts::of_request(40, 60),
                        completions: 1,
                    };
                    let command = node.commands.reserve(&reserve, &[0]);
                    node.call(&command).verdict == Verdict::Admitted
                })
                .count()
        };
        let admitted: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..nodes).map(|n| scope.spawn(move || burst(n))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).sum()
        });
        assert_eq!(admitted, 50, "{nodes} nodes");
    }
}
