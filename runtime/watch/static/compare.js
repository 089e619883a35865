// The view Compare: the curves of several runs in one chart, and the settings in which they differ.

import { askCurves } from "./api.js";
import { Chart, smoothed } from "./chart.js";
import { el, setText, table } from "./dom.js";
import { count, digits, setting, short } from "./format.js";

export const TITLE = "Compare";

const NUM_SPANS = 300;
const COLOURS = ["blue", "orange", "green", "pink", "red", "grey"];
const TITLES = { loss: "Loss", val_bits_per_byte: "Held-out bits per byte", max_vio_batch: "MaxVio of a batch", tokens_per_s: "Tokens per second" };
const FIRST = Object.keys(TITLES);

export function make(root, context) {
  const field = el("select", { onchange: () => context.redraw() });
  const runs = el("div", {}), differences = el("div", {}), charts = el("div", { class: "charts" });
  root.append(el("div", { class: "controls" }, el("label", {}, "Another curve ", field)), charts, el("h2", { text: "Runs" }), runs,
    el("h2", { text: "Settings that differ" }), differences);
  let made = [];

  function build() {
    made.forEach(({ chart }) => chart.leave());
    const window = { onWindow: (first, last) => context.window.set([first, last]), onWhole: () => context.window.set(null) };
    const lines = context.runs.map((run, n) => ({ label: run.name, colour: COLOURS[n % COLOURS.length], dash: n < COLOURS.length ? undefined : [6, 3] }));
    made = [...FIRST, null].map((name) => ({ name, chart: new Chart({ title: TITLES[name] ?? "The chosen curve", lines, ...window, show: name === "tokens_per_s" ? short : digits }) }));
    charts.replaceChildren(...made.map(({ chart }) => chart.figure));
  }

  async function drawCurves() {
    const names = [...FIRST, field.value];
    const found = await Promise.all(context.runs.map((_, run) => askCurves(run, names, context.window.parameters, NUM_SPANS)));
    setText(made.at(-1).chart.heading, field.value);
    made.forEach(({ name, chart }) => drawTogether(chart, found, name ?? field.value, context.smoothing));
  }

  return {
    async draw() {
      if (!context.runs.length) return;
      if (made.length === 0 || made[0].chart.lines.length !== context.runs.length) build();
      const curves = [...new Set(context.facts.flatMap((facts) => facts.curves))].filter((name) => !FIRST.includes(name));
      if (field.options.length !== curves.length) field.replaceChildren(...curves.map((name) => el("option", { value: name, text: name, selected: name === "grad_norm" })));
      runs.replaceChildren(runTable(context));
      differences.replaceChildren(differenceTable(context));
      await drawCurves();
    },
    leave() { made.forEach(({ chart }) => chart.leave()); },
  };
}

/** Runs have different steps: a curve is null at a step where only other runs have a value. */
function drawTogether(chart, found, name, smoothing) {
  const middles = found.map((each) => each.first.map((step, n) => Math.round((step + each.last[n]) / 2)));
  const known = found.map((each, n) => {
    const kept = middles[n].map((step, i) => [step, each.curves[name].mean[i]]).filter(([, value]) => value !== null);
    const unique = new Map(kept);
    const steps = [...unique.keys()].sort((a, b) => a - b);
    return [steps, smoothed(steps.map((step) => unique.get(step)), name.startsWith("val_") ? 0 : smoothing)];
  });
  const [x, ...values] = uPlot.join(known);
  chart.figure.hidden = !x.length;
  if (x.length) chart.draw([...x], [...x], values.map((mean) => ({ mean: [...mean].map((value) => value ?? null) })));
}

function runTable(context) {
  const rows = context.runs.map((run) => [run.name, run.state, count(run.step), digits(run.mean.loss), digits(run.last_eval.val_bits_per_byte),
    digits(run.mean.max_vio_batch), digits(run.last_eval.max_vio_global), short(run.mean.tokens_per_s)]);
  return table("Runs", ["Run", "State", "Step", "Loss", "Held-out bits per byte", "MaxVio of a batch", "MaxVio_global", "Tokens/s"], rows, { class: "unbroken" });
}

function differenceTable(context) {
  const all = context.facts.map((facts) => facts.settings);
  const names = [...new Set(all.flatMap((settings) => Object.keys(settings)))].sort();
  const shown = names.map((name) => [name, ...all.map((settings) => setting(settings[name]))]);
  if (all.length < 2) return el("p", { class: "muted", text: "Only one run is watched; name several: trimtab watch RUN RUN" });
  const differ = shown.filter(([, ...values]) => new Set(values).size > 1);
  if (!differ.length) return el("p", { class: "muted", text: "None." });
  return table("Settings that differ", ["Setting", ...context.runs.map((run) => run.name)], differ);
}
