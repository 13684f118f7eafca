// The table of quotas. Only visible rows are elements: of 10,000 quotas some thirty are drawn. A row keeps its element
// while it is visible, and its texts and widths change in place.

import { el, setAttribute, setText, setVisible } from "./dom.js";
import { count, dayBefore, duration, momentInZone, number, percent, rate } from "./format.js";

/** Rows drawn above and below the visible ones, so that the keyboard finds a next row. */
const SPARE_ROWS = 6;

const PERIODS = { second: 1e3, minute: 60e3, hour: 3_600e3, day: 86_400e3, week: 604_800e3, month: 2_592_000e3 };
const UNITS = { ms: 1, s: 1e3, m: 60e3, h: 3_600e3, d: 86_400e3 };

/** The length of a period: of a word such as `minute`, or of `10s`. */
export function periodMs(per) {
  if (PERIODS[per]) return PERIODS[per];
  const [, digits, unit] = /^([\d.]+)(ms|s|m|h|d)$/.exec(per) ?? [];
  return unit ? Number(digits) * UNITS[unit] : PERIODS.minute;
}

/** When the present period of a calendar quota began. */
export function periodBegin(quota) {
  const { resetsAt, zone, json: { per } } = quota;
  // Days and months of a zone differ in length.
  const [months, days] = { day: [0, 1], week: [0, 7], month: [1, 0] }[per] ?? [];
  return months === undefined ? resetsAt - periodMs(per) : dayBefore(resetsAt, zone, months, days);
}

/** The two lines about the future of a quota. */
export function outlook(quota, now) {
  const { json } = quota;
  if (quota.isUnlimited) return ["never refuses", ""];
  const isCalendar = json.window === "calendar";
  const untilReset = Math.max(0, quota.resetsAt - now);
  const resets = `resets in ${duration(untilReset)} (${momentInZone(quota.resetsAt, quota.zone)})`;
  const refills = untilReset > 0 ? `all free in ${duration(untilReset)} without traffic` : "all free";
  const second = isCalendar ? resets : refills;
  if (quota.isSpent) {
    const wait = isCalendar ? untilReset : ((1 - json.level) / json.limit) * periodMs(json.per);
    return [isCalendar ? "spent" : `spent, first room in ${duration(wait)}`, second];
  }
  if (quota.state === "refusing") return ["at its limit", second];
  if (quota.exhaustsAt !== null) {
    return [quota.exhaustsAt > now ? `spent in ${duration(quota.exhaustsAt - now)}` : "nearly spent", second];
  }
  if (!json.rate) return [json.used > 0 || json.held > 0 ? "no traffic now" : "unused", second];
  return [isCalendar ? "lasts until it resets" : "lasts at this rate", second];
}

/** One drawn row. */
class Row {
  constructor(onFold) {
    this.environment = el("b");
    this.name = el("span");
    this.link = el("a", {}, this.environment, " · ", this.name);
    this.whole = el("div", { class: "two-lines" }, this.link);
    this.fold = el("button", { type: "button", class: "fold", onclick: () => onFold(this.quota.environment) });
    this.used = el("i", { class: "used" });
    this.held = el("i", { class: "held" });
    this.debt = el("i", { class: "debt" });
    this.pace = el("i", { class: "pace" });
    this.amounts = el("span", { class: "amounts" });
    this.mark = el("span", { class: "mark" }, "override");
    this.share = el("b");
    this.rate = el("span");
    this.first = el("b");
    this.shadow = el("span", { class: "mark", title: "Its quotas count and refuse nothing." }, "shadow mode");
    this.second = el("span", { class: "soft" });
    this.refused = el("span");
    const bar = el("div", { class: "meter", "aria-hidden": "true" }, this.used, this.held, this.debt, this.pace);
    const cell = (name, ...children) => el("td", { role: "cell", class: name }, ...children);
    this.element = el("tr", { role: "row" },
      el("th", { role: "rowheader", scope: "row" }, this.whole),
      cell("fold-cell", this.fold),
      cell("use", bar, el("div", { class: "clip" }, this.amounts, this.mark)),
      cell("share number", this.share),
      cell("rate number", this.rate),
      cell("outlook", el("div", { class: "clip" }, this.first, this.shadow), el("div", { class: "clip" }, this.second)),
      cell("refused number", this.refused));
  }

  update(quota, index, fold, now) {
    this.quota = quota;
    const { json } = quota;
    setAttribute(this.element, "aria-rowindex", index + 2);
    setAttribute(this.element, "class", quota.state);
    setText(this.environment, quota.environment);
    setText(this.name, quota.label.slice(quota.environment.length + 3));
    setAttribute(this.whole, "title", quota.label);
    setAttribute(this.link, "href", quotaLink(quota));
    setVisible(this.fold, fold !== null);
    if (fold) {
      setText(this.fold, fold.isOpen ? `− ${fold.hidden}` : `+ ${fold.hidden}`);
      setAttribute(this.fold, "aria-expanded", fold.isOpen);
      setAttribute(this.fold, "aria-label", `${count(fold.hidden, "more quota")} of ${quota.environment}`);
    }
    this.#updateUse(quota, now);
    setText(this.rate, json.rate === undefined ? "" : rate(json.rate));
    const [first, second] = outlook(quota, now);
    setText(this.first, first);
    setText(this.second, second);
    setVisible(this.shadow, quota.state === "shadow");
    setText(this.refused, quota.refused > 0 ? `${number(quota.refused)} refused` : "–");
    setAttribute(this.refused, "class", quota.refused > 0 ? "alarm" : "soft");
  }

