// Numbers, durations, moments and names as text.

const whole = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const tenth = new Intl.NumberFormat("en-US", { maximumFractionDigits: 1 });
const compact = new Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 3 });

/** `12,345`. */
export const number = (value) => whole.format(value);

/** `12.3K`, for axes and places without room. */
export const short = (value) => compact.format(value);

/** `12.3M/s`, `1,234/s`, `3.4/s`, or `6/min`: an amount over time. */
export function rate(perSecond) {
  if (perSecond >= 1e5) return `${short(perSecond)}/s`;
  if (perSecond >= 1 || perSecond === 0) return `${(perSecond < 10 ? tenth : whole).format(perSecond)}/s`;
  const perMinute = 60 * perSecond;
  return perMinute < 0.1 ? "< 0.1/min" : `${(perMinute < 10 ? tenth : whole).format(perMinute)}/min`;
}

/** `37 %`. A share above 0 is never shown as `0 %`, and a share below 1 never as `100 %`. */
export function percent(share) {
  const value = Math.round(100 * share);
  if (share > 0 && value === 0) return "< 1 %";
  if (share < 1 && value === 100) return "> 99 %";
  return `${(value < 10_000 ? whole : compact).format(value)} %`;
}

const UNITS = [["d", 86_400_000], ["h", 3_600_000], ["m", 60_000], ["s", 1_000]];

/** `41 s`, `2 h 10 m`, `3 d 4 h`: the two largest units. */
export function duration(ms) {
  if (ms < 1_000) return ms > 0 ? "1 s" : "0 s";
  const first = UNITS.findIndex(([, length]) => ms >= length);
  const [unit, length] = UNITS[first];
  const count = Math.floor(ms / length);
  const next = UNITS[first + 1];
  if (!next || count >= 10) return `${count} ${unit}`;
  const rest = Math.floor((ms - count * length) / next[1]);
  return rest === 0 ? `${count} ${unit}` : `${count} ${unit} ${rest} ${next[0]}`;
}

const formats = new Map();

/** A formatter for this zone; `undefined`: the viewer's zone. Unknown zones are UTC. */
function formatter(zone, options) {
  const key = `${zone} ${Object.keys(options)}`;
  if (!formats.has(key)) {
    let made;
    try {
      made = new Intl.DateTimeFormat("en-GB", { ...options, timeZone: zone });
    } catch {
      made = new Intl.DateTimeFormat("en-GB", { ...options, timeZone: "UTC" });
    }
    formats.set(key, made);
  }
  return formats.get(key);
}

const TIME = { hour: "2-digit", minute: "2-digit" };
const SECONDS = { ...TIME, second: "2-digit" };
const DAY = { day: "numeric", month: "short" };
const YEAR = { ...DAY, year: "numeric" };

/** Moments closer than this are shown without their day. */
const NEAR_MS = 20 * 3_600_000;

/** `14:20` if it is near, else `1 Dec, 14:20`; in the viewer's zone, or in the given one. */
export function moment(at, zone) {
  const isNear = Math.abs(at - Date.now()) < NEAR_MS;
  return formatter(zone, isNear ? TIME : { ...DAY, ...TIME }).format(at);
}

/** `14:20:05` today, `1 Dec, 14:20:05` on another day; in the viewer's zone. */
export function exactMoment(at) {
  const day = formatter(undefined, YEAR);
  const isToday = day.format(at) === day.format(Date.now());
  return formatter(undefined, isToday ? SECONDS : { ...DAY, ...SECONDS }).format(at);
}

/** `1 Dec`, in a zone. */
export const day = (at, zone) => formatter(zone, DAY).format(at);

/** `1 Dec`, in UTC, as the usage history counts. */
export const utcDay = (at) => day(at, "UTC");

/** `Dec 2026`, in UTC. */
export const utcMonth = (at) => formatter("UTC", { month: "short", year: "numeric" }).format(at);

/** `14:20`, in the viewer's zone. */
export const clockTime = (at) => formatter(undefined, TIME).format(at);

const viewersZone = new Intl.DateTimeFormat().resolvedOptions().timeZone;

/** The place of a zone: `Berlin` for `Europe/Berlin`. */
const place = (zone) => zone.split("/").at(-1).replaceAll("_", " ");

/**
 * `at 00:00 Berlin, 18:00 here`: a moment in the zone of its quota, and in the viewer's if the clocks differ.
 * `undefined` as zone: the viewer's only.
 */
