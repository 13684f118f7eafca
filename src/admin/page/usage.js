// Usage: the history of environments or upstreams by minute, hour, day or month, stacked by caller or model; top lists;
// burn-down of calendar quotas.

import { get } from "./api.js";
import { burnDown, stackedColumns } from "./chart.js";
import { el, replaceInPlace, setText, setVisible, table } from "./dom.js";
import { clockTime, day, duration, kindAndPeriod, moment, momentInZone, number, percent, quotaName, short, unitOf, utcDay, utcMonth } from "./format.js";
import { live } from "./live.js";
import { periodBegin } from "./quota_rows.js";

/** The history changes once a minute. */
const REFRESH_MS = 15_000;
/** Series of a chart; the others are summed up. */
const MAX_SERIES = 7;
/** Two cards stand side by side from this width on. */
const PAIR_WIDTH = 992;
/** Burn-down charts, the worst first. */
const MAX_BURNS = 4;
const OTHERS = "all others";
/** The choice of all upstreams. A single one is chosen by a name such as `upstream openai`. */
const ALL_UPSTREAMS = "upstream ";
const GROUPS_OF_ENVIRONMENTS = [["caller", "by caller"], ["model", "by model"], ["environment", "by environment"]];
const GROUPS_OF_UPSTREAMS = [["model", "by model"], ["upstream", "by upstream"]];

const MINUTE = 60_000;
const RANGES = {
  hour: { title: "Last hour, by minute", step: "1m", length: MINUTE, slots: 60, label: clockTime },
  day: { title: "Last 24 hours, by hour", step: "hour", length: 60 * MINUTE, slots: 24, label: clockTime },
  days: { title: "Last 30 days, by day (UTC)", step: "day", length: 1_440 * MINUTE, slots: 30, label: utcDay },
  months: { title: "Last 12 months, by month (UTC)", step: "month", slots: 12, label: utcMonth },
};
const MEASURES = {
  total_tokens: "Total tokens",
  prompt_tokens: "Prompt tokens",
  completion_tokens: "Completion tokens",
  requests: "Requests",
  rejected: "Refused requests",
};

/** The text of a chart without anything. */
const NOTHING = {
  requests: "No request was served in this time.",
  rejected: "No request was refused in this time.",
};

/** The begins of the steps of a range, the last one being the present. */
function slotsOf({ length, slots }) {
  const now = Date.now();
  if (length) return Array.from({ length: slots }, (_, n) => (Math.floor(now / length) - slots + 1 + n) * length);
  const date = new Date(now);
  return Array.from({ length: slots }, (_, n) => Date.UTC(date.getUTCFullYear(), date.getUTCMonth() - slots + 1 + n));
}

/** Sums by series and slot: `{series, columns, totals}`, the largest series first. */
function sums(rows, groupBy, measure, slots, label) {
  const bySeries = new Map();
  const indexOf = new Map(slots.map((at, n) => [at, n]));
  for (const row of rows) {
    const slot = indexOf.get(Date.parse(row.from));
    if (slot === undefined || row[measure] === 0) continue;
    const name = row[groupBy] || `no ${groupBy}`;
    if (!bySeries.has(name)) bySeries.set(name, new Array(slots.length).fill(0));
    bySeries.get(name)[slot] += row[measure];
  }
  const total = (values) => values.reduce((sum, value) => sum + value, 0);
  const totals = [...bySeries].map(([name, values]) => ({ name, values, total: total(values) })).sort((a, b) => b.total - a.total);
  const shown = totals.slice(0, MAX_SERIES);
  const rest = totals.slice(MAX_SERIES);
  if (rest.length > 0) {
    shown.push({ name: OTHERS, values: slots.map((_, n) => rest.reduce((sum, { values }) => sum + values[n], 0)) });
  }
  const columns = slots.map((at, n) => ({ label: label(at), values: shown.map(({ values }) => values[n]) }));
  return { series: shown.map(({ name }) => name), columns, totals };
}

/** Whether a choice, or the owner of a quota, is an upstream. */
const isUpstream = (choice) => choice.startsWith(ALL_UPSTREAMS);

/** The parameters of a report: `choice` is empty for all environments, the name of one, or of an upstream. */
function reportOf(choice, groupBy, more) {
  const upstream = isUpstream(choice) ? choice.slice(ALL_UPSTREAMS.length) : "";
  // Without a name, the columns choose between environments and upstreams.
  const columns = isUpstream(choice) && groupBy !== "upstream" ? `upstream,${groupBy}` : groupBy;
  const names = upstream ? { upstream } : choice && !isUpstream(choice) ? { environment: choice } : {};
  return new URLSearchParams({ ...names, group_by: columns, ...more });
}

