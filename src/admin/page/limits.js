// Limits: the environments and the upstreams side by side, with a form for each quota.

import { call, get } from "./api.js";
import { el, focusOn, replaceIfNew, setText, setVisible } from "./dom.js";
import { count, moment, number, quotaName } from "./format.js";
import { live, owner, showEnvironment } from "./live.js";
import { NO_END, QuotaForm } from "./quota_form.js";
import { periodMs } from "./quota_rows.js";

/** Environments drawn at first, and added by each "Show more". */
const BATCH = 12;
const FIRST = ["production", "sandbox"];
const KINDS = ["total_tokens", "prompt_tokens", "completion_tokens", "requests"];

const place = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);

/** Whether quotas are enforced, and whether an administrator has set that. */
function enforceWords({ enforce, enforce_override: override }) {
  const until = override?.until ? ` until ${moment(Date.parse(override.until))}` : "";
  const origin = override ? `, by an override${until}` : "";
  return `${enforce ? "Quotas are enforced" : "Shadow mode: quotas count and refuse nothing"}${origin}.`;
}

/** By period, then by kind. */
const inOrder = (a, b) => periodMs(a.json.per) - periodMs(b.json.per) || KINDS.indexOf(a.json.kind) - KINDS.indexOf(b.json.kind);

/** The card of one environment or upstream. */
class EnvironmentCard {
  #forms = new Map();
  #isOpen = false;
  /** Whether a change of `enforce` is sent, or was. */
  #enforcing = { isSending: false, isSent: false, fault: "" };
  /** Why the form that a link leads to is not shown. */
  #missing = "";

