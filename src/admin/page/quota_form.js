// The form of one quota: Unlimited or Specify, limit, burst, duration and reason. Before saving, it shows the result of
// the dry run; after saving, the new state. Undo discards the typed values, or reverts the last save. A change that
// others made meanwhile is shown, and only replaced or removed by a second click.

import { call, quotaPath, withQuery } from "./api.js";
import { el, newId, restoreFocus, setAttribute, setText, setVisible } from "./dom.js";
import { amount, amountOf, count, duration, exactMoment, moment, number, quotaName } from "./format.js";
import { showEnvironment } from "./live.js";
import { fileLimit, overrideWords } from "./quota_rows.js";

/** Time without a key press before the dry run is requested. */
const PAUSE_MS = 250;
/** The text for an override that does not end. */
export const NO_END = "no end";

/** `400,000 tokens per minute`, with the burst if it differs; or `unlimited`. */
function limitWords({ limit, burst, unlimited }, { kind, per }) {
  if (unlimited || limit === null || limit === "unlimited") return "unlimited";
  const extra = burst && burst !== limit ? `, burst ${number(burst)}` : "";
  return `${amountOf(limit, kind)} per ${per}${extra}`;
}

/** ` until 14:20`, with the second if it is near. */
function untilWords(until) {
  if (!until) return "";
  const at = Date.parse(until);
  return ` until ${at - Date.now() < 3_600_000 ? exactMoment(at) : moment(at)}`;
}

/** `file: 400,000, until 14:20`: the limit that an override replaces, and when that ends. */
function sourceWords(override) {
  if (!override) return "override";
  return `file: ${fileLimit(override)}${override.until ? `,${untilWords(override.until)}` : ""}`;
}

/** What the limit in force is and how it was set, to compare. */
const stateOf = ({ limit, burst, unlimited, source, override }) =>
  JSON.stringify([limit, burst, unlimited, source, override?.since, override?.until]);

/** The time until an override ends, for the body of a request. `null`: it has ended. */
function remaining(until) {
  const ms = Date.parse(until) - Date.now();
  return ms > 0 ? `${Math.max(1_000, ms)}ms` : null;
}

export class QuotaForm {
  #timer = 0;
  #isDirty = false;
  /** The override before the last save: `{body, until}`; `null`: the value of the file was in force. */
  #before = null;
  /** The message about the last change, with the state after it, and when that ends: `{text, state, until}`. */
  #said = null;
  /** The state in which the user began to type. */
  #typedOn = "";
  #lastDryRun = 0;

