// The state of the gateway in this tab: one snapshot, then one event stream with what changes.
// The stream is closed while the page is hidden, and opened again with growing pauses after it broke.

import { ApiError, get, setSignInHandler } from "./api.js";
import { quotaName } from "./format.js";

/** Number of refusals that the gateway and the page keep. */
export const MAX_REFUSALS = 1_000;
/** The gateway sends a heartbeat each 15 s. */
const SILENCE_MS = 40_000;
const MAX_PAUSE_MS = 15_000;
/** Without an event stream the page requests a snapshot this often. */
const POLL_MS = 2_000;
/** How far back the sum of all tokens is remembered, for the curve of tokens a second. */
const MAX_SAMPLES = 240;

/** One quota. The object is the same as long as the quota exists; `json` is replaced. */
class QuotaRecord {
  constructor(environment, json) {
    this.environment = environment;
    this.label = `${environment} · ${quotaName(json)}`;
    this.search = this.label.toLowerCase();
    /** Requests that this quota refused in the last minute. */
    this.refused = 0;
    /** `spent`, `refusing`, `running-out`, `fine` or `unlimited`. */
    this.state = "fine";
    this.update(json);
  }

  isOf(json) {
    const own = this.json;
    return own.kind === json.kind && own.per === json.per && own.name === json.name && own.scope === json.scope;
  }

  update(json) {
    this.json = json;
    this.exhaustsAt = json.exhausts_at ? Date.parse(json.exhausts_at) : null;
    this.resetsAt = json.resets_at ? parseMoment(json.resets_at) : Date.now() + 1_000 * json.reset_seconds;
    this.zone = zoneOf(json);
    this.isUnlimited = json.unlimited === true || json.limit === null || json.limit === "unlimited";
    this.isSpent = !this.isUnlimited && json.level <= 0;
    this.share = this.isUnlimited ? 0 : Math.max(0, (json.burst - json.level) / json.burst);
    this.#assess();
  }

  /** Sets the number of refusals in the last minute. */
  setRefused(refused) {
    if (this.refused === refused) return;
    this.refused = refused;
    this.#assess();
  }

  /**
   * Sets `state` and `rank`. The lower the rank, the worse: spent quotas, those that refuse requests, those that run out,
   * by when; then the others, by share.
   */
  #assess() {
    const [state, rank] = this.isUnlimited ? ["unlimited", 3e15 - (this.json.rate ?? 0)]
      : this.isSpent ? ["spent", -1e9 - this.json.reset_seconds]
      : this.refused > 0 ? ["refusing", -this.refused]
      : this.exhaustsAt !== null ? ["running-out", this.exhaustsAt]
      : ["fine", 2e15 - 1e14 * this.share];
    this.state = state;
    this.rank = rank;
  }
}

/** The zone in `2026-12-01T00:00:00+01:00[Europe/Berlin]`, or in a field of its own. */
function zoneOf(json) {
  const bracket = /\[([^\]]+)\]$/.exec(json.resets_at ?? "");
  return json.timezone ?? bracket?.[1];
}

