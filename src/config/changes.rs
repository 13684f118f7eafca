//! What differs between two configs, for the log and the admin API, and what cannot change while the gateway runs.

use super::{Config, Environment, RouteSettings, Secret, StoreSettings};
use crate::quota::{Quota, Window};
use std::fmt::Display;

/// One message for each setting that differs and cannot change while the gateway runs.
pub(crate) fn restart_faults(old: &Config, new: &Config) -> Vec<String> {
    let mut faults = Vec::new();
    let mut check = |setting: &str, before: &dyn Display, after: &dyn Display, differs: bool| {
        if differs {
            faults.push(format!(
                "{setting} cannot change while the gateway runs (it is {before}, the file has {after}): a restart is needed, \
                 or set it back"
            ));
        }
    };
    let (before, after) = (&old.server.listen, &new.server.listen);
    check("server.listen", before, after, before != after);
    let (before, after) = (&old.admin.listen, &new.admin.listen);
    check("admin.listen", before, after, before != after);
    check("store.memory", &old.store.memory, &new.store.memory, old.store.memory != new.store.memory);
    let paths_differ = !old.store.memory && !new.store.memory && old.store.path != new.store.path;
    check("store.path", &old.store.path.display(), &new.store.path.display(), paths_differ);
    let url = |store: &StoreSettings| store.redis.as_ref().map(|redis| redis.url.clone());
    let show = |url: Option<Secret>| if url.is_some() { "another URL" } else { "no URL" };
    let (before, after) = (url(&old.store), url(&new.store));
    let differs = before != after;
    check("store.redis.url", &show(before).replace("another", "a"), &show(after), differs);
    if let (Some(old), Some(new)) = (&old.store.redis, &new.store.redis) {
        check("store.redis.prefix", &old.prefix, &new.prefix, old.prefix != new.prefix);
        let [before, after] = [old, new].map(|redis| format!("{:?}", redis.timeout));
        check("store.redis.timeout", &before, &after, before != after);
    }
    // Other keys would begin with other counters.
    let has_limits = |config: &Config| config.shared_slot().is_some();
    if !differs && has_limits(old) != has_limits(new) {
        let what =
            if has_limits(new) { "added to the first upstream" } else { "removed from the last upstream" };
        faults.push(format!(
            "upstreams.*.quotas, model_quotas and max_in_flight cannot be {what} while the gateway runs with Redis Cluster: \
             the keys of all environments would change; restart all nodes, or set it back"
        ));
    }
    faults
}

/// What changed, one line each.
pub(crate) fn changes(old: &Config, new: &Config) -> Vec<String> {
    let mut lines = Vec::new();
    for environment in &new.environments {
        match old.environment(&environment.name) {
            None => lines.push(format!("environment {} added", environment.name)),
            Some((_, before)) => describe_environment(before, environment, &mut lines),
        }
    }
    let gone = old.environments.iter().filter(|known| new.environment(&known.name).is_none());
    lines.extend(gone.map(|environment| format!("environment {} removed", environment.name)));
    for upstream in &new.upstreams {
        match old.upstreams.iter().find(|known| known.name == upstream.name) {
            None => lines.push(format!("upstream {} added", upstream.name)),
            Some(before) if before != upstream => lines.push(format!("upstream {} changed", upstream.name)),
            Some(_) => {}
        }
    }
    let gone = old.upstreams.iter().filter(|u| new.upstreams.iter().all(|other| other.name != u.name));
    lines.extend(gone.map(|upstream| format!("upstream {} removed", upstream.name)));
    let default = |config: &Config| Some(config.environments.get(config.default_environment?)?.name.clone());
    for (listener, old, new) in
        [("server", &old.server.tls, &new.server.tls), ("admin", &old.admin.tls, &new.admin.tls)]
    {
        match (old, new) {
            (None, Some(_)) => lines.push(format!("{listener}.tls added: HTTPS instead of HTTP")),
            (Some(_), None) => lines.push(format!("{listener}.tls removed: HTTP instead of HTTPS")),
            _ => {}
        }
    }
    for (section, differs) in [
        ("server", old.server != new.server),
        ("admin", old.admin != new.admin),
        ("default_environment", default(old) != default(new)),
        ("models", old.models != new.models),
        ("store", old.store != new.store),
        ("telemetry", old.telemetry != new.telemetry),
    ] {
        if differs {
            lines.push(format!("{section} changed"));
        }
    }
    lines
}