export function momentInZone(at, zone) {
  if (!zone || zone === viewersZone) return `at ${moment(at)}`;
  const there = moment(at, zone);
  const here = moment(at);
  return there === here ? `at ${there} ${place(zone)}` : `at ${there} ${place(zone)}, ${here} here`;
}

const CLOCK = { hourCycle: "h23", year: "numeric", month: "numeric", day: "numeric", hour: "numeric", minute: "numeric", second: "numeric" };

/** What the clocks of a zone show at a moment, as the moment at which those of UTC show it. */
function clockIn(zone, at) {
  const parts = formatter(zone, CLOCK).formatToParts(at).map(({ type, value }) => [type, Number(value)]);
  const { year, month, day, hour, minute, second } = Object.fromEntries(parts);
  return Date.UTC(year, month - 1, day, hour, minute, second);
}

/** The begin of the day that is so many months and days before the one of a moment, in a zone. */
export function dayBefore(at, zone, months, days) {
  const today = new Date(clockIn(zone, at));
  const midnight = Date.UTC(today.getUTCFullYear(), today.getUTCMonth() - months, today.getUTCDate() - days);
  const guess = (near) => midnight - (clockIn(zone, near) - near);
  const guesses = [guess(midnight), guess(guess(midnight))];
  // When the clocks change at midnight, it comes twice, or the day begins later.
  const midnights = [...guesses, guesses[1] - 3_600_000].filter((moment) => clockIn(zone, moment) === midnight);
  return midnights.length > 0 ? Math.min(...midnights) : Math.max(...guesses);
}

/** `total tokens per minute`. */
export const kindAndPeriod = ({ kind, per }) => `${kind.replaceAll("_", " ")} per ${per}`;

/** Whether a quota belongs to an upstream, and so to all environments together. */
export const isOfUpstream = ({ scope }) => scope === "upstream" || scope === "upstream_model";

/** What a quota belongs to: `environment`, or `upstream openai`. */
export function ownerName(environment, { scope, name }) {
  if (scope === "upstream") return `upstream ${name}`;
  return scope === "upstream_model" ? `upstream ${name.slice(0, name.indexOf("/"))}` : environment;
}

/** `caller batch · total tokens per minute`: a quota within its environment or upstream. */
export function quotaName(quota) {
  const { scope, name } = quota;
  if (!name || scope === "upstream") return kindAndPeriod(quota);
  const whose = scope === "upstream_model" ? `model ${name.slice(name.indexOf("/") + 1)}` : `${scope} ${name}`;
  return `${whose} · ${kindAndPeriod(quota)}`;
}

/** `tokens` or `requests`. */
export const unitOf = (kind) => (kind === "requests" ? "requests" : "tokens");

/** `1 request`, `400,000 tokens`. */
export const amountOf = (value, kind) => count(value, unitOf(kind).slice(0, -1));

/** Zeros that a suffix of an amount stands for. */
const ZEROS = { "": 0, k: 3, m: 6, g: 9 };
/** The largest limit that the gateway accepts. */
const MAX_AMOUNT = 2 ** 50;

/**
 * `{value}`: the amount that a text means, such as `400000`, `400,000`, `400k` or `1.5M`. `{fault}`: a sentence, if it
 * means none, or another one to readers who write `1.000` for a thousand or `1,5` for a fraction.
 */
export function amount(text) {
  const [, whole, fraction = "", suffix] = /^([\d,_ ]*?)(?:\.(\d+))?\s*([kmg]?)$/i.exec(text.trim()) ?? [];
  if (!whole && !fraction) return { fault: "Enter a whole number, such as 400,000 or 400k." };
  if (!/^(\d*|\d{1,3}([,_ ])\d{3}(\2\d{3})*)$/.test(whole)) {
    return { fault: "A comma separates groups of three digits, as in 1,500,000. A fraction has a point, as in 1.5M." };
  }
  if (fraction.endsWith("0") || fraction.length > ZEROS[suffix.toLowerCase()]) {
    return { fault: `“${text.trim()}” is not clear: a point begins a fraction, as in 1.5M. A thousand is 1,000 or 1k.` };
  }
  const value = Number(whole.replace(/[,_ ]/g, "") + fraction.padEnd(ZEROS[suffix.toLowerCase()], "0"));
  return value >= 1 && value <= MAX_AMOUNT ? { value } : { fault: `The amount must be from 1 to ${number(MAX_AMOUNT)}.` };
}

/** The plural of a counted noun: `1 refusal`, `2 refusals`. */
export const count = (value, noun) => `${number(value)} ${noun}${value === 1 ? "" : "s"}`;
