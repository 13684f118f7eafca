// The gateway's real binary, with a backend in this process.

import { spawn } from "node:child_process";
import { existsSync, mkdtempSync, rmSync, writeFileSync } from "node:fs";
import http from "node:http";
import { tmpdir } from "node:os";
import path from "node:path";
import readline from "node:readline";

const BINARY = process.env.TOLLGATE_BIN ?? path.resolve(import.meta.dirname, "../../target/debug/tollgate");
if (!existsSync(BINARY)) throw new Error(`there is no gateway at ${BINARY}: build it, or set TOLLGATE_BIN`);

/** A backend that reports this usage for each request, and refuses requests for the model `gpt-4o-limited` for 30 s. */
function startBackend(usage) {
  const answer = JSON.stringify({
    id: "chatcmpl-1", object: "chat.completion", created: 1_700_000_000, model: "gpt-4o-mini",
    choices: [{ index: 0, message: { role: "assistant", content: "Hello." }, finish_reason: "stop" }],
    usage: { prompt_tokens: usage.prompt, completion_tokens: usage.completion, total_tokens: usage.prompt + usage.completion },
  });
  const server = http.createServer((request, response) => {
    let body = "";
    request.on("data", (piece) => (body += piece));
    request.on("end", () => {
      const isLimited = body.includes("gpt-4o-limited");
      // It fails health checks.
      const status = request.url === "/health" ? 503 : isLimited ? 429 : 200;
      response.writeHead(status, { "content-type": "application/json", ...(isLimited && { "retry-after": "30" }) }).end(answer);
    });
  });
  return new Promise((resolve) => server.listen(0, "127.0.0.1", () => resolve(server)));
}

/** A free port. It lies outside the ephemeral range, so that no connection gets it while its server is stopped. */
async function freePort() {
  for (;;) {
    const port = 10_000 + Math.floor(Math.random() * 20_000);
    const server = http.createServer();
    const isFree = await new Promise((resolve) => server.once("error", () => resolve(false)).listen(port, "127.0.0.1", () => resolve(true)));
    if (!isFree) continue;
    await new Promise((resolve) => server.close(resolve));
    return port;
  }
}

/** A gateway with this config below `environments:` and `default_environment:`. */
export class Gateway {
  static async start({ environments, token, upstream = "", usage = { prompt: 60, completion: 40 } }) {
    const gateway = new Gateway();
    gateway.folder = mkdtempSync(path.join(tmpdir(), "tollgate-page-"));
    gateway.backend = await startBackend(usage);
    gateway.settings = { token, upstream, admin: `127.0.0.1:${await freePort()}` };
    gateway.writeConfig(environments);
    await gateway.launch();
    return gateway;
  }

  get configFile() {
    return path.join(this.folder, "tollgate.yaml");
  }

  writeConfig(environments) {
    const { token, upstream, admin } = this.settings;
    writeFileSync(this.configFile, `
server: { listen: "127.0.0.1:0" }
admin: { listen: "${admin}"${token ? `, token: "${token}"` : ""} }
upstreams:
  backend: { base_url: "http://127.0.0.1:${this.backend.address().port}/v1", api_key: sk-backend${upstream && `, ${upstream}`} }
environments:
${environments}
store: { path: "${path.join(this.folder, "tollgate.db")}" }
`);
  }

  /** Starts the process. Resolves once it serves. */
  async launch() {
    this.process = spawn(BINARY, ["serve", "--config", this.configFile], { stdio: ["ignore", "ignore", "pipe"] });
    const lines = [];
    for await (const line of readline.createInterface({ input: this.process.stderr })) {
      lines.push(line);
      const entry = line.startsWith("{") ? JSON.parse(line) : {};
      if (entry.message !== "serving") continue;
      this.address = `http://${entry.address}`;
      this.admin = `http://${entry.admin}`;
      this.process.stderr.resume();
      return;
    }
    throw new Error(`the gateway does not start:\n${lines.join("\n")}`);
  }

  /** Ends the process, as a crash does. */
  async kill() {
    const ended = new Promise((resolve) => this.process.once("exit", resolve));
    this.process.kill("SIGKILL");
    await ended;
  }

  async stop() {
    await this.kill();
    this.backend.closeAllConnections();
    this.backend.close();
    rmSync(this.folder, { recursive: true, force: true });
  }

  /** Sends a chat request. Returns the status of the answer. */
  async chat(environment, { key = "any", model = "gpt-4o-mini", max_tokens = 40 } = {}) {
    const answer = await fetch(`${this.address}/${environment}/v1/chat/completions`, {
      method: "POST",
      headers: { authorization: `Bearer ${key}`, "content-type": "application/json" },
      body: JSON.stringify({ model, max_tokens, messages: [{ role: "user", content: "Why is the sky blue?" }] }),
    });
    await answer.text();
    return answer.status;
  }

  /** Sends a request to the admin API. Returns the JSON of the answer. */
  async api(path, method = "GET", body) {
    const headers = { "content-type": "application/json", ...(this.settings.token && { authorization: `Bearer ${this.settings.token}` }) };
    const answer = await fetch(`${this.admin}/api/${path}`, { method, headers, body: body && JSON.stringify(body) });
    return answer.json();
  }

  /** A quota of an environment, as the admin API reports it. */
  async quota(environment, kind, per) {
    const { quotas } = await this.api(`environments/${environment}`);
    return quotas.find((quota) => quota.scope === "environment" && quota.kind === kind && quota.per === per);
  }
}

/** Two environments, with callers, models and periods. */
export const TWO_ENVIRONMENTS = `
  production:
    upstream: backend
    keys:
      - { name: web, secret: sk-test-web-caller }
      - { name: batch, secret: sk-test-batch-caller, quotas: { total_tokens: { limit: 2k, per: minute } } }
    quotas:
      total_tokens: [{ limit: 10k, per: minute }, { limit: 1M, per: day, timezone: Europe/Berlin }]
      requests: { limit: 60, per: minute }
    model_quotas: { "gpt-4.1*": { requests: { limit: 30, per: minute } } }
  sandbox:
    upstream: backend
    quotas: { total_tokens: { limit: 500, per: minute } }
`;