fn describe_environment(before: &Environment, after: &Environment, lines: &mut Vec<String>) {
    let name = &after.name;
    let find = |quotas: &'_ [Quota], quota: &Quota| quotas.iter().find(|q| q.is_same_as(quota)).cloned();
    for quota in &after.quotas {
        let what = || format!("{}: {} per {}", quota.scope.describe(name), quota.kind, quota.per.text);
        match find(&before.quotas, quota) {
            None => lines.push(format!("{} added, {}", what(), amount(quota))),
            Some(old) if old != *quota => {
                lines.push(format!("{} changed from {} to {}", what(), amount(&old), amount(quota)));
            }
            Some(_) => {}
        }
    }
    for quota in before.quotas.iter().filter(|quota| find(&after.quotas, quota).is_none()) {
        let owner = quota.scope.describe(name);
        lines.push(format!("{owner}: {} per {} removed", quota.kind, quota.per.text));
    }
    if before.callers != after.callers {
        lines.push(format!("environment {name}: callers or their keys changed"));
    }
    let without = |environment: &Environment| Environment {
        quotas: Vec::new(),
        callers: Vec::new(),
        upstream: after.upstream.clone(),
        routes: Vec::new(),
        ..environment.clone()
    };
    // The settings of an upstream are described with the upstream.
    let routes = |environment: &Environment| -> Vec<_> {
        let names =
            |route: &RouteSettings| route.upstreams.iter().map(|u| u.name.clone()).collect::<Vec<_>>();
        let own = |route: &RouteSettings| RouteSettings { upstreams: Vec::new(), ..route.clone() };
        environment.routes.iter().map(|route| (own(route), names(route))).collect()
    };
    if routes(before) != routes(after) {
        lines.push(format!("environment {name}: routes changed"));
    }
    if before.upstream.name != after.upstream.name || without(before) != without(after) {
        lines.push(format!("environment {name}: settings changed"));
    }
}

