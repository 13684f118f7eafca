// Overview: which quotas run out first, when, and which callers spend them; then every quota, the worst first.

import { get } from "./api.js";
import { sparkline } from "./chart.js";
import { el, replaceIfNew, restoreFocus, setText, setVisible } from "./dom.js";
import { firstRequest } from "./first_request.js";
import { amountOf, count, duration, momentInZone, number, percent, quotaName, rate } from "./format.js";
import { live } from "./live.js";
import { QuotaRows, outlook, quotaLink } from "./quota_rows.js";

/** With more quotas than this, the others of an environment are folded below its worst. */
const UNFOLDED = 300;
/** Number of quotas that "Runs out first" names. */
const NAMED = 3;
/** Time between two queries of the usage history, which has the callers without quotas. */
const LOOK_UP_MS = 20_000;

const ORDERS = {
  worst: ["Worst first", (a, b) => a.rank - b.rank],
  share: ["Most used", (a, b) => b.share - a.share || a.rank - b.rank],
  rate: ["Highest rate", (a, b) => (b.json.rate ?? 0) - (a.json.rate ?? 0) || a.rank - b.rank],
  name: ["Name", (a, b) => (a.label < b.label ? -1 : 1)],
};

/** The caller that spends most of a quota: `{name, share, rate}`; `null`: not known. */
function spender(quota) {
  const { scope, name, kind, rate: all } = quota.json;
  if (scope === "caller") return { name: `caller ${name}`, share: 1, rate: all };
  if (scope === "model" || quota.isOfUpstream) return null;
  const fromHistory = spenderInHistory(quota);
  if (fromHistory) return { ...fromHistory, rate: fromHistory.share * all };
  let first = null;
  for (const { json } of live.environments.get(quota.environment)?.quotas ?? []) {
    if (json.scope === "caller" && json.kind === kind && json.rate > (first?.rate ?? 0)) first = json;
  }
  return first && { name: `caller ${first.name}`, share: Math.min(1, first.rate / (all || first.rate)), rate: first.rate };
}

/** By environment: when the history was requested, and its rows. */
const history = new Map();

function spenderInHistory(quota) {
  const known = history.get(quota.environment);
  if (!known || Date.now() - known.at > LOOK_UP_MS) {
    const entry = { at: Date.now(), rows: known?.rows ?? [] };
    history.set(quota.environment, entry);
    const query = new URLSearchParams({ environment: quota.environment, group_by: "caller", from: "10m", step: "hour" });
    // Without a store there is no history: it is not requested again.
    get(`/api/usage?${query}`).then(({ rows }) => (entry.rows = rows), (error) => error.code === "no_history" && (entry.at = Infinity));
  }
  const sums = new Map();
  for (const row of known?.rows ?? []) {
    const name = row.caller ? `caller ${row.caller}` : "requests without a key";
    sums.set(name, (sums.get(name) ?? 0) + row[quota.json.kind]);
  }
  const total = [...sums.values()].reduce((sum, value) => sum + value, 0);
  const [name, most] = [...sums].reduce((best, pair) => (pair[1] > best[1] ? pair : best), ["", 0]);
  return most > 0 ? { name, share: most / total } : null;
}

/** The words about one quota that is spent or runs out. */
function sentence(quota) {
  const now = Date.now();
  const who = spender(quota);
  const what = quotaName(quota.json);
  const runsOut = quota.state === "running-out";
  const when = runsOut ? `in ${duration(Math.max(0, quota.exhaustsAt - now))}` : outlook(quota, now)[0];
  const reset = quota.json.window === "calendar"
    ? `${!runsOut ? "Resets" : `${duration(Math.max(0, quota.resetsAt - quota.exhaustsAt))} before it resets`} ${momentInZone(quota.resetsAt, quota.zone)}`
    : `${amountOf(quota.json.limit, quota.json.kind)} per ${quota.json.per}, ${number(Math.max(0, quota.json.level))} left`;
  const spends = who?.rate > 0 ? `, ${rate(who.rate)}` : "";
  const verb = who?.name.startsWith("caller") ? "spends" : "spend";
  const blame = who && `${who.name} ${verb} ${who.share >= 0.995 ? "it" : `${percent(who.share)} of it`}${spends}`;
  const refused = quota.refused > 0 ? `${number(quota.refused)} refused in the last minute` : "";
  return { environment: quota.environment, what, when, reset, blame, refused, state: quota.state, link: quotaLink(quota) };
}

