// Refusals: the last refused requests, as they happen, and their causes.

import { el, focusOn, setText, setVisible } from "./dom.js";
import { count, duration, exactMoment, isOfUpstream, moment, number, ownerName, percent, quotaName } from "./format.js";
import { live } from "./live.js";

/** Rows drawn at first, and added by each "Show more". */
const BATCH = 100;
/** Causes that are listed. */
const MAX_CAUSES = 12;

/** The quota of a refusal whose room comes last. */
function cause(refusal) {
  return refusal.quotas.reduce((worst, quota) => {
    const wait = quota.retry_after_ms ?? Infinity;
    return worst === null || wait > (worst.retry_after_ms ?? Infinity) ? quota : worst;
  }, null);
}

/** `request exceeds quota`. */
const codeWords = (code) => code.replaceAll("_", " ");

/** The environment, the upstream if one of its limits is the cause, and the cause. `limit` has a `kind` if it is a quota. */
const wordsOf = (environment, code, limit) => [
  environment,
  ...(limit && isOfUpstream(limit) ? [ownerName(environment, limit)] : []),
  limit?.kind ? quotaName(limit) : codeWords(code),
].join(" · ");

const causeWords = (refusal) => wordsOf(refusal.environment, refusal.code, cause(refusal) ?? refusal);

function fits({ at, retry_after_ms: wait }, quota) {
  if (wait === undefined) return quota ? "never: too large" : "–";
  const then = Date.parse(at) + wait;
  return `after ${duration(wait)} (${wait < 3_600_000 ? exactMoment(then) : moment(then)})`;
}

function row(refusal) {
  const quota = cause(refusal);
  const cell = (title, name, ...children) => el("td", { role: "cell", class: name, "data-title": title }, ...children);
  return el("tr", { role: "row", class: "new" },
    el("th", { role: "rowheader", scope: "row" }, exactMoment(Date.parse(refusal.at))),
    cell("Quota", null, causeWords(refusal), el("div", { class: "soft" }, codeWords(refusal.code))),
    cell("Caller", null, refusal.caller ?? "–"),
    cell("Model", null, refusal.model || "–"),
    cell("Asked", "number", quota ? number(quota.requested) : "–"),
    cell("Left", "number", quota ? number(quota.remaining) : "–"),
    cell("Would fit", null, fits(refusal, quota)),
    cell("Request id", "id", refusal.request_id));
}

class Causes {
  constructor() {
    this.note = el("p", { class: "soft" });
    this.list = el("ul", { class: "causes" });
    this.element = el("section", { class: "card", "aria-label": "By cause" }, el("h2", {}, "By cause"), this.note, this.list);
    this.items = [];
  }

  /** `lastDay`: as `/api/rejections` has it. */
  update({ refusals, causes }) {
    const shown = causes.slice(0, MAX_CAUSES);
    const rest = causes.length > shown.length ? ` The ${MAX_CAUSES} most frequent causes:` : "";
    setText(this.note, `${count(refusals, "refusal")} in the last 24 hours.${rest}`);
    shown.forEach((sum, n) => {
      this.items[n] ??= this.#item();
      const { name, value, bar } = this.items[n];
      setText(name, wordsOf(sum.environment, sum.code, sum));
      setText(value, `${number(sum.refusals)} (${percent(sum.refusals / refusals)})`);
      bar.style.width = `${(100 * sum.refusals) / shown[0].refusals}%`;
    });
    this.items.forEach(({ element }, n) => setVisible(element, n < shown.length));
  }

  #item() {
    const [name, value, bar] = [el("span"), el("b"), el("i")];
    const element = el("li", {}, name, value, el("div", { class: "meter", "aria-hidden": "true" }, bar));
    this.list.append(element);
    return { element, name, value, bar };
  }
}

/** Makes the view. */
export function refusals() {
  const rows = new Map();
  const body = el("tbody", { role: "rowgroup" });
  const sums = new Causes();
  let shown = BATCH;
  const filter = el("input", { type: "search", "aria-label": "Filter", placeholder: "Filter: environment, caller, model, id", oninput: () => update("state") });
  const more = el("button", { type: "button", onclick: () => showMore() }, "Show more");
  const rest = el("p", { class: "soft" });
  const empty = el("p", { class: "calm", role: "status" });
  const columns = ["Time", "Quota and reason", "Caller", "Model", "Asked", "Left", "Would fit", "Request id"];
  const head = columns.map((title) => el("th", { role: "columnheader", scope: "col", class: ["Asked", "Left"].includes(title) ? "number" : null }, title));
  // The roles hold also where the style sheet makes blocks of the rows.
  const table = el("table", { role: "table", class: "refusals", "aria-label": "Refusals" },
    el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, head)), body);
  const element = el("div", {}, el("div", { class: "tools" }, el("h1", {}, "Refusals"), filter),
    sums.element, el("div", { class: "wide" }, table), empty, el("div", { class: "tools" }, more, rest));

  function showMore() {
    const first = shown;
    shown += BATCH;
    update("state");
    if (more.hidden) focusOn(body.children[first]);
  }

  function update(what) {
    if (what === "config") return;
    const text = filter.value.trim().toLowerCase();
    const matches = (refusal) => `${causeWords(refusal)} ${refusal.caller} ${refusal.model} ${refusal.request_id} ${refusal.code}`.toLowerCase().includes(text);
    const all = text ? live.refusals.filter(matches) : live.refusals;
    const drawn = all.slice(0, shown);
    const inSight = new Set(drawn);
    for (const [refusal, tr] of rows) {
      if (inSight.has(refusal)) continue;
      tr.remove();
      rows.delete(refusal);
    }
    let place = body.firstChild;
    for (const refusal of drawn) {
      let tr = rows.get(refusal);
      if (!tr) rows.set(refusal, (tr = row(refusal)));
      if (place === tr) place = place.nextSibling;
      else body.insertBefore(tr, place);
    }
    sums.update(live.lastDay);
    setVisible(empty, live.isLoaded && all.length === 0);
    setText(empty, live.refusals.length === 0 ? "No request was refused since the gateway started." : "No refused request matches the filter.");
    setVisible(table, all.length > 0);
    setVisible(sums.element, live.lastDay.refusals > 0);
    setVisible(more, all.length > drawn.length);
    setText(rest, all.length > drawn.length ? `${drawn.length} of ${number(all.length)}` : "");
  }
  return { title: "Refusals", element, update, close() {} };
}
