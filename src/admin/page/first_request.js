// Instructions for the first request. The page shows them while the gateway has served no request.

import { get } from "./api.js";
import { el, setText } from "./dom.js";

const MODEL = "gpt-4o-mini";
const QUESTION = "Why is the sky blue?";

const EXAMPLES = {
  curl: (base, key) => `curl ${base}/chat/completions \\
  -H "authorization: Bearer ${key}" \\
  -H "content-type: application/json" \\
  -d '{"model": "${MODEL}", "messages": [{"role": "user", "content": "${QUESTION}"}]}'`,
  Python: (base, key) => `from openai import OpenAI

client = OpenAI(base_url="${base}", api_key="${key}")
answer = client.chat.completions.create(
    model="${MODEL}",
    messages=[{"role": "user", "content": "${QUESTION}"}],
)
print(answer.choices[0].message.content)`,
  Node: (base, key) => `import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${base}", apiKey: "${key}" });
const answer = await client.chat.completions.create({
  model: "${MODEL}",
  messages: [{ role: "user", content: "${QUESTION}" }],
});
console.log(answer.choices[0].message.content);`,
};

/** The address for callers, as this browser reaches it; the gateway listens on all addresses as `0.0.0.0` or `[::]`. */
function baseUrl(system) {
  const { listen = `${location.hostname}:8080`, tls = false } = system ?? {};
  return `${tls ? "https" : "http"}://${listen.replace(/^(0\.0\.0\.0|\[::\])/, location.hostname)}/v1`;
}

/** Which keys the gateway accepts, by the environments of its config. */
function keyWords(environments) {
  const all = Object.entries(environments);
  const open = all.filter(([, { keys = [] }]) => keys.length === 0).map(([name]) => name);
  if (open.length === 0) return ["YOUR_KEY is the key of a caller. It also chooses the environment."];
  let which = `${open.length} environments have no keys in the config, and accept any key.`;
  if (open.length === 1) which = `The environment ${open[0]} has no keys in the config, and accepts any key.`;
  if (open.length === all.length) which = "No environment has keys in the config, so any key is accepted.";
  return [`${which} The path chooses the environment: `, el("code", {}, `/${open[0]}/v1/chat/completions`), "."];
}

/** The panel: one example at a time, with a button that copies it. */
export function firstRequest() {
  let base = baseUrl(null);
  let language = "curl";
  const code = el("code");
  const status = el("span", { role: "status", class: "soft" });
  const tabs = Object.keys(EXAMPLES).map((name) =>
    el("button", { type: "button", class: "quiet", onclick: () => choose(name) }, name));
  const choose = (name) => {
    language = name;
    for (const tab of tabs) tab.setAttribute("aria-pressed", String(tab.textContent === name));
    setText(code, EXAMPLES[name](base, "YOUR_KEY"));
    setText(status, "");
  };
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(code.textContent);
      setText(status, "Copied.");
    } catch {
      getSelection().selectAllChildren(code);
      setText(status, "Selected: copy it with the keyboard.");
    }
  };
  choose(language);
  get("/api/system").then((system) => {
    base = baseUrl(system);
    choose(language);
  }, () => {});
  const keys = el("p");
  get("/api/config").then(({ environments = {} }) => keys.replaceWith(el("p", { class: "soft" }, keyWords(environments))), () => {});
  return el("section", { class: "card first-request", "aria-label": "Send the first request" },
    el("h2", {}, "Send the first request"),
    el("p", {}, "No request has arrived yet. An application changes its ", el("code", {}, "base_url"), " and its key, and nothing else."),
    el("div", { class: "tools" }, tabs, el("button", { type: "button", onclick: copy }, "Copy"), status),
    el("pre", { tabindex: 0, role: "region", "aria-label": "Example" }, code),
    keys);
}
