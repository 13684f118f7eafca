// System: the gateway itself, its config, store, Redis and upstreams; overrides in force and the audit log.

import { call, get } from "./api.js";
import { el, replaceInPlace, restoreFocus, setText, setVisible, table } from "./dom.js";
import { count, duration, exactMoment, moment, number, ownerName, quotaName } from "./format.js";
import { live } from "./live.js";

/** Upstreams, overrides and the audit log are requested this often. */
const REFRESH_MS = 5_000;
const AUDIT_ENTRIES = 100;

/** A JSON value of the API as text. */
function words(value) {
  if (value === null || value === undefined || value === "") return "–";
  if (typeof value === "boolean") return value ? "yes" : "no";
  if (typeof value === "number") return Number.isInteger(value) ? number(value) : value.toFixed(2);
  if (Array.isArray(value)) return value.map(words).join(", ");
  if (typeof value === "object") return Object.entries(value).map(([key, part]) => `${key.replaceAll("_", " ")} ${words(part)}`).join(", ");
  return /^\d{4}-\d\d-\d\dT/.test(value) ? moment(Date.parse(value)) : value;
}

const at = (text) => moment(Date.parse(text));

/** The row headers `Version`, `Config`, `Store`, `Redis` and `Upstreams`, with the upstreams and estimates below. */
function gatewayTables({ version, started_at: startedAt, in_flight: inFlight, draining, config, store, redis, upstreams, estimates }) {
  const started = Date.parse(startedAt);
  const errors = ({ answers, unanswered, incomplete }) => answers + unanswered + incomplete;
  const failed = upstreams.reduce((sum, upstream) => sum + errors(upstream.errors), 0);
  const faults = config.faults.length > 0 ? `. A newer version of the file was refused: ${count(config.faults.length, "fault")}` : "";
  const rows = [
    ["Version", `${version}, started at ${moment(started)} (${duration(Date.now() - started)} ago)`],
    ["Requests", `${number(inFlight)} in flight${draining ? "; the gateway is shutting down" : ""}`],
    ["Config", `${config.file ?? "no file"}, loaded at ${at(config.loaded_at)}${faults}`],
    ["Store", store.kind === "memory" ? "none: nothing survives a restart" : `${store.path}${store.up ? "" : `, cannot be written: ${store.reason}`}`],
    ["Redis", redisWords(redis)],
    ["Upstreams", `${number(upstreams.length)}, ${count(failed, "error")} since the start`],
  ];
  const columns = ["Upstream", "Address"].map((title) => ({ title })).concat(
    ["In flight", "Requests", "Error answers", "No answer", "Cut off", "First byte p50", "p95"].map((title) => ({ title, isNumber: true })));
  const ms = (value) => (value === undefined ? "–" : `${number(value)} ms`);
  const figures = upstreams.map(({ name, base_url: url, in_flight: open, requests, errors: { answers, unanswered, incomplete }, first_byte_ms: first }) => [
    name, url, number(open), number(requests), number(answers), number(unanswered), number(incomplete), ms(first?.p50), ms(first?.p95),
  ]);
  const replicas = upstreams.filter(({ replicas: all }) => all.length > 1 || all.some(({ up, healthy }) => !up || healthy !== null))
    .flatMap(({ name, replicas: all }) => all.map((replica) => replicaRow(name, replica, all.length === 1)));
  const limits = upstreams.flatMap(({ name, provider_limits: { mode, models } }) => models.flatMap((of) => limitRows(name, mode, of)));
  const models = estimates.map(({ model, answers, ratio, mean_error: error }) => [model, number(answers), ratio.toFixed(3), `${(100 * error).toFixed(1)} %`]);
  return el("div", {},
    table("Gateway", [{ title: "Part" }, { title: "State" }], rows),
    el("h3", {}, "Upstreams of this node"), table("Upstream figures", columns, figures),
    replicas.length > 0 && [el("h3", {}, "Replicas"), table("Replicas", [
      ...["Upstream", "Replica", "State"].map((title) => ({ title })), ...["In flight", "Not reached", "Failed checks", "Connections"].map((title) => ({ title, isNumber: true }))], replicas)],
    limits.length > 0 && [el("h3", {}, "Limits that providers state"), table("Provider limits", [
      ...["Upstream", "Model", "Limit of"].map((title) => ({ title })), ...["Limit", "Left", "Full in", "Refusals"].map((title) => ({ title, isNumber: true })), { title: "Requests" }], limits)],
    models.length > 0 && [el("h3", {}, "Estimates of prompt tokens, by model"), table("Estimates", [{ title: "Model" }, ...["Answers", "Estimated / reported", "Mean error"].map((title) => ({ title, isNumber: true }))], models)]);
}

/** A row of the table of replicas. */
function replicaRow(upstream, { address, left_out_ms: leftOut, healthy, in_flight: open, failures, failed_checks: failedChecks, active_connections: active, idle_connections: idle }, isOnly) {
  const leftOutWords = leftOut > 0 ? `cannot be reached, tried again in ${duration(leftOut)}` : "cannot be reached, the next request tries it";
  const unhealthy = isOnly ? "fails its health check, used all the same" : "left out: it fails its health check";
  const state = healthy === false ? unhealthy : leftOut !== null ? leftOutWords : healthy ? "used, healthy" : "used";
  return [upstream, address, state, number(open), number(failures), healthy === null ? "–" : number(failedChecks), number(active + idle)];
}

