// The state of the gateway in this tab: one snapshot, then one event stream with the changes.
// The stream is closed while the page is hidden, and opened again with growing pauses after it broke.

import { ApiError, get, open, setSignInHandler } from "./api.js";
import { isOfUpstream, quotaName } from "./format.js";

/** Number of refusals that the gateway and the page keep. */
const MAX_REFUSALS = 1_000;
/** The page reconnects after this time without data. The gateway sends a heartbeat each 15 s. */
const SILENCE_MS = 40_000;
/** The counts by cause are loaded this long after a refusal. */
const CAUSES_PAUSE_MS = 2_000;
/** The quotas of upstreams are loaded this often; without such quotas, more rarely. */
const UPSTREAMS_PAUSE_MS = 2_000;
const NO_UPSTREAMS_PAUSE_MS = 30_000;
/** Pauses before the page connects again: they double. */
const MIN_PAUSE_MS = 1_000;
const MAX_PAUSE_MS = 15_000;
/** Number of samples of the sum of all tokens, for the curve of tokens a second. */
const MAX_SAMPLES = 240;

/** One quota. The object is the same as long as the quota exists; `json` is replaced. */
class QuotaRecord {
  /** `environment`: its name, or `upstream openai` for a quota of an upstream. */
  constructor(environment, json, isEnforced) {
    this.environment = environment;
    this.isOfUpstream = isOfUpstream(json);
    this.label = `${environment} · ${quotaName(json)}`;
    this.search = this.label.toLowerCase();
    /** `spent`, `refusing`, `running-out`, `fine`, `unlimited`, or `shadow`: it counts and refuses nothing. */
    this.state = "fine";
    this.update(json, isEnforced);
  }

  isOf(json) {
    const own = this.json;
    return own.kind === json.kind && own.per === json.per && own.name === json.name && own.scope === json.scope;
  }

  update(json, isEnforced) {
    this.json = json;
    /** Requests that this quota refused in the last minute. */
    this.refused = json.refused_last_minute ?? 0;
    this.exhaustsAt = json.exhausts_at ? Date.parse(json.exhausts_at) : null;
    this.resetsAt = Date.parse(json.resets_at);
    this.zone = json.timezone;
    this.isUnlimited = json.unlimited === true || json.limit === null || json.limit === "unlimited";
    this.isSpent = !this.isUnlimited && json.level <= 0;
    this.share = this.isUnlimited ? 0 : Math.max(0, (json.burst - json.level) / json.burst);
    this.#assess(isEnforced);
  }

  /**
   * Sets `state` and `rank`. The lower the rank, the worse: spent quotas, those that refuse requests, those that run out,
   * by when; then the others, by share.
   */
  #assess(isEnforced) {
    const byShare = 2e15 - 1e14 * Math.min(1, this.share);
    const [state, rank] = this.isUnlimited ? ["unlimited", 3e15 - (this.json.rate ?? 0)]
      : !isEnforced ? ["shadow", byShare]
      : this.isSpent ? ["spent", -1e9 - this.json.reset_seconds]
      : this.refused > 0 ? ["refusing", -this.refused]
      : this.exhaustsAt !== null ? ["running-out", this.exhaustsAt]
      : ["fine", byShare];
    this.state = state;
    this.rank = rank;
  }
}

