// System: the gateway itself, its config, store, Redis and upstreams; overrides in force and the audit log.

import { call, get } from "./api.js";
import { el, setText, setVisible, table } from "./dom.js";
import { count, exactMoment, moment, number, quotaName } from "./format.js";
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

/** The state of Redis, as the environments report it. */
function redisWords() {
  const shared = [...live.environments.values()].map(({ json }) => json.shared).filter(Boolean);
  if (shared.length === 0) return "not used: this node counts alone";
  const down = shared.find((state) => !state.up);
  return down ? `unavailable: ${down.reason}` : `connected, ${count(Math.max(...shared.map((state) => state.nodes)), "node")}`;
}

function systemTable(system) {
  const { version, config, store, redis, upstreams } = system;
  const rows = [["Version", words(version)], ["Config", words(config)], ["Store", words(store)], ["Redis", redis ? words(redis) : redisWords()], ["Upstreams", words(upstreams)]];
  return table("Gateway", [{ title: "Part" }, { title: "State" }], rows);
}

function overridesTable({ overrides, enforce = [] }) {
  const limit = (value) => (value === null ? "unlimited" : number(value));
  const until = (value) => (value ? moment(Date.parse(value)) : "always");
  const rows = overrides.map((entry) => [
    `${entry.environment} · ${quotaName(entry)}`, limit(entry.limit), limit(entry.file_limit), entry.by ?? "–", entry.since ? moment(Date.parse(entry.since)) : "–", until(entry.until), entry.reason ?? "–",
  ]);
  for (const entry of enforce) {
    rows.push([`${entry.environment} · enforce`, words(entry.enforce), words(entry.file_enforce), entry.by ?? "–", entry.since ? moment(Date.parse(entry.since)) : "–", until(entry.until), entry.reason ?? "–"]);
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

/** A box with a title whose content is loaded; a failure is shown in words. */
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
    } catch (error) {
      const text = error.status === 404 ? "This gateway has no API for this part." : error.message;
      return this.#show(text, () => el("p", { class: "notice" }, text));
    }
    this.#show(JSON.stringify(json), () => this.content(json));
  }

  /** Replaces the content if it has changed: a selection or a place in a list stays. */
  #show(key, make) {
    if (this.key === key) return;
    this.key = key;
    this.box.replaceChildren(make());
  }
}

/** Makes the view. */
export function system() {
  const alert = el("div", { role: "alert", class: "notice" }, el("b"), el("ul"));
  const status = el("output", { role: "status", class: "status" });
  const reload = el("button", { type: "button", onclick: () => reloadConfig() }, "Reload config");
  const sections = [
    new Section("Gateway", "/api/system", systemTable),
    new Section("Overrides", "/api/overrides", overridesTable),
    new Section("Audit", `/api/audit?limit=${AUDIT_ENTRIES}`, auditTable),
  ];
  const element = el("div", { class: "system" }, el("div", { class: "tools" }, el("h1", {}, "System"), status, reload),
    alert, sections.map((section) => section.element));
  const load = () => sections.forEach((section) => section.load());

  async function reloadConfig() {
    reload.disabled = true;
    try {
      const { changes, warnings } = await call("POST", "/api/config/reload");
      const what = changes.length > 0 ? changes.join("; ") : "nothing has changed";
      setText(status, `Reloaded: ${what}.${warnings.length > 0 ? ` ${count(warnings.length, "warning")}: ${warnings.join("; ")}` : ""}`);
    } catch (error) {
      setText(status, error.code === "invalid_config" ? "" : error.message);
    } finally {
      reload.disabled = false;
      load();
    }
  }

  function showFaults() {
    const faults = live.config?.faults ?? [];
    setVisible(alert, faults.length > 0);
    setText(alert.firstChild, "The last change of the config file was refused, and the config before it is in force.");
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
