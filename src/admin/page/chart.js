// Charts as SVG. Colours come from the style sheet, by class.

import { shown } from "./dom.js";

const NAMESPACE = "http://www.w3.org/2000/svg";

/** Makes an SVG element. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(NAMESPACE, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, key === "aria-label" ? shown(value) : value);
  element.append(...children.flat(2).map((child) => (child instanceof Node ? child : shown(child))));
  return element;
}

const fixed = (value) => value.toFixed(1);

/** The path of a line through points `[x, y]`. */
const path = (points) => points.map(([x, y], n) => `${n === 0 ? "M" : "L"}${fixed(x)} ${fixed(y)}`).join("");

/** A small curve without axes. `update(values)` draws it again in place. */
export function sparkline(width = 220, height = 40) {
  const area = svg("path", { class: "spark-area" });
  const line = svg("path", { class: "spark-line" });
  const element = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "spark", preserveAspectRatio: "none", "aria-hidden": "true" }, area, line);
  const update = (values) => {
    const top = Math.max(1, ...values);
    const x = (n) => (width * n) / Math.max(1, values.length - 1);
    const y = (value) => height - 2 - ((height - 4) * value) / top;
    const points = values.map((value, n) => [x(n), y(value)]);
    line.setAttribute("d", points.length > 1 ? path(points) : "");
    area.setAttribute("d", points.length > 1 ? `${path(points)}V${height}H0Z` : "");
  };
  return { element, update };
}

/** Round steps for an axis up to `top`: at most five. */
export function ticks(top) {
  if (top <= 0) return [0];
  const raw = top / 4;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = Math.max(1, [1, 2, 2.5, 5, 10].find((factor) => factor * power >= raw) * power);
  return Array.from({ length: Math.ceil(top / step - 1e-9) + 1 }, (_, n) => n * step);
}

const BOX = { left: 52, right: 12, top: 12, bottom: 28 };

/** The area of a chart with a vertical axis up to `top`. A unit is a pixel if the chart is as wide as it was drawn for. */
function frame({ width, height, top, format, label }) {
  const { left, right, bottom } = BOX;
  const marks = ticks(top);
  const scale = marks.at(-1) || 1;
  const y = (value) => height - bottom - ((height - bottom - BOX.top) * value) / scale;
  const lines = marks.map((mark) => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: fixed(y(mark)), y2: fixed(y(mark)) }),
    svg("text", { class: "axis end", x: left - 8, y: fixed(y(mark) + 4) }, format(mark)),
  ]);
  const element = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label }, lines);
  return { element, y, inner: width - left - right };
}

/** Labels below the horizontal axis, at most one each 90 units. */
function axisLabels(labels, inner, y) {
  const each = Math.ceil(labels.length / Math.max(1, Math.floor(inner / 90)));
  const slot = inner / labels.length;
  return labels.flatMap((label, n) =>
    n % each === 0 ? [svg("text", { class: "axis middle", x: fixed(BOX.left + slot * (n + 0.5)), y }, label)] : [],
  );
}

/**
 * Stacked columns. `columns`: `{label, values}`, a value for each series; `series`: their names.
 * Series differ by colour and by pattern of their edge; each part has a tooltip.
 */
export function stackedColumns({ columns, series, label, format, width: total, height }) {
  const sum = (values) => values.reduce((total, value) => total + value, 0);
  const top = Math.max(0, ...columns.map((column) => sum(column.values)));
  const { element, y, inner } = frame({ width: total, height, top, format, label });
  const slot = inner / columns.length;
  const width = Math.max(1, Math.min(48, slot * 0.78));
  columns.forEach((column, n) => {
    let base = 0;
    column.values.forEach((value, index) => {
      if (value === 0) return;
      const [from, to] = [y(base), y(base + value)];
      base += value;
      element.append(
        svg("rect", { class: `series-${index % 8}`, x: fixed(BOX.left + slot * (n + 0.5) - width / 2), y: fixed(to), width: fixed(width), height: fixed(Math.max(0.5, from - to)) },
          svg("title", {}, `${column.label}, ${series[index]}: ${format(value)}`)),
      );
    });
  });
  element.append(...axisLabels(columns.map((column) => column.label), inner, height - 8));
  return element;
}

/**
 * What is left of a calendar quota: from its whole limit at the begin of the period to now, and on at the present rate.
 * `points`: `{at, left}`; `forecast`: `{at, left}` where the line ends.
 */
export function burnDown({ begin, end, limit, points, forecast, label, format, formatTime, width, height }) {
  const { element, y, inner } = frame({ width, height, top: limit, format, label });
  const x = (at) => BOX.left + (inner * (at - begin)) / (end - begin);
  const line = (from) => from.map(({ at, left }) => [x(at), y(Math.max(0, left))]);
  element.append(
    svg("path", { class: "even-pace", d: path([[x(begin), y(limit)], [x(end), y(0)]]) }),
    svg("path", { class: "burn-line", d: path(line(points)) }),
    svg("path", { class: "forecast-line", d: path(line([points.at(-1), forecast])) }),
    svg("circle", { class: "burn-now", r: 4, cx: fixed(x(points.at(-1).at)), cy: fixed(y(Math.max(0, points.at(-1).left))) }),
  );
  const labels = [[0, "start"], [0.33, "middle"], [0.67, "middle"], [1, "end"]];
  element.append(...labels.map(([share, side]) => {
    const at = begin + share * (end - begin);
    return svg("text", { class: `axis ${side}`, x: fixed(x(at)), y: height - 8 }, formatTime(at));
  }));
  return element;
}