/** `Shadow mode, refuses nothing: sandbox, staging and 3 more.` Empty: every environment enforces its quotas. */
function shadowWords() {
  const names = [...live.environments.values()].filter(({ json }) => json.enforce === false).map(({ json }) => json.name);
  if (names.length === 0) return "";
  const more = names.length > NAMED ? ` and ${number(names.length - NAMED)} more` : "";
  return `Shadow mode, refuses nothing: ${names.slice(0, NAMED).join(", ")}${more}.`;
}

/** Of each environment the worst quota that refuses requests now, and the worst that runs out. */
function runningOut() {
  const worst = new Map();
  for (const quota of live.quotas) {
    if (["fine", "shadow", "unlimited"].includes(quota.state)) continue;
    const key = `${quota.state === "running-out"} ${quota.environment}`;
    const known = worst.get(key);
    if (!known || quota.rank < known.rank) worst.set(key, quota);
  }
  return [...worst.values()].sort(ORDERS.worst[1]).slice(0, NAMED);
}

class Answer {
  constructor() {
    this.list = el("ol", { class: "first" });
    this.calm = el("p", { class: "calm" });
    this.shadow = el("p", { class: "soft shadow" });
    this.items = [];
    this.element = el("section", { class: "answer", "aria-label": "Runs out first" },
      el("h2", {}, "Runs out first"), this.calm, this.list, this.shadow);
  }

  update() {
    const quotas = runningOut();
    setVisible(this.calm, quotas.length === 0);
    const shadow = shadowWords();
    setText(this.calm, live.isLoaded ? `Nothing. At the present rate every ${shadow && "enforced "}quota lasts until it resets.` : "Loading …");
    setText(this.shadow, shadow);
    quotas.forEach((quota, n) => {
      this.items[n] ??= this.#item();
      const item = this.items[n];
      const { environment, what, when, reset, blame, refused, state, link } = sentence(quota);
      item.element.className = state;
      item.name.href = link;
      setText(item.name, `${environment} · ${what}`);
      setText(item.when, when);
      setText(item.reset, reset);
      setText(item.blame, blame ?? "");
      setVisible(item.blame, Boolean(blame));
      setText(item.refused, refused);
      setVisible(item.refused, refused !== "");
    });
    this.items.forEach((item, n) => setVisible(item.element, n < quotas.length));
  }

  #item() {
    const [name, when, reset, blame] = [el("a"), el("strong"), el("span", { class: "soft" }), el("span")];
    const refused = el("span", { class: "alarm" });
    const element = el("li", {}, when, name, el("p", {}, blame, refused, reset));
    this.list.append(element);
    return { element, name, when, reset, blame, refused };
  }
}

class Tiles {
  constructor() {
    this.curve = sparkline();
    this.values = {};
    const tile = (key, title, more) => {
      this.values[key] = el("b", {}, "–");
      return el("div", { class: "tile" }, el("span", {}, title), this.values[key], more);
    };
    this.element = el("section", { class: "tiles", "aria-label": "Now" },
      tile("rate", "tokens a second", this.curve.element), tile("flight", "in flight"),
      tile("refused", "refused in 60 s"), tile("spent", "quotas spent"));
  }

  update() {
    const { samples } = live;
    const rates = samples.slice(1).map((sample, n) =>
      Math.max(0, (1_000 * (sample.tokens - samples[n].tokens)) / (sample.at - samples[n].at)));
    const last = rates.slice(-10);
    setText(this.values.rate, last.length > 0 ? number(last.reduce((sum, value) => sum + value, 0) / last.length) : "–");
    this.curve.update(rates);
    let [inFlight, refused] = [0, 0];
    for (const { json } of live.environments.values()) {
      inFlight += json.in_flight;
      refused += json.refused_last_minute ?? 0;
    }
    setText(this.values.flight, number(inFlight));
    setText(this.values.refused, number(refused));
    setText(this.values.spent, number(live.quotas.reduce((sum, quota) => sum + (quota.state === "spent" ? 1 : 0), 0)));
  }
}

/** The table with its filter, order and folds. */
class Quotas {
  #list = [];
  #shown = { version: -1, filter: "", order: "" };
  #open = new Set();
  #hidden = new Map();
  #isHeld = false;