/** What the views show. They read it; only this file writes it. */
export const live = {
  /** By name: `{json, quotas}`. */
  environments: new Map(),
  /** Upstreams with quotas, by names such as `upstream openai`: `{json, quotas}`. */
  upstreams: new Map(),
  /** All quotas, in the order of the environments; then those of upstreams. */
  quotas: [],
  /** Incremented when quotas are added or removed. */
  version: 0,
  /** The newest first. */
  refusals: [],
  /** Refusals of the last 24 hours by cause, as `/api/rejections` has them. */
  lastDay: { refusals: 0, causes: [] },
  /** `{at, tokens}`: the sum of all tokens at moments of the last minutes. */
  samples: [],
  isLoaded: false,
  /** `null` while connected. */
  lostSince: null,
  /** Why the gateway refused the event stream, in words. */
  fault: null,
  /** `{loaded_at, faults}`: the faults of the config that was refused last. */
  config: null,
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

/** The environment or the upstream with this name. */
export const owner = (name) => live.environments.get(name) ?? live.upstreams.get(name);

/** Applies the state of an environment, or of an upstream. Returns whether quotas were added or removed. */
function takeOwner(all, name, json) {
  const known = all.get(name);
  // Upstreams have no shadow mode.
  const isEnforced = json.enforce !== false;
  if (!known) {
    all.set(name, { json, quotas: json.quotas.map((quota) => new QuotaRecord(name, quota, isEnforced)) });
    return true;
  }
  known.json = json;
  // Quotas keep their order, so that each one is found at its place or behind it.
  let place = 0;
  const find = (quota) => {
    for (let n = place; n < known.quotas.length; n += 1) {
      if (!known.quotas[n].isOf(quota)) continue;
      place = n + 1;
      return known.quotas[n];
    }
    return undefined;
  };
  if (json.complete === false) {
    for (const quota of json.quotas) find(quota)?.update(quota, isEnforced);
    return false;
  }
  const before = known.quotas;
  known.quotas = json.quotas.map((quota) => {
    const record = find(quota) ?? before.find((other) => other.isOf(quota));
    record?.update(quota, isEnforced);
    return record ?? new QuotaRecord(name, quota, isEnforced);
  });
  return known.quotas.length !== before.length || known.quotas.some((record, n) => record !== before[n]);
}

function rebuild() {
  live.quotas = [...live.environments.values(), ...live.upstreams.values()].flatMap(({ quotas }) => quotas);
  live.version += 1;
}

/** Applies environments. `order`: the names of all environments, if that has changed; others are removed. */
function takeEnvironments(environments, order) {
  let isNew = false;
  for (const json of environments) isNew = takeOwner(live.environments, json.name, json) || isNew;
  if (order && order.join("\n") !== [...live.environments.keys()].join("\n")) {
    const known = live.environments;
    live.environments = new Map(order.filter((name) => known.has(name)).map((name) => [name, known.get(name)]));
    isNew = true;
  }
  if (isNew) rebuild();
}

/** Applies upstreams. `isComplete`: others are removed. */
function takeUpstreams(upstreams, isComplete) {
  let isNew = false;
  const names = new Set();
  for (const json of upstreams.filter(({ quotas }) => quotas.length > 0)) {
    names.add(`upstream ${json.name}`);
    isNew = takeOwner(live.upstreams, `upstream ${json.name}`, json) || isNew;
  }
  for (const name of isComplete ? [...live.upstreams.keys()] : []) {
    if (!names.has(name)) isNew = live.upstreams.delete(name) || isNew;
  }
  if (isNew) rebuild();
}

let upstreamsTimer = 0;

/** Loads the quotas of upstreams, and again after a pause. The event stream does not contain them. */
async function loadUpstreams() {
  clearTimeout(upstreamsTimer);
  const { signal } = abort ?? {};
  const answer = await get("/api/upstreams").catch(() => null);
  if (!signal || signal.aborted) return;
  if (answer && (live.upstreams.size > 0 || answer.upstreams.some(({ quotas }) => quotas.length > 0))) {
    apply(() => takeUpstreams(answer.upstreams, true));
  }
  clearTimeout(upstreamsTimer);
  upstreamsTimer = setTimeout(loadUpstreams, live.upstreams.size > 0 ? UPSTREAMS_PAUSE_MS : NO_UPSTREAMS_PAUSE_MS);
}

function takeRefusals(newest) {
  const known = new Set(live.refusals.slice(0, newest.length + 100).map((refusal) => refusal.request_id + refusal.at));
  const fresh = newest.filter((refusal) => !known.has(refusal.request_id + refusal.at));
  if (fresh.length === 0) return;
  live.refusals = fresh.concat(live.refusals).slice(0, MAX_REFUSALS);
  causesTimer ||= setTimeout(loadCauses, CAUSES_PAUSE_MS);
}

let causesTimer = 0;

/** Loads the counts by cause. An event has at most 50 refusals, so the page cannot count them itself. */
async function loadCauses() {
  const { last_day } = await get("/api/rejections?limit=0").catch(() => ({}));
  causesTimer = 0;
  if (!last_day) return;
  live.lastDay = last_day;
  notify("state");
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
  sample();
  notify("state");
  performance.clearMeasures("update");
  performance.measure("update", { start });
}

/** Applies the answer to a change of limits, before the next event arrives. */
export function showEnvironment(json) {
  if (!json?.quotas) return;
  apply(() => (Array.isArray(json.environments) ? takeUpstreams([json], false) : takeEnvironments([json])));
}

/** Handles an event: `snapshot` has the whole state, `update` the changes since the previous event. */
function onEvent(name, data) {
  if (name === "snapshot") data.order = data.environments.map((json) => json.name);
  if (name !== "snapshot" && name !== "update") return;
  live.isLoaded = true;
  apply(() => {
    takeEnvironments(data.environments ?? [], data.order);
    takeRefusals(data.rejections ?? []);
  });
  if (data.config) {
    live.config = data.config;
    notify("config");
  }
  if (name === "snapshot") {
    loadRefusals();
    loadUpstreams();
  }
}

/** Loads the refusals that a snapshot leaves out. */
async function loadRefusals() {
  const { rejections, last_day } = await get(`/api/rejections?limit=${MAX_REFUSALS}`).catch(() => ({ rejections: [] }));
  live.lastDay = last_day ?? live.lastDay;
  if (rejections.length >= live.refusals.length) live.refusals = rejections;
  notify("state");
}

let abort = null;
let timer = 0;
let pause = MIN_PAUSE_MS;

/** Connects, and connects again whenever the stream ends. */
export async function connect() {
  disconnect();
  const { signal } = (abort = new AbortController());
  try {
    await readEvents(signal);
    live.fault = null;
  } catch (error) {
    if (signal.aborted || error.status === 401) return;
    live.fault = error instanceof ApiError ? error.message : null;
  }
  if (signal.aborted) return;
  live.lostSince ??= Date.now();
  timer = setTimeout(connect, pause);
  pause = Math.min(2 * pause, MAX_PAUSE_MS);
  notify("connection");
}

function disconnect() {
  abort?.abort();
  abort = null;
  clearTimeout(timer);
  clearTimeout(upstreamsTimer);
}

/** Reads the event stream until it breaks. */
async function readEvents(signal) {
  const answer = await open("GET", "/api/events", { signal });
  live.lostSince = null;
  live.fault = null;
  notify("connection");
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let parts = [];
  for (;;) {
    const silence = setTimeout(() => reader.cancel(), SILENCE_MS);
    const { done, value } = await reader.read();
    clearTimeout(silence);
    if (done) return;
    // The end of an event is at most one character away from the pieces before.
    const isEnd = value.includes("\n\n") || (value.startsWith("\n") && parts.at(-1)?.endsWith("\n"));
    parts.push(value);
    if (!isEnd) continue;
    const events = parts.join("").split("\n\n");
    parts = [events.pop()];
    for (const event of events) readEvent(event);
    pause = MIN_PAUSE_MS;
  }
}

function readEvent(text) {
  let name = "message";
  let data = "";
  for (const line of text.split("\n")) {
    if (line.startsWith("event:")) name = line.slice(6).trim();
    else if (line.startsWith("data:")) data += line.slice(5);
  }
  if (data !== "") onEvent(name, JSON.parse(data));
}

/** Opens the event stream. `onSignIn` is called when the gateway requires a sign-in. */
export function start(onSignIn) {
  setSignInHandler(() => {
    disconnect();
    onSignIn();
  });
  document.addEventListener("visibilitychange", () => (document.hidden ? disconnect() : connect()));
  addEventListener("pagehide", disconnect);
  connect();
}

/** Deletes the whole state, at sign-out. */
export function stop() {
  disconnect();
  live.environments.clear();
  live.upstreams.clear();
  Object.assign(live, { refusals: [], lastDay: { refusals: 0, causes: [] }, samples: [], isLoaded: false, lostSince: null });
  rebuild();
}
