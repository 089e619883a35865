// The view Balance: the load of each expert through time, layer by layer, and what follows from it.

import { ask, askCurves } from "./api.js";
import { Chart } from "./chart.js";
import { card, el, svg, table } from "./dom.js";
import { count, digits, setting } from "./format.js";
import { decoded, HeatMap, legend, loadOf } from "./heat.js";
import { chartGrid, NUM_SPANS, zoom } from "./parts.js";

export const TITLE = "Balance";

const NUM_COLUMNS = 256;
// Heat maps of all layers at a moment, each with the request for its load. A report has others.
const MOMENTS = [{ path: "last_load", title: "All layers now" }];

export function make(root, context) {
  const chosen = { layer: 0, expert: 0 };
  const cards = el("section", { class: "cards", "aria-label": "Figures" });
  const layer = el("select", { onchange: () => { chosen.layer = Number(layer.value); context.redraw(); } });
  const expert = el("input", { type: "number", min: 0, value: 0, onchange: () => pick(Number(expert.value)) });
  const pick = (number) => { chosen.expert = number; expert.value = String(number); context.redraw(); };
  const state = { load: null };
  const map = new HeatMap({
    title: "Load of each expert through time", note: "Click an expert to see its load and bias below.",
    textOf: (row, column) => cellText(state.load, row, column), onPick: (row) => pick(row),
  });
  const moments = (context.moments ?? MOMENTS).map((each) => ({ ...each, rows: null }));
  const mapOf = (moment) => new HeatMap({
    title: moment.title, note: "", textOf: (row, column) => lastLoadText(moment.rows, context, row, column),
    onPick: (row, column) => { chosen.layer = row; layer.value = String(row); pick(column); },
  });
  moments.forEach((each) => { each.map = mapOf(each); });
  const expertCharts = [
    new Chart({ ...zoom(context), title: "Load of the chosen expert", lines: [{ label: "load", colour: "blue" }, { label: "mean of the layer", colour: "grey", dash: [6, 4] }] }),
    new Chart({ ...zoom(context), title: "Bias of the chosen expert", lines: [{ label: "bias", colour: "orange" }] }),
  ];
  const imbalance = new Chart({ ...zoom(context), title: "MaxVio of the chosen layer",
    lines: [{ label: "each batch", colour: "blue", band: true }, { label: "by chance", colour: "grey", dash: [6, 4] }] });
  const layers = el("div", { class: "bars" });
  const extremes = el("div", {});
  root.append(cards, el("div", { class: "controls" }, el("label", {}, "Layer ", layer), el("label", {}, "Expert ", expert), legend()),
    map.figure, el("div", { class: "charts" }, ...[...expertCharts, imbalance].map((chart) => chart.figure)), ...moments.map((each) => each.map.figure),
    el("h2", { text: "MaxVio of each layer" }), el("p", { class: "note", text: "Over the last steps that were recorded; the mark is what chance alone would show over as many." }), layers,
    el("h2", { text: "Experts that stand out" }), extremes, el("h2", { text: "Through time" }));
  const grid = chartGrid(root, context, [
    { title: "Dead experts", names: ["dead_experts"], note: "of all layers, in each batch", lines: [{ label: "experts without a token", colour: "red", band: true }] },
    { title: "Bias range", names: ["bias_min", "bias_max"], lines: [{ label: "least", colour: "blue" }, { label: "greatest", colour: "orange" }] },
    { title: "Wait for the coordinator", names: ["control_wait_s"], show: (value) => `${digits(value * 1e3)} ms`, lines: [{ label: "wait", colour: "pink", band: true }] },
    { title: "MaxVio of a group", names: ["max_vio_computation_batch"], note: "what one expert-parallel group computes at once, worst group", lines: [{ label: "MaxVio", colour: "green", band: true }] },
  ]);

  async function drawMap() {
    const found = await ask(`runs/${context.run}/load`, { layer: chosen.layer, num: NUM_COLUMNS, ...context.window.parameters });
    map.figure.hidden = !found;
    if (!found) return;
    const codes = decoded(found.codes), columns = found.steps.length, rows = codes.length / columns;
    state.load = { codes, columns, rows, steps: found.steps, name: layerName(context, chosen.layer) };
    expert.max = String(rows - 1);
    const sampled = found.num_read < found.num_records ? `, from ${count(found.num_read)} of ${count(found.num_records)} recorded steps` : "";
    map.note = `Click an expert to see its load and bias below. Expert 0 is at the top${sampled}.`;
    map.caption.textContent = map.note;
    const ends = [`step ${count(found.steps[0])}`, `step ${count(found.steps.at(-1))}`];
    map.draw(rows, columns, (row, column) => codes[column * rows + row], ends, `${state.load.name}, ${rows} experts, steps ${found.steps[0]} to ${found.steps.at(-1)}${sampled}`, Math.min(Math.max(rows * 4, 150), 460));
  }

  async function drawExpert() {
    const found = await ask(`runs/${context.run}/expert`, { ...chosen, num: NUM_COLUMNS, ...context.window.parameters });
    expertCharts.forEach((chart) => { chart.figure.hidden = !found; });
    if (!found) return;
    expertCharts[0].draw(found.steps, found.steps, [{ mean: found.load }, { mean: found.load.map(() => 1) }]);
    expertCharts[1].draw(found.steps, found.steps, [{ mean: found.bias }]);
  }

  async function drawLayer() {
    const names = [`max_vio_batch_per_layer.${chosen.layer}`, "max_vio_floor"];
    const found = await askCurves(context.run, names, context.window.parameters, NUM_SPANS);
    imbalance.figure.hidden = !found.first.length;
    if (found.first.length) imbalance.draw(found.first, found.last, names.map((name) => found.curves[name]));
  }

  function drawMoment(moment, found) {
    moment.map.figure.hidden = !found;
    if (!found) return;
    const rows = moment.rows = found.layers.map((each) => decoded(each.codes));
    const columns = Math.max(...rows.map((each) => each.length));
    const imbalance = found.layers.reduce((sum, each) => sum + each.max_vio, 0) / rows.length;
    moment.map.note = `Steps ${count(found.first)} to ${count(found.last)} together: MaxVio ${digits(imbalance)}, mean of layers. Click a layer to see it above.`;
    moment.map.caption.textContent = moment.map.note;
    moment.map.draw(rows.length, columns, (row, column) => rows[row][column], ["expert 0", `expert ${columns - 1}`],
      `${rows.length} layers, one below the other, steps ${found.first} to ${found.last}`, Math.min(Math.max(rows.length * 12, 60), 420));
  }

  async function drawMoments() {
    const answers = await Promise.all(moments.map(({ path }) => ask(`runs/${context.run}/${path}`)));
    const last = answers.at(-1);
    answers.forEach((found, number) => drawMoment(moments[number], found));
    cards.replaceChildren(...figures(context, last));
    if (!last) return;
    layers.replaceChildren(...layerBars(context, last));
    extremes.replaceChildren(extremeTable(context, last));
  }

  return {
    async draw() {
      const facts = context.facts[context.run];
      if (!facts) return;
      fillLayers(layer, context, facts);
      await Promise.all([drawMap(), drawExpert(), drawLayer(), drawMoments(), grid.draw()]);
    },
    leave() { grid.leave(); [...expertCharts, imbalance].forEach((chart) => chart.leave()); },
  };
}