  constructor(name) {
    this.name = name;
    this.own = el("div", { class: "forms" });
    this.others = el("div", { class: "forms" });
    this.summary = el("summary", {});
    this.fold = el("details", { ontoggle: () => this.#open(this.fold.open) }, this.summary, this.others);
    this.enforce = el("input", { type: "checkbox", id: `enforce-${name}`, onchange: () => this.#setEnforce() });
    this.enforceLabel = el("label", { class: "check", for: this.enforce.id }, this.enforce, "Enforce");
    this.status = el("output", { class: "status", role: "status" });
    this.element = el("section", { class: "card environment", role: "group", "aria-label": name },
      el("div", { class: "tools" }, el("h2", {}, name), this.enforceLabel), this.status, this.own, this.fold);
  }

  update() {
    const found = owner(this.name);
    if (!found) return;
    const { json, quotas } = found;
    setVisible(this.enforceLabel, typeof json.enforce === "boolean");
    this.#showEnforce(json);
    const isOwn = ({ json: { name, scope } }) => !name || scope === "upstream";
    this.#place(this.own, quotas.filter(isOwn).sort(inOrder));
    const others = quotas.filter((quota) => !isOwn(quota));
    setVisible(this.fold, others.length > 0);
    setText(this.summary, `${live.upstreams.has(this.name) ? "Models" : "Callers and models"}: ${count(others.length, "quota")}`);
    if (this.#isOpen) this.#place(this.others, others);
  }

  /** Shows the forms of these quotas in a box, and updates them. */
  #place(box, quotas) {
    replaceIfNew(box, quotas.map((quota) => quota.label).join("\n"), () => quotas.map((quota) => this.#form(quota).element));
    for (const quota of quotas) this.#form(quota).update();
  }

  #form(quota) {
    let form = this.#forms.get(quota);
    if (!form) this.#forms.set(quota, (form = new QuotaForm(quota)));
    return form;
  }

  #open(isOpen) {
    this.#isOpen = isOpen;
    if (isOpen) this.update();
  }

  #showEnforce(json) {
    const { isSending, isSent, fault } = this.#enforcing;
    if (!isSending) this.enforce.checked = json.enforce !== false;
    const isSaid = isSent || json.enforce === false || Boolean(json.enforce_override);
    setText(this.status, fault || this.#missing || (isSaid && typeof json.enforce === "boolean" ? enforceWords(json) : ""));
  }

  async #setEnforce() {
    const enforce = this.enforce.checked;
    this.#missing = "";
    this.#enforcing = { isSending: true, isSent: false, fault: "" };
    let answer = null;
    try {
      const { enforce: overrides } = await get("/api/overrides");
      const override = overrides.find(({ environment }) => environment === this.name);
      // Back to the file if that has the same value, so that no override is left.
      const file = override ? override.file_enforce : owner(this.name).json.enforce;
      answer = await call("PATCH", `/api/environments/${encodeURIComponent(this.name)}`, { enforce: enforce === file ? null : enforce });
      this.#enforcing = { isSending: false, isSent: true, fault: "" };
    } catch ({ message }) {
      this.#enforcing = { isSending: false, isSent: false, fault: message };
    }
    if (answer) showEnvironment(answer);
    this.update();
  }

  /** Shows and focuses the form of a quota. */
  reveal(scope, name, kind, per) {
    if (name) {
      this.fold.open = true;
      this.#open(true);
    }
    const quota = owner(this.name)?.quotas.find(({ json }) =>
      json.scope === scope && (json.name ?? "") === name && json.kind === kind && json.per === per);
    const form = quota && this.#forms.get(quota);
    if (!form) {
      this.#missing = `There is no quota “${quotaName({ scope, name, kind, per })}”.`;
      return this.update();
    }
    form.element.scrollIntoView({ block: "center" });
    form.element.classList.add("target");
    (form.limit.disabled ? form.unlimited : form.limit).focus({ preventScroll: true });
  }
}

/** The overrides as YAML, for the config file. */
class YamlCopy {
  constructor() {
    this.button = el("button", { type: "button", onclick: () => this.#copy() }, "Copy as YAML");
    this.text = el("textarea", { readonly: true, rows: 10, spellcheck: "false", "aria-label": "Overrides as YAML" });
    this.status = el("output", { class: "status", role: "status" });
    this.box = el("div", { class: "card yaml", hidden: true }, this.status, this.text);
  }

  async #copy() {
    let text;
    try {
      text = await get("/api/overrides?format=yaml");
    } catch (error) {
      setVisible(this.box, true);
      setVisible(this.text, false);
      return setText(this.status, error.message);
    }
    if (text.replace(/^#.*\n/gm, "").trim() === "environments: {}") {
      setVisible(this.box, true);
      setVisible(this.text, false);
      return setText(this.status, "Nothing to copy: everything is as in the file.");
    }
    this.text.value = text;
    this.text.rows = Math.min(16, text.split("\n").length + 1);
    setVisible(this.box, true);
    setVisible(this.text, true);
    try {
      await navigator.clipboard.writeText(text);
      setText(this.status, "Copied: the differences from the config file, as a patch for it.");
    } catch {
      this.text.select();
      setText(this.status, "The differences from the config file, as a patch for it. The text is selected: copy it with the keyboard.");
    }
  }
}

/** Makes the view. `parts`: the environment and the quota that the address names. */
export function limits([environment = "", ...quota]) {
  const cards = new Map();
  const yaml = new YamlCopy();
  const filter = el("input", { type: "search", "aria-label": "Filter", placeholder: "Filter: environment, upstream", value: environment, oninput: () => update() });
  const grid = el("div", { class: "environments" });
  let shown = BATCH;
  const more = el("button", { type: "button", onclick: () => showMore() }, "Show more");
  const rest = el("p", { class: "soft" });
  const empty = el("p", { class: "calm", role: "status" });
  const durations = el("datalist", { id: "durations" }, ["30m", "2h", "8h", "1d", "7d", NO_END].map((value) => el("option", { value })));
  const element = el("div", {},
    el("div", { class: "tools" }, el("h1", {}, "Limits"), filter, yaml.button),
    el("p", { class: "soft" }, "A change is in force at once and survives a restart. The file keeps its own value, and Undo goes back to it."),
    yaml.box, grid, empty, el("div", { class: "tools" }, more, rest), durations);
  const card = (name) => {
    if (!cards.has(name)) cards.set(name, new EnvironmentCard(name));
    return cards.get(name);
  };
  let isRevealed = quota.length < 4;
  function showMore() {
    const first = shown;
    shown += BATCH;
    update();
    if (more.hidden) focusOn(grid.children[first]);
  }

  function update() {
    const text = filter.value.trim().toLowerCase();
    const names = [...live.environments.keys(), ...live.upstreams.keys()].filter((name) => name.toLowerCase().includes(text));
    // Upstreams hold for all environments: they come first after the usual two.
    names.sort((a, b) => place(a) - place(b) || live.upstreams.has(b) - live.upstreams.has(a));
    if (!isRevealed) names.sort((a, b) => (b === environment) - (a === environment));
    const drawn = names.slice(0, shown);
    replaceIfNew(grid, drawn.join("\n"), () => drawn.map((name) => card(name).element));
    for (const name of drawn) card(name).update();
    setVisible(more, names.length > drawn.length);
    setText(rest, names.length > drawn.length ? `${drawn.length} of ${number(names.length)}` : "");
    setText(empty, live.isLoaded && names.length === 0 ? `No environment or upstream has the name “${filter.value.trim()}”.` : "");
    setVisible(empty, names.length === 0);
    if (!isRevealed && cards.has(environment) && element.isConnected) {
      isRevealed = true;
      card(environment).reveal(...quota);
    }
  }
  return { title: "Limits", element, update, close() {} };
}