const parseMoment = (text) => Date.parse(text.replace(/\[.*$/, ""));

/** What the views show. They read it; only this file writes it. */
export const live = {
  /** By name: `{json, quotas}`. */
  environments: new Map(),
  /** All quotas, in the order of the environments. */
  quotas: [],
  /** Rises when quotas come or go. */
  version: 0,
  /** The newest first. */
  refusals: [],
  /** `{at, tokens}`: the sum of all tokens at moments of the last minutes. */
  samples: [],
  isLoaded: false,
  /** `null` while connected. */
  lostSince: null,
  nextAttempt: 0,
  /** Why the snapshot could not be loaded, in words. */
  fault: null,
};

const listeners = new Set();

/** Calls `listener` at each change, with `"state"`, `"connection"` or `"config"`. Returns a function that ends it. */
export function subscribe(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function notify(what) {
  for (const listener of listeners) listener(what);
}

function upsert(json) {
  const known = live.environments.get(json.name);
  if (!known) {
    const quotas = json.quotas.map((quota) => new QuotaRecord(json.name, quota));
    live.environments.set(json.name, { json, quotas });
    return true;
  }
  known.json = json;
  const isSame = known.quotas.length === json.quotas.length && json.quotas.every((quota, n) => known.quotas[n].isOf(quota));
  if (isSame) {
    json.quotas.forEach((quota, n) => known.quotas[n].update(quota));
    return false;
  }
  known.quotas = json.quotas.map((quota) => {
    const record = known.quotas.find((other) => other.isOf(quota));
    record?.update(quota);
    return record ?? new QuotaRecord(json.name, quota);
  });
  return true;
}

function rebuild() {
  live.quotas = [...live.environments.values()].flatMap((environment) => environment.quotas);
  live.version += 1;
}

/** Takes environments over. `isAll`: others no longer exist. */
function takeEnvironments(environments, isAll) {
  let hasNew = false;
  for (const json of environments) hasNew = upsert(json) || hasNew;
  if (isAll && environments.length !== live.environments.size) {
    const names = new Set(environments.map((json) => json.name));
    for (const name of live.environments.keys()) if (!names.has(name)) live.environments.delete(name);
    hasNew = true;
  }
  if (hasNew) rebuild();
}

function remove(names) {
  if (names.filter((name) => live.environments.delete(name)).length > 0) rebuild();
}

function takeRefusals(newest) {
  const known = new Set(live.refusals.slice(0, newest.length + 50).map((refusal) => refusal.request_id + refusal.at));
  const fresh = newest.filter((refusal) => !known.has(refusal.request_id + refusal.at));
  if (fresh.length > 0) live.refusals = fresh.concat(live.refusals).slice(0, MAX_REFUSALS);
}

/** Counts the refusals of the last minute, by quota. */
function countRefusals() {
  const since = Date.now() - 60_000;
  const counts = new Map();
  for (const refusal of live.refusals) {
    if (Date.parse(refusal.at) < since) break;
    for (const quota of refusal.quotas) {
      const label = `${refusal.environment} · ${quotaName(quota)}`;
      counts.set(label, (counts.get(label) ?? 0) + 1);
    }
  }
  for (const quota of live.quotas) quota.setRefused(counts.get(quota.label) ?? 0);
}

function sample() {
  let tokens = 0;
  for (const { json } of live.environments.values()) tokens += json.totals?.total_tokens ?? 0;
  const at = Date.now();
  if (live.samples.length > 0 && at - live.samples.at(-1).at < 900) return;
  live.samples.push({ at, tokens });
  if (live.samples.length > MAX_SAMPLES) live.samples.shift();
}

/** Applies a change and calls the views. The duration of the last update is a measure named `update`. */
function apply(change) {
  const start = performance.now();
  change();
  countRefusals();
  sample();
  notify("state");
  performance.clearMeasures("update");
  performance.measure("update", { start });
}

/** Loads everything. Views call it after a change that they made. */
export async function refresh() {
  const [{ environments }, refusals] = await Promise.all([
    get("/api/environments"),
    get(`/api/rejections?limit=${MAX_REFUSALS}`).catch((error) => {
      if (error.status === 401) throw error;
      return { rejections: [] };
    }),
  ]);
  live.isLoaded = true;
  live.fault = null;
  apply(() => {
    takeEnvironments(environments, true);
    takeRefusals(refusals.rejections);
  });
}

/** Takes over one environment, as the answer to a change has it. */
export function takeEnvironment(json) {
  if (json?.quotas) apply(() => takeEnvironments([json], false));
}

function onEvent(name, data) {
  if (name === "config" || data.config) notify("config");
  apply(() => {
    if (data.environments) takeEnvironments(data.environments, data.all === true);
    if (data.removed) remove(data.removed);
    if (data.rejections) takeRefusals(data.rejections);
  });
}

let abort = null;
let timer = 0;
let pause = 1_000;

/** Connects, and connects again whenever the stream ends. */
async function connect() {
  disconnect();
  const { signal } = (abort = new AbortController());
  let canStream = true;
  try {
    await refresh();
    if (signal.aborted) return;
    canStream = await readEvents(signal);
  } catch (error) {
    if (signal.aborted) return;
    if (error.status === 401) return disconnect();
    live.fault = error instanceof ApiError ? error.message : "The connection to the gateway broke.";
  }
  if (signal.aborted) return;
  if (!canStream) {
    setConnected();
    timer = setTimeout(connect, POLL_MS);
    return;
  }
  live.lostSince ??= Date.now();
  live.nextAttempt = Date.now() + pause;
  timer = setTimeout(connect, pause);
  pause = Math.min(2 * pause, MAX_PAUSE_MS);
  notify("connection");
}

function setConnected() {
  live.lostSince = null;
  live.fault = null;
  pause = 1_000;
  notify("connection");
}

function disconnect() {
  abort?.abort();
  abort = null;
  clearTimeout(timer);
}

/** Reads the event stream until it breaks. `false`: the gateway has none. */
async function readEvents(signal) {
  const answer = await fetch("/api/events", { signal, headers: { accept: "text/event-stream" } });
  if (answer.status === 404) return false;
  if (!answer.ok) throw new ApiError(answer.status, "", `The event stream was refused with status ${answer.status}.`);
  setConnected();
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const silence = setTimeout(() => reader.cancel(), SILENCE_MS);
    const { done, value } = await reader.read();
    clearTimeout(silence);
    if (done) return true;
    text += value.replaceAll("\r", "");
    const events = text.split("\n\n");
    text = events.pop();
    for (const event of events) readEvent(event);
  }
}

function readEvent(text) {
  let name = "message";
  let data = "";
  for (const line of text.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data += line.slice(5);
  }
  if (data === "") return;
  try {
    onEvent(name, JSON.parse(data));
  } catch (error) {
    console.error(`The event '${name}' cannot be read.`, error);
  }
}

/** Begins to follow the gateway. `onSignIn` is called when it needs a sign-in. */
export function start(onSignIn) {
  setSignInHandler(() => {
    disconnect();
    onSignIn();
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
  addEventListener("pagehide", disconnect);
  connect();
}

/** Forgets everything, at sign-out. */
export function stop() {
  disconnect();
  live.environments.clear();
  Object.assign(live, { refusals: [], samples: [], isLoaded: false, lostSince: null });
  rebuild();
}

export { connect };