const layerName = (context, number) => context.facts[context.run]?.layers[number] ?? `layer ${number}`;

function fillLayers(select, context, facts) {
  if (select.options.length === facts.layers.length) return;
  select.replaceChildren(...facts.layers.map((name, number) => el("option", { value: number, text: name })));
}

function cellText(load, row, column) {
  if (!load) return "";
  const next = load.steps[column + 1], first = load.steps[column];
  const where = next === undefined || next === first + 1 ? `step ${count(first)}` : `steps ${count(first)} to ${count(next - 1)}`;
  return `${load.name}, expert ${row}, ${where}: ${digits(loadOf(load.codes[column * load.rows + row]))} × the mean load`;
}

function lastLoadText(rows, context, row, column) {
  const code = rows?.[row]?.[column];
  return code === undefined ? "" : `${layerName(context, row)}, expert ${column}: ${digits(loadOf(code))} × the mean load`;
}

function figures(context, found) {
  const run = context.runs[context.run], balance = context.facts[context.run].balance ?? {};
  const law = context.facts[context.run].settings["balance.law"] ?? balance.law;
  const dead = found ? found.layers.reduce((sum, each) => sum + each.dead, 0) : undefined;
  const over = found ? `steps ${count(found.first)} to ${count(found.last)}` : "";
  return [
    card("Law", setting(law) || "n/a", balance.rate === undefined || balance.rate === null ? "" : `rate ${digits(balance.rate)}`),
    card("MaxVio of a batch", digits(run.mean.max_vio_batch), `mean of the last 64 steps; by chance ${digits(run.mean.max_vio_floor)}`),
    card("MaxVio_global", digits(run.last_eval.max_vio_global), run.last_eval.step === undefined ? "" : `since the evaluation before step ${run.last_eval.step}`),
    card("Dead experts", dead === undefined ? "n/a" : count(dead), over, dead ? "bad" : ""),
    card("Bias range", `${digits(run.latest.bias_min)} to ${digits(run.latest.bias_max)}`, `after ${run.latest.bias_version ?? "?"} updates`),
  ];
}

function layerBars(context, { layers, num }) {
  // The floor falls with the square root of the tokens.
  const floor = (context.runs[context.run].mean.max_vio_floor ?? 0) / Math.sqrt(num);
  const most = Math.max(...layers.map((each) => each.max_vio ?? 0), floor * 1.2, 1e-9);
  return layers.map((each, number) => {
    const x = (floor / most) * 100;
    const bar = svg("svg", { viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("rect", { width: ((each.max_vio ?? 0) / most) * 100, height: 1 }),
      svg("line", { x1: x, x2: x, y1: 0, y2: 1, "vector-effect": "non-scaling-stroke" }));
    return el("div", { class: "bar" }, el("span", { text: layerName(context, number) }), el("div", { class: "track" }, bar),
      el("span", { class: "number", text: `${digits(each.max_vio)}; ${each.dead} dead; bias ${digits(each.bias[0])} to ${digits(each.bias[1])}` }));
  });
}

function extremeTable(context, found) {
  const named = (each) => (each ? `${layerName(context, each.layer)}, expert ${each.expert}: ${digits(each.load)} ×` : "");
  const rows = found.most.map((each, number) => [named(each), named(found.least[number])]);
  return table("Experts that stand out", ["Most load", "Least load"], rows);
}
