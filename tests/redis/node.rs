//! A node without the gateway, for tests of the script.

use tollgate::clock::Timestamp;
use tollgate::quota::{CalendarPeriod, CounterState, Quota, Quotas, Window};
use tollgate::redis::{
    Cells, CommandBuilder, OverrideMark, SCRIPT, ScriptCommand, ScriptReply, Verdict, load_states,
};

/// A node that calls the script directly, on its own connection.
pub struct Node {
    connection: redis::Connection,
    pub commands: CommandBuilder,
    keys: [String; 3],
    sha: String,
    pub quotas: Vec<Quota>,
}

impl Node {
    /// A node of the environment `staging`.
    pub fn new(connection: redis::Connection, session: &str, quotas: &[Quota], now: Timestamp) -> Self {
        Self::of(connection, session, "staging", quotas, now)
    }

    /// A node of an environment or of an upstream.
    pub fn of(
        mut connection: redis::Connection,
        session: &str,
        account: &str,
        quotas: &[Quota],
        now: Timestamp,
    ) -> Self {
        let commands = CommandBuilder::new(Cells::new(quotas, now), session, now);
        let keys = commands.keys("test", None, account);
        let sha = redis::cmd("SCRIPT").arg("LOAD").arg(SCRIPT).query(&mut connection).unwrap();
        Self { connection, commands, keys, sha, quotas: quotas.to_vec() }
    }

    /// Builds a command and runs it.
    pub fn run(&mut self, build: impl FnOnce(&mut CommandBuilder) -> ScriptCommand) -> ScriptReply {
        let command = build(&mut self.commands);
        self.call(&command)
    }

    pub fn call(&mut self, command: &ScriptCommand) -> ScriptReply {
        self.call_with(&[], command)
    }

    /// Calls with the keys of this node and of its upstream.
    pub fn call_at(&mut self, upstream: &Self, command: &ScriptCommand) -> ScriptReply {
        self.call_with(&upstream.keys, command)
    }

    fn call_with(&mut self, more_keys: &[String], command: &ScriptCommand) -> ScriptReply {
        let mut call = redis::cmd("EVALSHA");
        let keys = [&self.keys[..], more_keys].concat();
        call.arg(&self.sha).arg(keys.len()).arg(&keys).arg(&command.arguments);
        let numbers: Vec<i64> = call.query(&mut self.connection).unwrap();
        command.parse_reply(&numbers).unwrap_or_else(|| panic!("{command:?}: {numbers:?}"))
    }

    /// Joins. Cells that do not exist are created full.
    pub fn join(&mut self, now: Timestamp) {
        let states = full_states(&self.quotas, now);
        assert_eq!(self.run(|commands| commands.join(1, None, &states, None)).verdict, Verdict::Done);
    }

    pub fn heartbeat(&mut self) -> ScriptReply {
        let mut reply = self.run(CommandBuilder::heartbeat);
        assert_eq!(reply.verdict, Verdict::Done);
        // Nodes alive and requests in flight. The others are about overrides.
        reply.values.truncate(2);
        reply
    }

    /// Deletes all data of the server, as a restart without a disk does.
    pub fn flush_server(&mut self) {
        let (): () = redis::cmd("FLUSHALL").query(&mut self.connection).unwrap();
    }

    /// The server's state of every quota, loaded into an engine of the node.
    pub fn mirror(&mut self, now: Timestamp) -> Quotas {
        let reply = self.heartbeat();
        let mut mirror = Quotas::new(&self.quotas, now);
        let all: Vec<u32> = (0..).take(self.quotas.len()).collect();
        load_states(&mut mirror, &all, &reply);
        mirror
    }
}

/// The states of a reply as those of quotas that the config has, for a join.
pub fn of_config(states: &[(CounterState, OverrideMark)]) -> Vec<(CounterState, OverrideMark, bool)> {
    states.iter().map(|(state, mark)| (*state, *mark, true)).collect()
}

/// The states of unused quotas without overrides.
pub fn full_states(quotas: &[Quota], now: Timestamp) -> Vec<(CounterState, OverrideMark, bool)> {
    let full = |quota: &Quota| match quota.window {
        Window::Rolling { burst } => CounterState::Rolling {
            limit: quota.limit,
            burst,
            level: (burst.cast_signed(), 0),
            held: 0,
            at: now,
        },
        Window::Calendar { unit, ref zone } => {
            CalendarPeriod::new(quota.limit, unit, zone.clone(), now).state()
        }
    };
    quotas.iter().map(|quota| (full(quota), OverrideMark::None, true)).collect()
}
