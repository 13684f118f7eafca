//! Requirements of shared quotas: the commands that a user must be permitted to run, and the server's settings. Pure:
//! the caller sends the commands and passes the replies.

/// A script that runs each command of its arguments on its key. Returns the name and the error of each that failed.
pub(super) const TEST_SCRIPT: &str = "
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

/// The arguments of the test script: every command that the quota script uses. `_` stands for the key. The last
/// command deletes the fields that the others wrote.
pub(super) const TESTED_COMMANDS: [&str; 13] = [
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

/// The rights that a user needs, for error messages.
pub(super) fn required_rights(prefix: &str) -> String {
    let tested = TESTED_COMMANDS.iter().map(|line| line.split(' ').next().unwrap_or_default().to_lowercase());
    let commands: Vec<_> = ["eval", "evalsha", "set"].map(str::to_owned).into_iter().chain(tested).collect();
    format!(
        "the user needs ~{prefix}:* +{} (and should have +info +role +config|get; in a cluster it needs +cluster|slots)",
        commands.join(" +")
    )
}

/// Describes the result of the test script. `None`: every command succeeded.
pub(super) fn command_fault(failures: &[String], prefix: &str) -> Option<String> {
    let (command, error) = (failures.first()?, failures.get(1)?);
    let is_missing_right =
        ["NOPERM", "The user executing", "permission"].iter().any(|word| error.contains(word));
    let others: Vec<_> = failures.chunks_exact(2).skip(1).map(|pair| pair[0].as_str()).collect();
    let mut text = format!("refuses {command}");
    if !others.is_empty() {
        text += &format!(", {}", others.join(", "));
    }
    text += &format!(": {error}");
    if is_missing_right {
        text = format!("{}; {}", text.trim_end_matches('.'), required_rights(prefix));
    }
    Some(text)
}

/// The text of a finding about the server that is only a note. `None`: it is a fault.
pub(crate) fn note(finding: &str) -> Option<&str> {
    finding.strip_prefix("note: ")
}

/// Finds wrong settings in the reply to `INFO` and in the setting `save`, if the user may read that.
pub(super) fn setting_faults(info: &str, save: Option<&str>, is_cluster_url: bool) -> Vec<String> {
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
            "its maxmemory-policy is {policy}: an evicted quota is unused again; set it to noeviction"
        ));
    }
    if field("role") == "slave" {
        faults.push(
            "it is a replica, and counts written to it are lost: the URL must point to the master".to_owned(),
        );
    }
    if field("cluster_enabled") == "1" && !is_cluster_url {
        faults.push(
            "it is one server of a cluster: begin the URL with redis+cluster:// or rediss+cluster://"
                .to_owned(),
        );
    }
    if field("aof_enabled") == "0" && save == Some("") {
        faults.push(
            "note: it stores nothing on disk (appendonly no, save \"\"): after a restart it has only the data that the nodes restore"
                .to_owned(),
        );
    }
    faults
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_that_lose_counts_are_reported() {
        let faults = |version: &str, policy: &str, more: &str, save: &str| {
            let info =
                format!("# Server\r\nredis_version:{version}\r\nmaxmemory_policy:{policy}\r\n{more}\r\n");
            setting_faults(&info, Some(save), false)
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
            ("7.0", "noeviction", "aof_enabled:0", "", &["note: it stores nothing"]),
        ] {
            let faults = faults(version, policy, more, save);
            assert_eq!(faults.len(), words.len(), "{faults:?}");
            assert!(faults.iter().zip(words).all(|(fault, word)| fault.contains(word)), "{faults:?}");
        }
        let info = "redis_version:7.0\nmaxmemory_policy:noeviction\ncluster_enabled:1";
        assert!(setting_faults(info, None, true).is_empty());
    }

    #[test]
    fn failed_commands_are_reported_with_the_required_rights() {
        let failures = ["HSET", "NOPERM no permissions.", "HGET", "NOPERM"].map(str::to_owned);
        let fault = command_fault(&failures, "tg").unwrap();
        assert!(
            fault.starts_with("refuses HSET, HGET: NOPERM no permissions; the user needs ~tg:* +eval "),
            "{fault}"
        );
        assert_eq!(command_fault(&[], "tg"), None);
        let out_of_memory = command_fault(&["HSET", "OOM not allowed"].map(str::to_owned), "tg").unwrap();
        assert_eq!(out_of_memory, "refuses HSET: OOM not allowed");
    }
}