  constructor(quota) {
    this.quota = quota;
    const group = newId("mode");
    const radio = (value) => el("input", { type: "radio", name: group, value, id: `${group}-${value}` });
    const input = (attributes = {}) => el("input", { type: "text", autocomplete: "off", id: newId("field"), ...attributes });
    this.unlimited = radio("unlimited");
    this.specify = radio("specify");
    this.limit = input({ required: true });
    this.burst = input({ placeholder: "as limit" });
    this.duration = input({ list: "durations" });
    this.reason = input({ placeholder: "for the log", maxlength: 200 });
    this.save = el("button", { type: "submit", class: "main" }, "Save");
    this.undo = el("button", { type: "button", onclick: () => this.#undo() }, "Undo");
    this.status = el("output", { role: "status", class: "status" });
    this.state = el("p", { class: "soft state" });
    const labelled = (name, text, field, more) => el("div", { class: `field ${name}` }, el("label", { for: field.id }, text), field, more);
    const choice = (field, text) => el("label", { class: "check", for: field.id }, field, text);
    this.fields = el("div", { class: "fields" },
      labelled("limit", "Limit", this.limit), quota.json.window === "rolling" && labelled("burst", "Burst", this.burst),
      labelled("for", "For", this.duration), labelled("reason", "Reason", this.reason), el("div", { class: "buttons" }, this.save, this.undo));
    const form = el("form", { novalidate: true, onsubmit: (event) => this.#save(event), oninput: () => this.#onInput() },
      el("div", { class: "modes" }, choice(this.unlimited, "Unlimited"), choice(this.specify, "Specify"), this.state),
      this.fields, this.status);
    this.element = el("fieldset", { class: "quota-form" }, el("legend", {}, quotaName(quota.json)), form);
    this.update();
  }

  /** Shows the present state. Text that the user is typing stays. */
  update() {
    const { json, isUnlimited } = this.quota;
    const isOverride = json.source === "override";
    const source = isOverride ? sourceWords(json.override) : "as in the file";
    // A quota without a limit counts by the clock's period. A rolling limit counts what has not come back yet.
    const used = isUnlimited ? `${number(json.used)} used in this period` : `${number(json.used)} of ${number(json.burst)} used`;
    setText(this.state, `${used}; ${source}`);
    setAttribute(this.state, "title", json.override ? overrideWords(json.override) : null);
    this.element.classList.toggle("is-override", isOverride);
    setAttribute(this.duration, "placeholder", json.override?.until ? "same end" : NO_END);
    if (!this.#isDirty) {
      this.#fill();
      if (this.#said) this.#report(this.#isChangedByOthers() ? this.#changedWords() : this.#said.text);
    }
    this.#showParts();
  }

  #isChangedByOthers() {
    return this.#said !== null && this.#said.state !== stateOf(this.quota.json);
  }

  /** A change of the limit that this form did not make. */
  #changedWords() {
    const { json } = this.quota;
    const isFile = json.source !== "override";
    const hasEnded = isFile && this.#said?.until && Date.parse(this.#said.until) <= Date.now() + 1_000;
    return `${hasEnded ? "The override has ended" : "Changed meanwhile"}: ${limitWords(json, json)}${isFile ? ", as in the file" : untilWords(json.override?.until)}.`;
  }

  #fill() {
    const { json, isUnlimited } = this.quota;
    (isUnlimited ? this.unlimited : this.specify).checked = true;
    const set = (field, value) => field.value === value || (field.value = value);
    set(this.limit, isUnlimited ? "" : number(json.limit));
    set(this.burst, isUnlimited || json.burst === json.limit ? "" : number(json.burst));
    set(this.duration, "");
    set(this.reason, "");
  }

  #showParts() {
    const isOverride = this.quota.json.source === "override";
    const isPlainUnlimited = this.unlimited.checked && !this.#isDirty && !isOverride;
    setVisible(this.fields, !isPlainUnlimited);
    this.limit.disabled = this.burst.disabled = this.unlimited.checked;
    this.save.disabled = !this.#isDirty;
    this.undo.disabled = !this.#isDirty && !isOverride;
  }