  #updateUse(quota, now) {
    const { json } = quota;
    const width = (part, amount) => {
      const value = quota.isUnlimited ? "0%" : `${(100 * Math.min(1, Math.max(0, amount / json.burst))).toFixed(1)}%`;
      if (part.style.width !== value) part.style.width = value;
    };
    width(this.used, json.used);
    width(this.held, json.held);
    width(this.debt, -json.level);
    const isCalendar = json.window === "calendar" && !quota.isUnlimited;
    setVisible(this.pace, isCalendar);
    if (isCalendar) {
      const begin = periodBegin(quota);
      const left = `${(100 * Math.min(1, Math.max(0, (now - begin) / (quota.resetsAt - begin)))).toFixed(1)}%`;
      if (this.pace.style.left !== left) this.pace.style.left = left;
    }
    const held = json.held > 0 ? `, ${number(json.held)} held` : "";
    const of = quota.isUnlimited ? ", unlimited" : ` of ${number(json.burst)}`;
    const debt = json.level < 0 ? `, ${number(-json.level)} debt` : "";
    setText(this.amounts, `${number(json.used)}${of}${held}${debt}`);
    setText(this.share, quota.isUnlimited ? "–" : percent(quota.share));
    setVisible(this.mark, json.source === "override");
    setAttribute(this.mark, "title", json.override ? overrideWords(json.override) : null);
  }
}

/** The limit of the file that an override replaces. */
export const fileLimit = (override) => (override.file_limit === null ? "unlimited" : number(override.file_limit));

/** The override of a limit as sentences: how it was set, since when, until when and why. */
export function overrideWords(override) {
  const { by, since, until, reason } = override;
  const at = (text) => new Date(text).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
  return [
    `Set${by ? ` by ${by}` : ""}${since ? ` on ${at(since)}` : ""}${until ? `, until ${at(until)}` : ""}.`,
    reason && `Reason: ${reason}.`,
    `The file has ${fileLimit(override)}.`,
  ].filter(Boolean).join(" ");
}

/** The link of a quota: its form among the limits. */
export const quotaLink = ({ environment, json }) =>
  `#/limits/${[environment, json.scope, json.name ?? "", json.kind, json.per].map(encodeURIComponent).join("/")}`;

const COLUMNS = [["Quota", ""], ["", "fold-cell"], ["Used and held", ""], ["Share", "number"], ["Rate", "number"], ["Outlook", ""], ["Last minute", "number"]];

/** The table. `onFold(environment)` is called by the buttons that fold. */
export class QuotaRows {
  #rows = new Map();
  #list = [];
  #foldOf = () => null;

  constructor(onFold) {
    this.onFold = onFold;
    this.above = el("tr", { class: "spacer", "aria-hidden": "true" }, el("td", { colspan: COLUMNS.length }));
    this.below = el("tr", { class: "spacer", "aria-hidden": "true" }, el("td", { colspan: COLUMNS.length }));
    this.body = el("tbody", { role: "rowgroup" }, this.above, this.below);
    const head = COLUMNS.map(([title, name]) =>
      el("th", { scope: "col", role: "columnheader", class: name || null }, title || el("span", { class: "hidden" }, "Fold")));
    this.element = el("table", { role: "table", class: "quotas", "aria-label": "Quotas", onkeydown: (event) => this.#onKey(event) },
      el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, head)), this.body);
  }

  /** Shows these quotas. `foldOf(quota)`: `{hidden, isOpen}` for a row with a button, or `null`. */
  show(list, foldOf) {
    this.#list = list;
    this.#foldOf = foldOf;
    setAttribute(this.element, "aria-rowcount", list.length + 1);
    this.draw();
  }

  /** Draws the visible rows. */
  draw() {
    const height = parseFloat(getComputedStyle(this.element).getPropertyValue("--row-height")) || 56;
    const top = this.above.getBoundingClientRect().top;
    const last = Math.min(this.#list.length, Math.ceil((innerHeight - top) / height) + SPARE_ROWS);
    const first = Math.max(0, Math.min(last, Math.floor(-top / height) - SPARE_ROWS));
    const inSight = new Set(this.#list.slice(first, last));
    for (const [quota, row] of this.#rows) {
      if (inSight.has(quota)) continue;
      row.element.remove();
      this.#rows.delete(quota);
    }
    this.above.style.height = `${first * height}px`;
    this.below.style.height = `${(this.#list.length - Math.max(first, last)) * height}px`;
    const now = Date.now();
    let place = this.above.nextSibling;
    for (let index = first; index < last; index += 1) {
      const quota = this.#list[index];
      let row = this.#rows.get(quota);
      if (!row) this.#rows.set(quota, (row = new Row(this.onFold)));
      row.update(quota, index, this.#foldOf(quota), now);
      if (place === row.element) place = place.nextSibling;
      else this.body.insertBefore(row.element, place);
    }
  }

  /** Arrow keys go from row to row. */
  #onKey(event) {
    const step = { ArrowDown: "nextElementSibling", ArrowUp: "previousElementSibling" }[event.key];
    const link = step && event.target.closest("tr")?.[step]?.querySelector("a");
    if (!link) return;
    event.preventDefault();
    link.focus();
  }
}

