// Elements. Text enters the page as text nodes only, never as HTML.

/** Characters that set the direction of the text after them. */
const DIRECTIONS = /[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;

/**
 * A text as it is shown. Callers choose the names of models, so characters that could reverse the text after them are
 * written as `\u202e`.
 */
export const shown = (text) =>
  String(text).replace(DIRECTIONS, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);

/** Attributes whose text is shown or read out. */
const SHOWN = new Set(["title", "aria-label"]);

/**
 * Makes an element: `el("p", {class: "soft"}, "text", child)`. An attribute `onclick` is a listener; `true` sets an
 * attribute without a value; `false`, `null` and `undefined` leave it out, also as children.
 */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else setAttribute(element, key, value);
  }
  const present = children.flat().filter((child) => child !== null && child !== undefined && child !== false);
  element.append(...present.map((child) => (child instanceof Node ? child : shown(child))));
  return element;
}

/**
 * Sets an attribute if it differs. `true`: without a value; `false`, `null`, `undefined`: removes it. Attributes of ARIA
 * have the values `true` and `false` as words.
 */
export function setAttribute(element, name, value) {
  const isWord = typeof value === "boolean" && name.startsWith("aria-");
  if (value === null || value === undefined || (value === false && !isWord)) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
    return;
  }
  const text = value === true && !isWord ? "" : SHOWN.has(name) ? shown(value) : String(value);
  if (element.getAttribute(name) !== text) element.setAttribute(name, text);
}

/** Sets the text of an element in place, if it differs. */
export function setText(element, text) {
  const node = element.firstChild;
  const value = shown(text);
  if (node === null) {
    if (value !== "") element.append(value);
  } else if (node.nodeValue !== value) {
    node.nodeValue = value;
  }
}

/** Shows or hides an element. */
export function setVisible(element, isVisible) {
  if (element.hidden === isVisible) element.hidden = !isVisible;
}

/** Replaces the children of an element, unless `key` is that of the last call. */
export function replaceIfNew(element, key, children) {
  if (element.dataset.key === key) return;
  element.dataset.key = key;
  element.replaceChildren(...children());
}

/** Replaces the children of an element. Tables that can be scrolled keep their place and the focus, by their names. */
export function replaceInPlace(element, children) {
  const places = new Map();
  for (const box of element.querySelectorAll(".scroll")) {
    places.set(box.getAttribute("aria-label"), { left: box.scrollLeft, top: box.scrollTop, hasFocus: box === document.activeElement });
  }
  element.replaceChildren(...children);
  for (const box of element.querySelectorAll(".scroll")) {
    const place = places.get(box.getAttribute("aria-label"));
    if (!place) continue;
    box.scrollTo(place.left, place.top);
    if (place.hasFocus) box.focus({ preventScroll: true });
  }
}

/** Focuses an element, also one that the Tab key does not reach. */
export function focusOn(element) {
  if (!element.matches("a[href], button, input, select, textarea, summary, [tabindex]")) element.tabIndex = -1;
  element.focus();
}

/** Focuses the first of these elements that can have the focus, if nothing has it: what had it is gone, hidden or disabled. */
export function restoreFocus(...elements) {
  const hasFocus = (element) => !element.disabled && element.checkVisibility();
  const { activeElement: active } = document;
  if (active && active !== document.body && hasFocus(active)) return;
  elements.find(hasFocus)?.focus({ preventScroll: true });
}

let lastId = 0;

/** An id that the document does not have yet. */
export function newId(prefix) {
  lastId += 1;
  return `${prefix}-${lastId}`;
}

/** A labelled field: the label above, the input below. Returns both. */
export function field(label, input) {
  input.id ||= newId("field");
  return el("div", { class: "field" }, el("label", { for: input.id }, label), input);
}

/** A table of text: `columns` are `{title, isNumber}`; the first cell of each row is its header. */
export function table(name, columns, rows) {
  const side = (column) => (column.isNumber ? "number" : null);
  const cell = (value, index) =>
    el(index === 0 ? "th" : "td", { scope: index === 0 ? "row" : null, class: side(columns[index]) }, value);
  return el("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": name },
    el("table", { "aria-label": name },
      el("thead", {}, el("tr", {}, columns.map((column) => el("th", { scope: "col", class: side(column) }, column.title)))),
      el("tbody", {}, rows.map((row) => el("tr", {}, row.map(cell))))));
}
