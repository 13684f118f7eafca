// The form of one quota: Unlimited or Specify, limit, burst, duration and reason. Before saving, it shows the result of
// the dry run; after saving, the new state. Undo discards the typed values, or reverts the last save.

import { call, quotaPath, withQuery } from "./api.js";
import { el, newId, setAttribute, setText, setVisible } from "./dom.js";
import { amount, amountOf, count, duration, moment, number, quotaName } from "./format.js";
import { showEnvironment } from "./live.js";
import { fileLimit, overrideWords } from "./quota_rows.js";

/** Time without a key press before the dry run is requested. */
const PAUSE_MS = 250;

/** `400,000 tokens per minute`, with the burst if it differs; or `unlimited`. */
function limitWords({ limit, burst, unlimited }, { kind, per }) {
  if (unlimited || limit === null || limit === "unlimited") return "unlimited";
  const extra = burst && burst !== limit ? `, burst ${number(burst)}` : "";
  return `${amountOf(limit, kind)} per ${per}${extra}`;
}

export class QuotaForm {
  #timer = 0;
  #isDirty = false;
  /** The body of a request that reverts the last save; `null`: the file's value is restored. */
  #before;
  #lastDryRun = 0;

  /** `onSaved()` is called when a limit was changed. */
  constructor(quota, onSaved) {
    this.quota = quota;
    this.onSaved = onSaved;
    const group = newId("mode");
    const radio = (value) => el("input", { type: "radio", name: group, value, id: `${group}-${value}` });
    const input = (attributes = {}) => el("input", { type: "text", autocomplete: "off", id: newId("field"), ...attributes });
    this.unlimited = radio("unlimited");
    this.specify = radio("specify");
    this.limit = input({ required: true });
    this.burst = input({ placeholder: "as limit" });
    this.duration = input({ placeholder: "no end", list: "durations" });
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
    const source = !isOverride ? "as in the file" : json.override ? `file: ${fileLimit(json.override)}${json.override.until ? `, until ${moment(Date.parse(json.override.until))}` : ""}` : "override";
    setText(this.state, isUnlimited ? `${number(json.used)} used; ${source}` : `${number(json.used)} of ${number(json.burst)} used; ${source}`);
    setAttribute(this.state, "title", json.override ? overrideWords(json.override) : null);
    setAttribute(this.element, "class", isOverride ? "quota-form is-override" : "quota-form");
    if (!this.#isDirty) this.#fill();
    this.#showParts();
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

  /** The body of a request, or `null` with a message if a field is empty. */
  #body() {
    const body = { limit: "unlimited" };
    if (this.specify.checked) {
      const text = this.limit.value.trim();
      if (text === "") return null;
      body.limit = amount(text) ?? text;
      const burst = this.burst.value.trim();
      if (burst !== "" && this.quota.json.window === "rolling") body.burst = amount(burst) ?? burst;
    }
    if (this.duration.value.trim() !== "") body.for = this.duration.value.trim().replaceAll(" ", "");
    if (this.reason.value.trim() !== "") body.reason = this.reason.value.trim();
    return body;
  }

  #onInput() {
    this.#isDirty = true;
    this.#showParts();
    clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.#dryRun(), PAUSE_MS);
  }

  async #dryRun() {
    const body = this.#body();
    if (!body) return this.#report("Enter a limit, such as 400,000 or 400k.");
    const run = (this.#lastDryRun += 1);
    try {
      const path = withQuery(quotaPath(this.quota.environment, this.quota.json), "dry_run=true");
      const answer = await call("PUT", path, body);
      if (run === this.#lastDryRun && this.#isDirty) this.#report(dryRunWords(answer, this.quota.json, body.for));
    } catch (error) {
      if (run === this.#lastDryRun) this.#report(error.message, true);
    }
  }

  /** Sends a change and shows the new state. */
  async #change(method, body, words) {
    clearTimeout(this.#timer);
    this.#lastDryRun += 1;
    this.save.disabled = this.undo.disabled = true;
    try {
      const answer = await call(method, quotaPath(this.quota.environment, this.quota.json), body);
      this.#isDirty = false;
      showEnvironment(answer);
      this.update();
      this.#report(words());
      this.onSaved();
      return true;
    } catch (error) {
      this.#report(error.message, true);
      return false;
    } finally {
      this.#showParts();
    }
  }

  async #save(event) {
    event.preventDefault();
    const body = this.#body();
    if (!body) {
      this.#report("Enter a limit, such as 400,000 or 400k.", true);
      return this.limit.focus();
    }
    const before = this.#present();
    const until = () => (body.for ? ` for ${body.for}` : "");
    const isSaved = await this.#change("PUT", body, () => `Saved: ${limitWords(this.quota.json, this.quota.json)}${until()}.`);
    if (isSaved) this.#before = before;
  }

  /** The override in force as a request body; `null`: the file's value is in force. */
  #present() {
    const { json, isUnlimited } = this.quota;
    if (json.source !== "override") return null;
    const body = isUnlimited ? { limit: "unlimited" } : { limit: json.limit };
    if (!isUnlimited && json.window === "rolling") body.burst = json.burst;
    const { until, reason } = json.override ?? {};
    if (until) body.for = `${Math.max(1, Math.ceil((Date.parse(until) - Date.now()) / 1_000))}s`;
    if (reason) body.reason = reason;
    return body;
  }

  async #undo() {
    if (this.#isDirty) {
      clearTimeout(this.#timer);
      this.#lastDryRun += 1;
      this.#isDirty = false;
      this.update();
      return this.#report("The typed values are discarded. The limit is unchanged.");
    }
    const before = this.#before ?? null;
    const words = () => `Undone: ${limitWords(this.quota.json, this.quota.json)}${before ? "" : ", as in the file"}.`;
    if (await this.#change(before ? "PUT" : "DELETE", before ?? undefined, words)) this.#before = null;
  }
}

/** The result of a dry run as sentences. */
function dryRunWords(answer, quota, isFor) {
  const what = limitWords(answer, quota);
  const words = [`Not saved yet. With ${what}${isFor ? ` for ${isFor}` : ""}:`];
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
