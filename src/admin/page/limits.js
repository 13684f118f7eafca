// Limits: the environments and the upstreams side by side, with a form for each quota.

import { call, get } from "./api.js";
import { el, replaceIfNew, setText, setVisible } from "./dom.js";
import { count } from "./format.js";
import { live, owner, showEnvironment } from "./live.js";
import { QuotaForm } from "./quota_form.js";
import { periodMs } from "./quota_rows.js";

/** Environments drawn at first, and added by each "Show more". */
const BATCH = 12;
const FIRST = ["production", "sandbox"];
const KINDS = ["total_tokens", "prompt_tokens", "completion_tokens", "requests"];

const place = (name) => (FIRST.includes(name) ? FIRST.indexOf(name) : FIRST.length);

/** By period, then by kind. */
const inOrder = (a, b) => periodMs(a.json.per) - periodMs(b.json.per) || KINDS.indexOf(a.json.kind) - KINDS.indexOf(b.json.kind);

/** The card of one environment or upstream. */
class EnvironmentCard {
  #forms = new Map();
  #isOpen = false;

  constructor(name, onSaved) {
    this.name = name;
    this.onSaved = onSaved;
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
    if (document.activeElement !== this.enforce) this.enforce.checked = json.enforce !== false;
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
    if (!form) this.#forms.set(quota, (form = new QuotaForm(quota, this.onSaved)));
    return form;
  }

  #open(isOpen) {
    this.#isOpen = isOpen;
    if (isOpen) this.update();
  }

  async #setEnforce() {
    const enforce = this.enforce.checked;
    try {
      showEnvironment(await call("PATCH", `/api/environments/${encodeURIComponent(this.name)}`, { enforce }));
      setText(this.status, enforce ? "Quotas are enforced." : "Shadow mode: quotas count and refuse nothing.");
      this.onSaved();
    } catch (error) {
      this.enforce.checked = !enforce;
      setText(this.status, error.message);
    }
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
    if (!form) return;
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
  const more = el("button", { type: "button", onclick: () => ((shown += BATCH), update()) }, "Show more");
  const rest = el("p", { class: "soft" });
  const durations = el("datalist", { id: "durations" }, ["30m", "2h", "8h", "1d", "7d"].map((value) => el("option", { value })));
  const element = el("div", {},
    el("div", { class: "tools" }, el("h1", {}, "Limits"), filter, yaml.button),
    el("p", { class: "soft" }, "A change is in force at once and survives a restart. The file keeps its own value, and Undo goes back to it."),
    yaml.box, grid, el("div", { class: "tools" }, more, rest), durations);
  const card = (name) => {
    if (!cards.has(name)) cards.set(name, new EnvironmentCard(name, () => {}));
    return cards.get(name);
  };
  let isRevealed = quota.length < 4;
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
    setText(rest, names.length > drawn.length ? `${drawn.length} of ${count(names.length, "environment")}` : "");
    if (!isRevealed && cards.has(environment) && element.isConnected) {
      isRevealed = true;
      card(environment).reveal(...quota);
    }
  }
  return { title: "Limits", element, update, close() {} };
}

