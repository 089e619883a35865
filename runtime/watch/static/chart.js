// A chart of curves over steps: means as lines, least and greatest values as a band around them. Drawn by uPlot.

import { colour, el, setText } from "./dom.js";
import { count, digits, short } from "./format.js";

const HEIGHT = 185;

export class Chart {
  /**
   * title, note: texts. lines: [{ label, colour, band, points, dash }]; band: whether least and greatest values are
   * drawn around the line, points: whether each value is drawn as a point. show(value): a number as text.
   * onWindow(first, last): a window was drawn with the pointer; onWhole(): a double click asks for all steps.
   */
  constructor({ title, lines, note = "", show = digits, onWindow, onWhole }) {
    Object.assign(this, { title, lines, note, show, onWindow, onWhole });
    this.place = el("div", { class: "plot", role: "img", "aria-label": title });
    this.caption = el("figcaption", { text: note });
    const keys = lines.length > 1 ? el("div", { class: "keys" }, ...lines.map(key)) : null;
    this.heading = el("h3", { text: title });
    this.figure = el("figure", { "data-chart": title }, el("header", {}, this.heading, keys), this.place, this.caption);
    this.observer = new ResizeObserver(() => this.resize());
    this.observer.observe(this.place);
  }

  /** first, last: steps. curves: one { low, high, mean } for each line; those of a band need all three. */
  draw(first, last, curves) {
    const x = first.map((step, n) => Math.round((step + last[n]) / 2));
    this.first = first;
    this.last = last;
    this.data = [x, ...curves.flatMap((curve, n) => (this.lines[n].band ? [curve.mean, curve.high, curve.low] : [curve.mean]))];
    this.describe();
    if (this.plot) this.plot.setData(this.data);
    else this.build();
  }

  leave() {
    this.observer.disconnect();
    this.plot?.destroy();
  }

  resize() {
    const width = this.place.clientWidth;
    if (this.plot && width && width !== this.plot.width) this.plot.setSize({ width, height: HEIGHT });
  }

  build() {
    if (!this.place.clientWidth) return;
    const series = [{}], bands = [];
    for (const line of this.lines) {
      if (line.band) bands.push({ series: [series.length + 1, series.length + 2], fill: `${colour(line.colour)}33` });
      series.push(stroke(line, this), ...(line.band ? [unseen(), unseen()] : []));
    }
    this.plot = new uPlot({
      width: this.place.clientWidth,
      height: HEIGHT,
      legend: { show: false },
      cursor: { y: false, drag: { x: true, y: false, setScale: false }, bind: { dblclick: () => () => this.onWhole?.() } },
      scales: { x: { time: false }, y: { range: padded } },
      axes: [axis({ size: 30, values: (_, ticks) => ticks.map((step) => (!Number.isInteger(step) ? "" : step < 1000 ? String(step) : short(step))) }),
        axis({ size: 66, values: (_, ticks) => ticks.map((value) => (value === null ? "" : this.show(value))) })],
      series,
      bands,
      hooks: { setSelect: [(plot) => this.selected(plot)], setCursor: [(plot) => this.tellValues(plot.cursor.idx)] },
    }, this.data, this.place);
  }

  selected(plot) {
    const { left, width } = plot.select;
    if (width < 4) return;
    const [first, last] = [left, left + width].map((x) => Math.round(plot.posToVal(x, "x")));
    plot.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
    this.onWindow?.(Math.max(first, 0), Math.max(last, first + 1));
  }

  /** The values under the pointer, below the chart. */
  tellValues(index) {
    if (index === null || index === undefined) return setText(this.caption, this.note);
    const [first, last] = [this.first[index], this.last[index]];
    const where = first === last ? `step ${count(first)}` : `steps ${count(first)} to ${count(last)}`;
    let column = 1;
    const values = this.lines.map((line) => {
      const [mean, high, low] = [0, 1, 2].map((n) => this.data[column + n]?.[index]);
      column += line.band ? 3 : 1;
      const range = line.band && low !== high ? ` (${this.show(low)} to ${this.show(high)})` : "";
      return mean === null || mean === undefined ? null : `${line.label} ${this.show(mean)}${range}`;
    });
    setText(this.caption, [where, ...values.filter(Boolean)].join(" · "));
  }

  /** What a screen reader says of the chart. */
  describe() {
    let column = 1;
    const parts = this.lines.map((line) => {
      const values = this.data[column].filter((value) => value !== null && value !== undefined);
      column += line.band ? 3 : 1;
      if (!values.length) return `${line.label}: nothing recorded`;
      const [least, most] = [Math.min(...values), Math.max(...values)];
      return `${line.label}: ${this.show(values.at(-1))} at the end, ${this.show(least)} to ${this.show(most)}`;
    });
    const steps = this.first.length ? `, steps ${this.first[0]} to ${this.last.at(-1)}` : "";
    this.place.setAttribute("aria-label", `${this.title}${steps}. ${parts.join(". ")}`);
  }
}

/** Exponential moving average of the values. strength: the weight of the mean before, from 0 to below 1. Null stays null. */
export function smoothed(values, strength) {
  let mean = 0, weight = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = strength * mean + (1 - strength) * value;
    weight = strength * weight + (1 - strength);
    return mean / weight;
  });
}

const key = (line) => el("span", { class: line.colour, text: line.label });

function stroke(line, chart) {
  return {
    stroke: colour(line.colour), width: 1.8, dash: line.dash, spanGaps: !line.points,
    gaps: (plot, series) => gapOfUntrained(plot, series, chart.first),
    points: { show: line.points ?? false, size: 6, fill: colour(line.colour) },
  };
}

/** The gap of a line, in pixels, between the evaluation of the untrained model and the next one: a line there would show losses that never were. */
function gapOfUntrained(plot, series, first) {
  const [start, next] = [...plot.data[0].keys()].filter((n) => (plot.data[series][n] ?? null) !== null);
  if (next === undefined || first[start] !== 0) return [];
  return [[start, next].map((n) => plot.valToPos(plot.data[0][n], "x", true))];
}

const unseen = () => ({ stroke: "transparent", width: 0, points: { show: false }, spanGaps: true });

function axis(more) {
  return {
    stroke: colour("muted"), grid: { stroke: colour("grid"), width: 1 }, ticks: { stroke: colour("grid"), width: 1, size: 4 },
    font: "12px system-ui, sans-serif", ...more,
  };
}

/** Some room above and below; a constant curve in the middle. */
function padded(_, least, most) {
  if (least === null || most === null) return [0, 1];
  const room = (most - least) * 0.06 || Math.abs(most) * 0.1 || 1;
  return [least >= 0 ? Math.max(0, least - room) : least - room, most + room];
}
