// The charts of a report: parts of the live page, drawn from the numbers that the file holds.

import { held } from "./api.js";
import * as balance from "./balance.js";
import { Chart } from "./chart.js";
import { el } from "./dom.js";
import { milliseconds } from "./format.js";
import { chartsOf, PHASES, smoothingChoice } from "./overview.js";
import { chartGrid, zoom } from "./parts.js";
import { StepWindow } from "./window.js";

const COLOURS = ["orange", "blue", "green", "pink", "red", "grey"];
const MOMENTS = [{ path: "first_load", title: "All layers at the start" }, { path: "last_load", title: "All layers at the end" }];

const root = document.getElementById("view");
const context = { run: 0, runs: [held.run], facts: [held.facts], smoothing: 0.6, moments: MOMENTS, redraw };
let parts = [];

context.window = new StepWindow(document.getElementById("window"), { lastStep: () => held.run.step, changed: redraw });

function redraw() {
  parts.forEach((part) => part.draw());
}

/** A chart that the live page does not have. Its numbers come with their own steps, which no server can reduce. */
function ownChart({ title, note, lines, steps, curves }) {
  const chart = new Chart({ ...zoom(context), title, note, lines });
  return {
    chart,
    draw() {
      const { first = 0, last = Infinity } = context.window.parameters;
      const kept = [...steps.keys()].filter((n) => steps[n] >= first && steps[n] <= last);
      const part = (values) => values && kept.map((n) => values[n]);
      const shown = part(steps);
      chart.draw(shown, shown, curves.map(({ mean, low, high }) => ({ mean: part(mean), low: part(low), high: part(high) })));
    },
    leave: () => chart.leave(),
  };
}

function phases() {
  const lines = PHASES.map(([, label], number) => ({ label, colour: COLOURS[number] }));
  return { title: "Where the time of a step went", names: PHASES.map(([name]) => name), lines, show: milliseconds,
    note: "training thread of rank 0, forward and backward together" };
}

function build() {
  parts.forEach((part) => part.leave());
  root.replaceChildren(el("div", { class: "controls" }, smoothingChoice(context)));
  const own = held.charts.map(ownChart);
  parts = [chartGrid(root, context, [...chartsOf(context), phases()]), ...own];
  root.querySelector(".charts").append(...own.map(({ chart }) => chart.figure));
  if (held.last_load) {
    root.append(el("h2", { text: "Load of the experts" }));
    parts.push(balance.make(root, context));
  }
  redraw();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", build);
build();