fn amount(quota: &Quota) -> String {
    let limit = quota.limit_text();
    match &quota.window {
        Window::Rolling { burst } if *burst != quota.limit => format!("limit {limit}, burst {burst}"),
        Window::Rolling { .. } => format!("limit {limit}"),
        Window::Calendar { zone, .. } => {
            format!("limit {limit} ({})", zone.iana_name().unwrap_or("UTC"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::parse;

    fn config(rest: &str) -> Config {
        let text = format!("upstreams: {{ u: {{ base_url: 'http://u/v1' }} }}\n{rest}");
        parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}")).config
    }

    #[test]
    fn every_change_is_described() {
        let old = config(
            "environments:\n  a: { upstream: u, quotas: { requests: { limit: 5, per: minute }, total_tokens: { limit: 9, per: day } } }\n  b: { upstream: u, quotas: { requests: { limit: 5, per: minute } } }\n",
        );
        assert!(changes(&old, &old).is_empty());
        let new = config(
            "environments:\n  a: { upstream: u, quotas: { requests: { limit: 7, per: minute }, prompt_tokens: { limit: 9, per: day } } }\n  c: { upstream: u, quotas: { requests: { limit: 5, per: minute } } }\nserver: { drain_timeout: 1s }\n",
        );
        assert_eq!(
            changes(&old, &new),
            [
                "environment 'a': prompt_tokens per day added, limit 9 (UTC)",
                "environment 'a': requests per minute changed from limit 5 to limit 7",
                "environment 'a': total_tokens per day removed",
                "environment c added",
                "environment b removed",
                "server changed",
            ]
        );
    }

    #[test]
    fn tls_that_is_switched_on_or_off_is_named() {
        let environments =
            "environments: { a: { upstream: u, quotas: { requests: { limit: 5, per: minute } } } }\n";
        let old = config(environments);
        let new = config(&format!("{environments}server: {{ tls: {{ cert: a.pem, key: b.pem }} }}\n"));
        let added = ["server.tls added: HTTPS instead of HTTP", "server changed"];
        assert_eq!(changes(&old, &new), added);
        let removed = ["server.tls removed: HTTP instead of HTTPS", "server changed"];
        assert_eq!(changes(&new, &old), removed);
    }

    #[test]
    fn a_change_of_routes_is_described_once() {
        let with = |url: &str, routes: &str| {
            let text = format!(
                "upstreams: {{ u: {{ base_url: 'http://{url}' }}, v: {{ base_url: 'http://v' }} }}\nenvironments: {{ a: {{ upstream: v{routes} }} }}\n"
            );
            parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}")).config
        };
        let routes = ", routes: [{ models: [a], upstream: [u, v] }]";
        let old = with("u", routes);
        assert_eq!(changes(&old, &with("x", routes)), ["upstream u changed"]);
        for other in [
            "",
            ", routes: [{ models: [a], upstream: [v, u] }]",
            ", routes: [{ models: [b], upstream: [u, v] }]",
        ] {
            assert_eq!(changes(&old, &with("u", other)), ["environment a: routes changed"], "{other}");
        }
    }

    #[test]
    fn settings_that_need_a_restart_are_named_and_no_url_is_shown() {
        let environments =
            "environments: { a: { upstream: u, quotas: { requests: { limit: 5, per: minute } } } }\n";
        let old = config(&format!("{environments}store: {{ path: a.db }}\n"));
        assert!(restart_faults(&old, &old).is_empty());
        let new = config(&format!(
            "{environments}server: {{ listen: '127.0.0.1:1' }}\nadmin: {{ listen: '127.0.0.1:2' }}\n\
             store: {{ path: b.db, redis: {{ url: 'redis://u:secret@127.0.0.1:1/0' }} }}\n"
        ));
        let faults = restart_faults(&old, &new);
        for (fault, setting) in
            faults.iter().zip(["server.listen", "admin.listen", "store.path", "store.redis.url"])
        {
            assert!(fault.starts_with(&format!("{setting} cannot change")), "{fault}");
            assert!(fault.contains("a restart is needed") && !fault.contains("secret"), "{fault}");
        }
        assert_eq!(faults.len(), 4);
    }

    #[test]
    fn in_a_cluster_the_first_limits_of_an_upstream_need_a_restart() {
        let of = |url: &str, limits: &str| {
            let text = format!(
                "upstreams: {{ u: {{ base_url: 'http://u/v1', {limits} }} }}\n\
                 environments: {{ a: {{ upstream: u, quotas: {{ requests: {{ limit: 5, per: minute }} }} }} }}\n\
                 store: {{ redis: {{ url: '{url}' }} }}\n"
            );
            parse(&text, "test.yaml", &|_| None, &[]).unwrap_or_else(|faults| panic!("{faults}")).config
        };
        let limits = ["", "max_in_flight: 5", "quotas: { requests: { limit: 5, per: minute } }"];
        let [none, one, other] = limits.map(|limits| of("rediss+cluster://a", limits));
        assert_eq!(other.shared_slot(), Some("environments"));
        let faults = restart_faults(&none, &one);
        assert!(faults.len() == 1 && faults[0].contains("upstreams.*.quotas"), "{faults:?}");
        assert!(faults[0].contains("added to the first upstream"), "{faults:?}");
        assert!(restart_faults(&one, &none)[0].contains("removed from the last upstream"));
        assert!(restart_faults(&one, &other).is_empty());
        let [none, one, _] = limits.map(|limits| of("redis://a", limits));
        assert!(restart_faults(&none, &one).is_empty() && one.shared_slot().is_none());
    }
}
