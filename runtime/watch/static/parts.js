// Parts of several views: grids of charts, tables of events.

import { ask, askCurves } from "./api.js";
import { Chart } from "./chart.js";
import { el } from "./dom.js";
import { duration, when } from "./format.js";

export const NUM_SPANS = 400;

/** For a chart: a window that is drawn on it becomes that of all charts. */
export const zoom = (context) => ({ onWindow: (first, last) => context.window.set([first, last]), onWhole: () => context.window.set(null) });

/**
 * A grid of charts whose curves come with one request. charts: [{ ...options of Chart, names, smooth }]; names: the
 * curve of each line. smooth(curve): the curve as it is drawn, for lines without points; left out, as it was recorded.
 */
export function chartGrid(root, context, charts) {
  const made = new Map(), box = el("div", { class: "charts" }); // made: the charts by the names of their curves
  root.append(box);

  /** Add those of these charts that the grid does not have yet. */
  function add(more) {
    for (const { names, smooth, ...options } of more.filter((each) => !made.has(each.names.join()))) {
      const chart = new Chart({ ...options, ...zoom(context) });
      made.set(names.join(), { names, smooth, chart });
      box.append(chart.figure);
    }
  }

  add(charts);
  return {
    add,
    async draw() {
      const all = [...new Set([...made.values()].flatMap(({ names }) => names))];
      const found = await askCurves(context.run, all, context.window.parameters, NUM_SPANS);
      for (const { names, chart, smooth } of made.values()) {
        const curves = names.map((name) => found.curves[name]);
        chart.figure.hidden = curves.every((curve) => curve.mean.every((value) => value === null));
        if (!chart.figure.hidden) chart.draw(found.first, found.last, curves.map((curve, n) => (smooth && !chart.lines[n].points ? smooth(curve) : curve)));
      }
    },
    leave() { [...made.values()].forEach(({ chart }) => chart.leave()); },
  };
}

/** Events as a table that is made anew only where there are new ones. wanted(event): whether it is shown. */
export function eventTable(label, wanted, num) {
  const box = el("div", {});
  let seen = "";
  return {
    box,
    async draw(context) {
      const run = context.runs[context.run];
      const sign = `${context.run} ${run.epoch} ${run.num_events}`;
      if (sign === seen) return;
      const found = (await ask(`runs/${context.run}/events`)).filter(wanted).slice(-num).reverse();
      seen = sign;
      const rows = found.map(row);
      box.replaceChildren(rows.length ? eventRows(label, rows) : el("p", { class: "muted", text: "None." }));
    },
  };
}

function eventRows(label, rows) {
  const head = ["Time", "Event", "What"].map((text) => el("th", { scope: "col", text }));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    el("table", { class: "events" }, el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...rows)));
}

function row(event) {
  const stacks = event.stacks && el("details", {}, el("summary", { text: "details" }), el("pre", { tabindex: "0", text: event.stacks }));
  return el("tr", {},
    el("td", { class: "nowrap", text: when(event.time), title: `${duration(Date.now() / 1e3 - event.time)} ago` }),
    el("td", { class: `kind ${event.verdict}`, text: event.event }),
    el("td", { class: "text" }, event.text, stacks || null));
}