/** The width of a chart in a card that is as wide as the page, or as one of a pair. */
function chartWidth(isPair) {
  const page = document.getElementById("main").clientWidth;
  return Math.max(260, (isPair && page >= PAIR_WIDTH ? (page - 16) / 2 : page) - 38);
}

/** The chart with its key, the same figures as a table, and the top list. */
function charts({ series, columns, totals }, groupBy, measure, range) {
  const name = `${MEASURES[measure]} by ${groupBy}, ${range.title.toLowerCase()}`;
  const total = totals.reduce((sum, entry) => sum + entry.total, 0);
  if (total === 0) return [el("p", { class: "calm" }, NOTHING[measure] ?? "Nothing was spent in this time.")];
  const key = el("ul", { class: "legend" }, series.map((text, n) => el("li", {}, el("i", { class: `key series-${n % 8}` }), text)));
  const filled = columns.filter(({ values }) => values.some((value) => value > 0)).reverse();
  const chart = stackedColumns({ columns, series, label: `${name}: ${number(total)} in all`, format: short, width: chartWidth(false), height: 280 });
  const figures = table(name, [{ title: "Begin" }, ...series.map((title) => ({ title, isNumber: true }))],
    filled.map(({ label, values }) => [label, ...values.map(number)]));
  const top = table(`Top ${groupBy}s`, [{ title: groupBy }, { title: MEASURES[measure], isNumber: true }, { title: "Share", isNumber: true }],
    totals.slice(0, 20).map((entry) => [entry.name, number(entry.total), percent(entry.total / total)]));
  return [
    el("figure", { class: "card", "aria-label": name }, el("figcaption", {}, `${name}: ${number(total)} in all`), el("div", { class: "wide" }, chart), key),
    el("div", { class: "pair" }, el("section", { class: "card" }, el("h2", {}, `Top ${groupBy}s`), top),
      el("section", { class: "card" }, el("h2", {}, "The same figures"), figures)),
  ];
}

/** The burn-down of a calendar quota with its forecast. */
async function burn(quota) {
  const { json } = quota;
  const [now, begin, end] = [Date.now(), periodBegin(quota), quota.resetsAt];
  const left = json.limit - json.used;
  const points = [{ at: begin, left: json.limit }];
  if (json.scope === "environment" || json.scope === "upstream") points.push(...(await spentSince(quota, begin, now)));
  points.push({ at: now, left });
  const isSpent = quota.exhaustsAt !== null && quota.exhaustsAt < end;
  const forecast = isSpent ? { at: quota.exhaustsAt, left: 0 } : { at: end, left: left - ((json.rate ?? 0) * (end - now)) / 1_000 };
  const words = left <= 0 ? "It is spent."
    : isSpent ? `At the present rate it is spent at ${moment(quota.exhaustsAt)}, ${duration(end - quota.exhaustsAt)} before it resets.`
    : `At the present rate ${number(Math.max(0, forecast.left))} ${unitOf(json.kind)} are left when it resets.`;
  const title = `${quota.environment} · ${quotaName(json)}`;
  const chart = burnDown({ begin, end, limit: json.limit, points, forecast, label: `What is left of ${title}: ${number(Math.max(0, left))} of ${number(json.limit)}. ${words}`, format: short,
    width: chartWidth(true), height: 200, formatTime: (at) => (end - begin > 2 * 86_400_000 ? day(at, quota.zone) : clockTime(at)) });
  return el("figure", { class: `card ${isSpent || left <= 0 ? "running-out" : ""}`, "aria-label": `Burn-down of ${title}` },
    el("figcaption", {}, title), el("p", { class: "soft" }, `${words} Resets ${momentInZone(end, quota.zone)}.`), el("div", { class: "wide" }, chart),
    table(`What is left of ${title}`, [{ title: "Moment" }, { title: `${kindAndPeriod(json)}, left`, isNumber: true }],
      [points[0], { at: now, left: Math.max(0, left) }, { at: forecast.at, left: Math.max(0, Math.round(forecast.left)) }].map((point) => [moment(point.at), number(point.left)])));
}

