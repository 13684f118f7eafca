//! Whether a server's settings and a user's rights are what shared quotas need. Pure, but for the words of the
//! commands it wants sent.

/// Tries every command of the script on a key of its own, and answers with what each that failed says.
pub(super) const TRIAL: &str = "
local failed = {}
for _, line in ipairs(ARGV) do
  local words = {}
  for word in line:gmatch('%S+') do words[#words + 1] = word == '_' and KEYS[1] or word end
  local reply = redis.pcall(unpack(words))
  if type(reply) == 'table' and reply.err then
    failed[#failed + 1] = words[1]
    failed[#failed + 1] = reply.err
  end
end
if not cmsgpack then failed = { 'cmsgpack', 'there is no cmsgpack for scripts' } end
return failed";

/// What the trial tries: the script's commands. The last one leaves nothing behind.
pub(super) const TRIED: [&str; 13] = [
    "TIME",
    "HSET _ f 1",
    "HINCRBY _ f 1",
    "HGET _ f",
    "HMGET _ f",
    "HGETALL _",
    "HKEYS _",
    "HLEN _",
    "HEXISTS _ f",
    "HSCAN _ 0",
    "PEXPIRE _ 60000",
    "PTTL _",
    "HDEL _ f",
];

/// What a user with too few rights needs.
pub(super) fn rights(prefix: &str) -> String {
    let commands = TRIED.iter().map(|line| line.split(' ').next().unwrap_or_default().to_lowercase());
    let commands: Vec<_> =
        ["eval", "evalsha", "set"].map(str::to_owned).into_iter().chain(commands).collect();
    format!(
        "the user needs ~{prefix}:* +{} (and should have +info +role +config|get; in a cluster it needs +cluster|slots)",
        commands.join(" +")
    )
}

/// What the trial has found; `None`: nothing.
pub(super) fn trial(failed: &[String], prefix: &str) -> Option<String> {
    let (command, says) = (failed.first()?, failed.get(1)?);
    let is_right = ["NOPERM", "The user executing", "permission"].iter().any(|word| says.contains(word));
    let others: Vec<_> = failed.chunks_exact(2).skip(1).map(|pair| pair[0].as_str()).collect();
    let mut text = format!("refuses {command}");
    if !others.is_empty() {
        text += &format!(", {}", others.join(", "));
    }
    text += &format!(": {says}");
    if is_right {
        text = format!("{}; {}", text.trim_end_matches('.'), rights(prefix));
    }
    Some(text)
}

/// Looks through what `INFO` tells, and the setting `save`, if that may be read.
pub(super) fn settings(info: &str, save: Option<&str>, is_cluster: bool) -> Vec<String> {
    let field = |name: &str| {
        info.lines()
            .find_map(|line| line.trim_end().strip_prefix(name)?.strip_prefix(':'))
            .unwrap_or_default()
    };
    let mut faults = Vec::new();
    let version = field("redis_version");
    let mut parts = version.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let (major, minor) = (parts.next().unwrap_or(0), parts.next().unwrap_or(0));
    if (major, minor) < (6, 2) {
        faults.push(format!("it is Redis {version}: quotas need 6.2 or newer, or Valkey"));
    }
    let policy = field("maxmemory_policy");
    if policy != "noeviction" {
        faults.push(format!(
            "its maxmemory-policy is {policy}: a quota that is evicted is a fresh one; set it to noeviction"
        ));
    }
    if field("role") == "slave" {
        faults.push(
            "it is a replica: what is counted there is lost; the URL has to lead to the master".to_owned(),
        );
    }
    if field("cluster_enabled") == "1" && !is_cluster {
        faults.push(
            "it is one server of a cluster: begin the URL with redis+cluster:// or rediss+cluster://"
                .to_owned(),
        );
    }
    if field("aof_enabled") == "0" && save == Some("") {
        faults.push(
            "note: it keeps nothing on disk (appendonly no, save \"\"): restarted, it begins with what the nodes still know"
                .to_owned(),
        );
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_lose_counts_are_told() {
        let told = |version: &str, policy: &str, more: &str, save: &str| {
            let info =
                format!("# Server\r\nredis_version:{version}\r\nmaxmemory_policy:{policy}\r\n{more}\r\n");
            settings(&info, Some(save), false)
        };
        for (version, policy, more, save, words) in [
            ("7.0.15", "noeviction", "role:master\r\naof_enabled:0", "3600 1", &[][..]),
            ("6.2.0", "noeviction", "aof_enabled:1", "", &[]),
            ("10.1", "noeviction", "cluster_enabled:0", "", &[]),
            ("6.0.16", "noeviction", "", "", &["6.2 or newer"]),
            ("7.2.4", "allkeys-lru", "", "", &["set it to noeviction"]),
            ("5.0", "volatile-ttl", "", "", &["6.2 or newer", "set it to noeviction"]),
            ("7.0", "noeviction", "role:slave", "", &["replica"]),
            ("7.0", "noeviction", "cluster_enabled:1", "", &["redis+cluster"]),
            ("7.0", "noeviction", "aof_enabled:0", "", &["note: it keeps nothing"]),
        ] {
            let told = told(version, policy, more, save);
            assert_eq!(told.len(), words.len(), "{told:?}");
            assert!(told.iter().zip(words).all(|(told, word)| told.contains(word)), "{told:?}");
        }
        assert!(
            settings("redis_version:7.0\nmaxmemory_policy:noeviction\ncluster_enabled:1", None, true)
                .is_empty()
        );
    }

    #[test]
    fn a_trial_tells_what_is_missing() {
        let failed = ["HSET", "NOPERM no permissions.", "HGET", "NOPERM"].map(str::to_owned);
        let told = trial(&failed, "tg").unwrap();
        assert!(
            told.starts_with("refuses HSET, HGET: NOPERM no permissions; the user needs ~tg:* +eval "),
            "{told}"
        );
        assert_eq!(trial(&[], "tg"), None);
        let full = trial(&["HSET", "OOM not allowed"].map(str::to_owned), "tg").unwrap();
        assert_eq!(full, "refuses HSET: OOM not allowed");
    }
}