/** A row for each kind of limit that the provider states for a model, or one row if it only refused. */
function limitRows(upstream, mode, { model, refusals, closed_ms: closed, limits }) {
  const state = closed !== null ? `not sent for ${duration(closed)}` : { follow: "sent as far as they fit", observe: "sent, limits are only shown" }[mode];
  const value = (amount) => (amount === null ? "–" : number(amount));
  const row = ({ kind, limit, remaining, reset_ms: reset }) => [
    upstream, model, kind.replaceAll("_", " "), value(limit), value(remaining), reset === null ? "–" : duration(reset), number(refusals), state,
  ];
  return (limits.length > 0 ? limits : [{ kind: "–", limit: null, remaining: null, reset_ms: null }]).map(row);
}

function redisWords(redis) {
  if (redis === null) return "not used: this node counts alone";
  const { up, nodes, on_failure: policy, reasons, faults, losses } = redis;
  const state = up ? `connected, ${count(nodes, "node")}` : `unavailable (on_failure: ${policy}): ${reasons.join("; ")}`;
  const lost = losses > 0 ? `, connection lost ${number(losses)} times` : "";
  return `${state}${lost}${faults.length > 0 ? `. Settings of the server are wrong: ${faults.join("; ")}` : ""}`;
}

function overridesTable({ overrides, enforce = [] }) {
  const limit = (value) => (value === null ? "unlimited" : number(value));
  const origin = ({ by, since, until, reason }) => [by ?? "–", since ? at(since) : "–", until ? at(until) : "no end", reason ?? "–"];
  const rows = overrides.map((entry) => [
    `${ownerName(entry.environment, entry)} · ${quotaName(entry)}`, limit(entry.limit), limit(entry.file_limit), ...origin(entry),
  ]);
  for (const entry of enforce) {
    rows.push([`${entry.environment} · enforce`, words(entry.enforce), words(entry.file_enforce), ...origin(entry)]);
  }
  if (rows.length === 0) return el("p", { class: "soft" }, "None: everything is as in the file.");
  const columns = [{ title: "Quota" }, { title: "Now", isNumber: true }, { title: "File", isNumber: true }, { title: "By" }, { title: "Since" }, { title: "Until" }, { title: "Reason" }];
  return table("Overrides", columns, rows);
}

function auditTable({ entries }) {
  if (entries.length === 0) return el("p", { class: "soft" }, "No entry.");
  const rows = entries.map(({ at, by, address, action, target, before, after, reason }) => [
    exactMoment(Date.parse(at)), action.replaceAll("_", " "), target, words(before), words(after), reason ?? "–", address ? `${by}, ${address}` : by,
  ]);
  return table("Audit", ["Time", "Action", "Target", "Before", "After", "Reason", "By"].map((title) => ({ title })), rows);
}

/** A box with a title whose content is loaded. If that fails, the box shows the error message. */
class Section {
  constructor(title, path, content) {
    this.path = path;
    this.content = content;
    this.box = el("div", {}, el("p", { class: "soft" }, "Loading …"));
    this.element = el("section", { class: "card", "aria-label": title }, el("h2", {}, title), this.box);
  }

  async load() {
    let json;
    try {
      json = await get(this.path);
    } catch ({ message }) {
      return this.#show(message, () => el("p", { class: "notice" }, message));
    }
    this.#show(JSON.stringify(json), () => this.content(json));
  }

  /** Replaces the content if it has changed. A place in a list stays. */
  #show(key, make) {
    if (this.key === key) return;
    this.key = key;
    replaceInPlace(this.box, [make()]);
  }
}

/** The config in force, loaded when it is opened. */
function effectiveConfig() {
  const code = el("code");
  const load = async ({ target }) => {
    if (target.open) setText(code, await get("/api/config?format=yaml").catch(({ message }) => message));
  };
  return el("details", { class: "card", ontoggle: load }, el("summary", {}, "Config in force, with defaults"),
    el("pre", { tabindex: 0, role: "region", "aria-label": "Config in force" }, code));
}

/** Makes the view. */
export function system() {
  const alert = el("div", { role: "alert", class: "notice" }, el("b"), el("ul"));
  const status = el("output", { role: "status", class: "status" });
  const reload = el("button", { type: "button", onclick: () => reloadConfig() }, "Reload config");
  const sections = [
    new Section("Gateway", "/api/system", gatewayTables),
    new Section("Overrides", "/api/overrides", overridesTable),
    new Section("Audit", `/api/audit?limit=${AUDIT_ENTRIES}`, auditTable),
  ];
  const element = el("div", { class: "system" }, el("div", { class: "tools" }, el("h1", {}, "System"), status, reload),
    alert, sections.map((section) => section.element), effectiveConfig());
  const load = () => sections.forEach((section) => section.load());

  async function reloadConfig() {
    reload.disabled = true;
    const now = exactMoment(Date.now());
    try {
      const { changes, warnings } = await call("POST", "/api/config/reload");
      const what = changes.length > 0 ? changes.join("; ") : "nothing has changed";
      setText(status, `Reloaded at ${now}: ${what}.${warnings.length > 0 ? ` ${count(warnings.length, "warning")}: ${warnings.join("; ")}` : ""}`);
    } catch (error) {
      setText(status, error.code === "invalid_config" ? `Not reloaded at ${now}: the file has faults.` : error.message);
    } finally {
      reload.disabled = false;
      restoreFocus(reload);
      load();
    }
  }

  function showFaults() {
    const faults = live.config?.faults ?? [];
    setVisible(alert, faults.length > 0);
    setText(alert.firstChild, "The last change of the config file was refused. The previous config is still in force.");
    alert.lastChild.replaceChildren(...faults.map((fault) => el("li", {}, fault)));
  }

  load();
  showFaults();
  const timer = setInterval(() => document.hidden || load(), REFRESH_MS);
  return {
    title: "System",
    element,
    update(what) {
      if (what !== "config") return;
      showFaults();
      load();
    },
    close: () => clearInterval(timer),
  };
}