  #report(text, isAlarm = false) {
    setText(this.status, text);
    setAttribute(this.status, "class", isAlarm ? "status alarm" : "status");
  }

  /** `{body, end}`: the body of a request, and its end in words; `{fault, field}` if a field is not valid. */
  #input() {
    const body = { limit: "unlimited" };
    const fields = this.specify.checked ? { limit: this.limit, burst: this.burst } : {};
    for (const [name, field] of Object.entries(fields)) {
      if (name === "burst" && (field.value.trim() === "" || this.quota.json.window !== "rolling")) continue;
      const { value, fault } = amount(field.value);
      if (fault) return { fault, field };
      body[name] = value;
    }
    const typed = this.duration.value.trim();
    const { until } = this.quota.json.override ?? {};
    const length = typed === "" && until ? remaining(until) ?? "1s" : typed.replaceAll(" ", "");
    if (length && typed.toLowerCase() !== NO_END) body.for = length;
    if (this.reason.value.trim() !== "") body.reason = this.reason.value.trim();
    return { body, end: !body.for ? "" : typed === "" ? untilWords(until) : ` for ${length}` };
  }

  #onInput() {
    if (!this.#isDirty) this.#typedOn = stateOf(this.quota.json);
    this.#isDirty = true;
    this.#showParts();
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#dryRun(), PAUSE_MS);
  }

  async #dryRun() {
    const { body, end, fault } = this.#input();
    const run = (this.#lastDryRun += 1);
    if (fault) return this.#report(fault);
    try {
      const path = withQuery(quotaPath(this.quota.environment, this.quota.json), "dry_run=true");
      const answer = await call("PUT", path, body);
      if (run === this.#lastDryRun && this.#isDirty) this.#report(dryRunWords(answer, this.quota.json, end));
    } catch (error) {
      if (run === this.#lastDryRun) this.#report(error.message, true);
    }
  }

  /** Sends a change and shows the new state. `before`: what Undo restores then. */
  async #change(word, body, before) {
    const hadFocus = this.element.contains(document.activeElement);
    clearTimeout(this.#timer);
    this.#lastDryRun += 1;
    this.save.disabled = this.undo.disabled = true;
    try {
      showEnvironment(await call(body ? "PUT" : "DELETE", quotaPath(this.quota.environment, this.quota.json), body));
      const { json } = this.quota;
      const until = json.override?.until;
      const end = json.source === "override" ? untilWords(until) : ", as in the file";
      this.#said = { text: `${word}: ${limitWords(json, json)}${end}.`, state: stateOf(json), until };
      this.#before = before;
      this.#isDirty = false;
      this.update();
    } catch (error) {
      this.#report(error.message, true);
    } finally {
      this.#showParts();
      if (hadFocus) this.#restoreFocus();
    }
  }

  /** A button that is disabled or hidden loses the focus. */
  #restoreFocus() {
    restoreFocus(this.undo, this.limit, this.unlimited);
  }

  async #save(event) {
    event.preventDefault();
    const { body, fault, field } = this.#input();
    if (fault) {
      this.#report(fault, true);
      return field.focus();
    }
    const state = stateOf(this.quota.json);
    if (this.#typedOn !== state) {
      this.#typedOn = state;
      return this.#report(`${this.#changedWords()} Save again to replace it.`, true);
    }
    await this.#change("Saved", body, this.#present());
  }

  /** The override in force; `null`: the value of the file is in force. */
  #present() {
    const { json, isUnlimited } = this.quota;
    if (json.source !== "override") return null;
    const body = isUnlimited ? { limit: "unlimited" } : { limit: json.limit };
    if (!isUnlimited && json.window === "rolling") body.burst = json.burst;
    const { until, reason } = json.override ?? {};
    if (reason) body.reason = reason;
    return { body, until };
  }

  async #undo() {
    if (this.#isDirty) return this.#discard();
    if (this.#isChangedByOthers()) {
      const text = `${this.#changedWords()} Undo again to go back to the file.`;
      this.#said = { text, state: stateOf(this.quota.json) };
      this.#before = null;
      return this.#report(text);
    }
    const { body, until } = this.#before ?? {};
    const length = until ? remaining(until) : undefined;
    const isOver = length === null;
    await this.#change("Undone", body && !isOver ? { ...body, for: length } : undefined, null);
  }

  #discard() {
    clearTimeout(this.#timer);
    this.#lastDryRun += 1;
    this.#isDirty = false;
    const text = "The typed values are discarded. The limit is unchanged.";
    if (this.#said) this.#said.text = text;
    this.#report(text);
    this.update();
    this.#restoreFocus();
  }
}

/** The result of a dry run as sentences. `end`: when the override would end. */
function dryRunWords(answer, quota, end) {
  const what = limitWords(answer, quota);
  const words = [`Not saved yet. With ${what}${end}:`];
  const isUnlimited = what === "unlimited";
  if (isUnlimited) words.push("the quota counts and never refuses.");
  else if (answer.level === 0) words.push("nothing would be left now, so requests would be refused until there is room.");
  else if (answer.level < 0) words.push(`${number(-answer.level)} more than that ${answer.level === -1 ? "is" : "are"} spent already, so requests would be refused until there is room.`);
  else {
    const end = answer.exhausts_at
      ? `at the present rate they are spent in ${duration(Math.max(0, Date.parse(answer.exhausts_at) - Date.now()))} (at ${moment(Date.parse(answer.exhausts_at))}).`
      : "at the present rate they last.";
    words.push(`${number(answer.level)} would be left now; ${end}`);
  }
  if (typeof answer.refused_last_hour === "number") {
    words.push(answer.refused_last_hour === 0
      ? "No request of the last hour would have been refused."
      : `${count(answer.refused_last_hour, "request")} of the last hour would have been refused.`);
  }
  return words.join(" ");
}
