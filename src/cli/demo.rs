//! `tollgate demo`: runs the gateway with a simulated backend.

use super::output;
use super::serve::{StopSignals, run_until_signal};
use crate::app::App;
use crate::config::parse;
use crate::demo::Backend;
use crate::telemetry::init_logging;
use anyhow::anyhow;
use std::net::SocketAddr;
use std::process::ExitCode;

pub(super) fn run() -> anyhow::Result<ExitCode> {
    let signals = StopSignals::listen()?;
    let backend = Backend::start()?;
    let text = CONFIG.replace("BACKEND", &backend.address().to_string());
    let loaded = parse(&text, "demo.yaml", &|_| None, &[]).map_err(|faults| anyhow!("{faults}"))?;
    let app = App::start(loaded.config)?;
    output::print(&introduction(app.address(), app.admin_address()))?;
    let log = init_logging();
    run_until_signal(app, signals, &log)
}

/// The config of the demo. Its quotas are so small that a few requests exhaust them.
const CONFIG: &str = r#"
server: { listen: "127.0.0.1:0" }
admin: { listen: "127.0.0.1:0" }
upstreams:
  simulated: { base_url: "http://BACKEND/v1", api_key: sk-simulated-backend }
environments:
  production:
    upstream: simulated
    quotas:
      total_tokens: [{ limit: 5k, per: minute }, { limit: 100k, per: day }]
      completion_tokens: { limit: 3k, per: minute }
      requests: { limit: 60, per: minute }
  sandbox:
    upstream: simulated
    quotas: { total_tokens: { limit: 300, per: minute } }
default_environment: production
store: { memory: true }
"#;

fn introduction(address: SocketAddr, admin: SocketAddr) -> String {
    let chat = r#""model":"gpt-4o-mini","messages":[{"role":"user","content":"Why is the sky blue?"}]"#;
    let json = "-H 'content-type: application/json'";
    format!(
        r#"
Tollgate is running in front of a simulated backend. Paste these lines into another terminal:

  # a chat completion: the x-ratelimit headers show what is left of the quotas
  curl -si http://{address}/v1/chat/completions {json} -d '{{{chat}}}'

  # the same request as a stream
  curl -sN http://{address}/v1/chat/completions {json} -d '{{{chat},"stream":true}}'

  # the sandbox has 300 tokens per minute: the gateway refuses the last of these requests with 429
  for i in 1 2 3 4 5 6; do curl -s -o /dev/null -w '%{{http_code}}\n' http://{address}/sandbox/v1/chat/completions {json} -d '{{{chat},"max_tokens":60}}'; done

  # the level of every quota
  curl -s http://{admin}/api/environments

An OpenAI SDK needs base_url="http://{address}/v1" and any api_key.
Dashboard: http://{admin}/    Stop: Ctrl-C

"#
    )
}