/** What was left after each hour or day of the period, from the history. */
async function spentSince(quota, begin, now) {
  const isLong = now - begin > 3 * 86_400_000;
  const groupBy = quota.isOfUpstream ? "upstream" : "environment";
  const query = reportOf(quota.environment, groupBy, { from: new Date(begin).toISOString(), step: isLong ? "day" : "hour" });
  const { rows } = await get(`/api/usage?${query}`).catch(() => ({ rows: [] }));
  let spent = 0;
  return rows
    .map((row) => ({ at: Date.parse(row.from) + (isLong ? 24 : 1) * 3_600_000, left: quota.json.limit - (spent += row[quota.json.kind]) }))
    .filter(({ at }) => at > begin && at < now);
}

const optionsOf = (options) => options.map(([value, title]) => el("option", { value }, title));

function select(label, options, onchange) {
  return el("select", { "aria-label": label, onchange }, optionsOf(options));
}

/** Replaces the options. The choice stays if there is still such an option; otherwise it is the first one. */
function setOptions(element, children) {
  const chosen = element.value;
  element.replaceChildren(...children);
  element.value = chosen;
  if (element.selectedIndex < 0) element.selectedIndex = 0;
}

/** The options of environments, and those of upstreams if any has quotas. */
function owners() {
  const environments = [["", "All environments"], ...[...live.environments.keys()].map((name) => [name, name])];
  const upstreams = [...live.upstreams.keys()].map((name) => [name, name]);
  if (upstreams.length === 0) return optionsOf(environments);
  if (upstreams.length > 1) upstreams.unshift([ALL_UPSTREAMS, "All upstreams"]);
  return [el("optgroup", { label: "Environments" }, optionsOf(environments)), el("optgroup", { label: "Upstreams with quotas" }, optionsOf(upstreams))];
}

/** Makes the view. */
export function usage() {
  const load = () => void refresh();
  const range = select("Time", Object.entries(RANGES).map(([key, { title }]) => [key, title]), load);
  const measure = select("Measure", Object.entries(MEASURES), load);
  const group = select("Stack by", GROUPS_OF_ENVIRONMENTS, load);
  const owner = select("Environment or upstream", [["", "All environments"]], () => {
    setGroups();
    load();
  });
  const setGroups = () => setOptions(group, optionsOf(isUpstream(owner.value) ? GROUPS_OF_UPSTREAMS : GROUPS_OF_ENVIRONMENTS));
  const csv = el("a", { class: "button", download: "tollgate-usage.csv" }, "Download CSV");
  const alert = el("p", { class: "notice", role: "status", hidden: true });
  const box = el("div");
  const burns = el("section", { "aria-label": "Burn-down", class: "burns" });
  const element = el("div", {}, el("div", { class: "tools" }, el("h1", {}, "Usage"), range, owner, group, measure, csv), alert, box, burns);
  let isClosed = false;
  let run = 0;

  async function refresh() {
    const own = (run += 1);
    const choice = RANGES[range.value];
    const slots = slotsOf(choice);
    const query = reportOf(owner.value, group.value, { from: new Date(slots[0]).toISOString(), step: choice.step });
    csv.href = `/api/usage?${query}&format=csv`;
    try {
      const { rows } = await get(`/api/usage?${query}`);
      if (own !== run || isClosed) return;
      replaceInPlace(box, charts(sums(rows, group.value, measure.value, slots, choice.label), group.value, measure.value, choice));
      setVisible(alert, false);
    } catch (error) {
      if (own !== run || isClosed) return;
      setText(alert, error.message);
      setVisible(alert, true);
    }
    const isChosen = (quota) => (owner.value === ALL_UPSTREAMS ? quota.isOfUpstream : !owner.value || quota.environment === owner.value);
    const calendar = live.quotas.filter((quota) => quota.json.window === "calendar" && !quota.isUnlimited && isChosen(quota));
    const worst = calendar.sort((a, b) => a.rank - b.rank).slice(0, MAX_BURNS);
    const figures = await Promise.all(worst.map(burn));
    if (own === run && !isClosed) replaceInPlace(burns, figures.length > 0 ? [el("h2", {}, "Calendar quotas"), el("div", { class: "pair" }, figures)] : []);
  }

  let names = "";
  function update(what) {
    if (what !== "state") return;
    const all = [...live.environments.keys(), ...live.upstreams.keys()].join("\n");
    if (all === names) return;
    names = all;
    setOptions(owner, owners());
    setGroups();
    load();
  }
  load();
  const timer = setInterval(() => document.hidden || load(), REFRESH_MS);
  let resizing = 0;
  const onResize = () => {
    clearTimeout(resizing);
    resizing = setTimeout(load, 200);
  };
  addEventListener("resize", onResize);
  return {
    title: "Usage",
    element,
    update,
    close() {
      isClosed = true;
      clearInterval(timer);
      removeEventListener("resize", onResize);
    },
  };
}
