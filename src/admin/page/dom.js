// Elements. Text enters the page as text nodes only, never as HTML.

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
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Sets an attribute if it differs. `true`: without a value; `false`, `null`, `undefined`: removes it. */
export function setAttribute(element, name, value) {
  if (value === false || value === null || value === undefined) {
    if (element.hasAttribute(name)) element.removeAttribute(name);
    return;
  }
  const text = value === true ? "" : String(value);
  if (element.getAttribute(name) !== text) element.setAttribute(name, text);
}

/** Sets the text of an element in place, if it differs. */
export function setText(element, text) {
  const node = element.firstChild;
  if (node === null) {
    if (text !== "") element.append(text);
  } else if (node.nodeValue !== text) {
    node.nodeValue = text;
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
