// System: the state of the gateway itself.

import { el } from "./dom.js";

/** Makes the view. */
export function system() {
  const element = el("div", {}, el("h1", {}, "System"),
    el("p", { class: "notice" }, "This gateway has no API for this view. GET /readyz and GET /metrics report its state."));
  return { title: "System", element, update() {}, close() {} };
}
