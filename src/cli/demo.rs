//! `tollgate demo`: runs the gateway with a simulated backend.

use super::output;
use super::serve::{StopSignals, run_until_signal};
use crate::app::App;
use crate::config::parse;
use crate::demo::Backend;
use crate::random;
use crate::telemetry::init_logging;
use anyhow::{Context as _, anyhow};
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::process::ExitCode;

pub(super) fn run() -> anyhow::Result<ExitCode> {
    let signals = StopSignals::listen()?;
    let backend = Backend::start()?;
    let store = TemporaryFolder::create()?;
    let text = CONFIG
        .replace("BACKEND", &backend.address().to_string())
        .replace("STORE", &store.0.join("tollgate.db").to_string_lossy());
    let loaded = parse(&text, "demo.yaml", &|_| None, &[]).map_err(|faults| anyhow!("{faults}"))?;
    let settings = loaded.config.telemetry.clone();
    let app = App::start(loaded.config)?;
    output::print(&introduction(app.address(), app.admin_address()))?;
    let log = init_logging(&settings);
    backend.start_callers(app.address());
    run_until_signal(app, signals, &log, None)
}

/// A folder that is removed at the end. It holds the store, so that the dashboard has a usage history.
struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    fn create() -> anyhow::Result<Self> {
        let path = std::env::temp_dir().join(format!("tollgate-demo-{:016x}", random::number()));
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("the folder {} cannot be created", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        // If it stays, only a folder of temporary files is left over.
        drop(fs::remove_dir_all(&self.0));
    }
}

/// The config of the demo. Production has room for the commands of the introduction; the callers of support and research
/// exhaust their quotas.
const CONFIG: &str = r#"
server: { listen: "127.0.0.1:0" }
admin: { listen: "127.0.0.1:0" }
upstreams:
  simulated: { base_url: "http://BACKEND/v1", api_key: sk-simulated-backend }
environments:
  production:
    upstream: simulated
    quotas:
      total_tokens: [{ limit: 20k, per: minute }, { limit: 300k, per: day }]
      completion_tokens: { limit: 12k, per: minute }
      requests: { limit: 120, per: minute }
    model_quotas:
      "gpt-4o*": { total_tokens: { limit: 15k, per: minute } }
  sandbox:
    upstream: simulated
    quotas: { total_tokens: { limit: 300, per: minute } }
  support:
    upstream: simulated
    keys:
      - { name: web, secret: sk-demo-web, quotas: { total_tokens: { limit: 3k, per: minute } } }
      - { name: mail, secret: sk-demo-mail, quotas: { total_tokens: { limit: 3k, per: minute } } }
    quotas:
      total_tokens: [{ limit: 7k, per: minute }, { limit: 250k, per: day, timezone: Europe/Berlin }]
      requests: { limit: 120, per: minute }
  research:
    upstream: simulated
    keys:
      - { name: evals, secret: sk-demo-evals, quotas: { requests: { limit: 40, per: minute } } }
      - { name: notebooks, secret: sk-demo-notebooks, quotas: { total_tokens: { limit: 3k, per: minute } } }
    quotas:
      total_tokens: { limit: 40k, per: day, timezone: America/New_York }
default_environment: production
store: { path: "STORE" }
# The callers of the demo send several requests a second: their lines would scroll the commands away.
telemetry: { requests: none }
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