  constructor(filter) {
    this.rows = new QuotaRows((environment) => this.#toggle(environment));
    this.filter = el("input", { type: "search", "aria-label": "Filter", placeholder: "Filter: environment, caller, model, kind", value: filter, oninput: () => this.update() });
    this.order = el("select", { "aria-label": "Order", onchange: () => this.update() },
      Object.entries(ORDERS).map(([key, [title]]) => el("option", { value: key }, title)));
    this.fold = el("input", { type: "checkbox", id: "fold", onchange: () => this.update() });
    this.count = el("span", { class: "soft" });
    this.held = el("span", { class: "soft", hidden: true }, "The order does not change while you are in the table.");
    const hold = (isHeld) => () => {
      this.#isHeld = isHeld;
      setVisible(this.held, isHeld);
    };
    const { body } = this.rows;
    body.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && hold(true)());
    body.addEventListener("pointerleave", hold(false));
    body.addEventListener("focusin", hold(true));
    body.addEventListener("focusout", hold(false));
    this.element = el("section", { class: "all", "aria-label": "All quotas" },
      el("div", { class: "tools" }, el("h2", {}, "Quotas"), this.filter, this.order,
        el("label", { class: "check", for: "fold" }, this.fold, "Fold"), this.count, this.held),
      this.rows.element, legend());
  }

  update() {
    const filter = this.filter.value.trim().toLowerCase();
    const { version } = live;
    const isNew = version !== this.#shown.version || filter !== this.#shown.filter;
    if (this.#shown.version === -1 && live.quotas.length > UNFOLDED) this.fold.checked = true;
    if (isNew) {
      const words = filter.split(/\s+/);
      this.#list = filter ? live.quotas.filter((quota) => words.every((word) => quota.search.includes(word))) : live.quotas.slice();
    }
    const order = this.order.value;
    // A list that is nearly in order is sorted in linear time.
    if (isNew || order !== this.#shown.order || !this.#isHeld) this.#list.sort(ORDERS[order][1]);
    if (live.isLoaded) this.#shown = { version, filter, order };
    const list = this.fold.checked && filter === "" ? this.#folded() : this.#list;
    const all = live.quotas.length;
    setText(this.count, this.#list.length === all ? count(all, "quota") : `${number(this.#list.length)} of ${count(all, "quota")}`);
    this.rows.show(list, (quota) => (list === this.#list ? null : this.#foldOf(quota)));
  }

  /** The first quota of each environment, and the others of the open ones after it. */
  #folded() {
    const groups = new Map();
    for (const quota of this.#list) {
      const group = groups.get(quota.environment);
      if (group) group.push(quota);
      else groups.set(quota.environment, [quota]);
    }
    this.#hidden = groups;
    const list = [];
    for (const [environment, group] of groups) {
      if (this.#open.has(environment)) list.push(...group);
      else list.push(group[0]);
    }
    return list;
  }

  #foldOf(quota) {
    const group = this.#hidden.get(quota.environment);
    if (!group || group[0] !== quota || group.length === 1) return null;
    return { hidden: group.length - 1, isOpen: this.#open.has(quota.environment) };
  }

  #toggle(environment) {
    if (!this.#open.delete(environment)) this.#open.add(environment);
    this.update();
  }
}

function legend() {
  const item = (name, text) => el("li", {}, el("i", { class: `key ${name}` }), text);
  return el("ul", { class: "legend", "aria-label": "Key to the bars" },
    item("used", "used"), item("held", "held by requests in flight"), item("debt", "debt: spent beyond the quota"), item("pace", "an even pace"));
}

/** Makes the view. `parts`: a filter from the address. */
export function overview([filter = ""]) {
  const [answer, tiles, quotas] = [new Answer(), new Tiles(), new Quotas(filter)];
  const empty = el("div");
  const element = el("div", {}, el("h1", { class: "hidden" }, "Overview"), empty,
    el("div", { class: "top" }, answer.element, tiles.element), quotas.element);
  const update = () => {
    const isUnused = live.isLoaded && [...live.environments.values()].every(({ json }) => json.totals.requests + json.totals.rejected + json.in_flight === 0);
    const hadFocus = empty.contains(document.activeElement);
    replaceIfNew(empty, isUnused ? "unused" : "", () => (isUnused ? [firstRequest()] : []));
    if (hadFocus) restoreFocus(document.getElementById("main"));
    answer.update();
    tiles.update();
    quotas.update();
  };
  const draw = () => quotas.rows.draw();
  let frame = 0;
  const onScroll = () => {
    cancelAnimationFrame(frame);
    frame = requestAnimationFrame(draw);
  };
  addEventListener("scroll", onScroll, { passive: true });
  addEventListener("resize", onScroll);
  const clock = setInterval(() => {
    answer.update();
    draw();
  }, 1_000);
  return {
    title: "Overview",
    element,
    update: (what) => what !== "config" && update(),
    close() {
      clearInterval(clock);
      removeEventListener("scroll", onScroll);
      removeEventListener("resize", onScroll);
    },
  };
}
