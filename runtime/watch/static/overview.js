// The view Overview: loss, imbalance, speed and health at a glance, the curves, the time of a step, the last events.

import { askCurves } from "./api.js";
import { smoothed } from "./chart.js";
import { card, el, svg } from "./dom.js";
import { counted, digits, duration, milliseconds, percent, short } from "./format.js";
import { chartGrid, eventTable } from "./parts.js";

export const TITLE = "Overview";

const SMOOTHING = [["none", 0], ["some", 0.6], ["strong", 0.92]];
export const PHASES = [["dispatch_s", "tokens to their experts"], ["experts_s", "experts"], ["combine_s", "results back"],
  ["bias_update_s", "bias update"], ["control_wait_s", "wait for the coordinator"], ["other_s", "attention, gradients, optimizer, all else"]];

const RECENT = 64; // steps of the means, as in runtime/watch/metrics.py
const COMPARED = ["loss", "max_vio_batch", "tokens_per_s", "lr", "grad_norm", "bias_min", "bias_max", "control_wait_s", "step_s"];

export function make(root, context) {
  const glance = el("section", { class: "cards glance", "aria-label": "At a glance" });
  const more = el("section", { class: "cards", "aria-label": "Figures" });
  const against = el("select", { onchange: () => { context.against = against.value === "" ? null : Number(against.value); context.redraw(); } });
  const againstLabel = el("label", { hidden: true }, "Figures against ", against);
  const controls = el("div", { class: "controls" }, smoothingChoice(context), againstLabel);
  root.append(glance, more, controls);
  const grid = chartGrid(root, context, chartsOf(context));
  const phases = el("div", { class: "bars" });
  const events = eventTable("Last events", () => true, 12);
  root.append(el("h2", { text: "Where the time of a step goes" }), el("p", { class: "note", text: "Rank 0, mean of the last 64 steps." }),
    phases, el("h2", { text: "Last events" }), events.box);
  return {
    async draw() {
      const run = context.runs[context.run];
      if (!run) return;
      offerOthers(againstLabel, against, context);
      const other = await figuresOf(context.runs[context.against], context.against, run);
      glance.replaceChildren(...glanceCards(run, other));
      more.replaceChildren(...moreCards(run, other));
      phases.replaceChildren(...bars(run.mean));
      grid.add(chartsOf(context)); // charts of the run's own metrics: `make` may run before the facts are here
      await Promise.all([grid.draw(), events.draw(context)]);
    },
    leave: grid.leave,
  };
}

/** How much the curves are smoothed. */
export function smoothingChoice(context) {
  const select = el("select", { onchange: () => { context.smoothing = Number(select.value); context.redraw(); } },
    ...SMOOTHING.map(([text, value]) => el("option", { value, text, selected: value === context.smoothing })));
  return el("label", {}, "Smoothing ", select);
}

/** The charts of a run, for a grid; at the end one for each metric that the user added (docs/how-to-add.md). */
export function chartsOf(context) {
  const smooth = (curve) => ({ ...curve, mean: smoothed(curve.mean, context.smoothing) });
  const charts = [
    { title: "Loss", names: ["loss", "val_loss"], note: "nats per token; the band is from the least to the greatest step", smooth,
      lines: [{ label: "training", colour: "blue", band: true }, { label: "held out", colour: "orange", points: true }] },
    { title: "Held-out bits per byte", names: ["val_bits_per_byte"], lines: [{ label: "bits per byte", colour: "orange", points: true }] },
    { title: "MaxVio", names: ["max_vio_batch", "max_vio_floor"], smooth, note: "max load / mean load − 1, mean over layers",
      lines: [{ label: "each batch", colour: "blue", band: true }, { label: "by chance", colour: "grey", dash: [6, 4] }] },
    { title: "Tokens per second", names: ["tokens_per_s"], show: short, smooth, lines: [{ label: "tokens/s", colour: "green", band: true }] },
    { title: "Gradient norm", names: ["grad_norm"], smooth, note: "before clipping", lines: [{ label: "norm", colour: "pink", band: true }] },
    { title: "Learning rate", names: ["lr"], lines: [{ label: "rate", colour: "blue" }] },
    { title: "Time of a step", names: ["step_s"], show: milliseconds, smooth, lines: [{ label: "step", colour: "green", band: true }] },
    { title: "MFU", names: ["mfu"], show: percent, smooth, lines: [{ label: "MFU", colour: "green", band: true }] },
  ];
  const drawn = charts.flatMap(({ names }) => names), own = context.facts[context.run]?.own_metrics ?? [];
  const plain = (name) => ({ title: name, names: [name], lines: [{ label: name, colour: "blue", band: true }] });
  return [...charts, ...own.filter((name) => !drawn.includes(name)).map(plain)];
}

/** The other runs that the figures can be held against. */
function offerOthers(label, select, context) {
  const others = [...context.runs.keys()].filter((number) => number !== context.run);
  label.hidden = others.length === 0;
  if (!others.includes(context.against)) context.against = null;
  const offered = ["", ...others].join();
  if (select.dataset.offered === offered) return;
  select.dataset.offered = offered;
  select.replaceChildren(el("option", { value: "", text: "nothing" }),
    ...others.map((number) => el("option", { value: number, text: context.runs[number].name, selected: number === context.against })));
}

/** Means of another run over the same steps as those of this one; null without one. */
async function figuresOf(other, number, run) {
  if (!other) return null;
  const recent = { first: Math.max(1, run.step - RECENT + 1), last: run.step }, evalStep = run.last_eval.step ?? 0;
  const [means, evaluation] = await Promise.all([askCurves(number, COMPARED, recent, 1),
    askCurves(number, ["val_bits_per_byte"], { first: evalStep, last: evalStep }, 1)]);
  const values = Object.entries({ ...means.curves, ...evaluation.curves }).map(([name, curve]) => [name, curve.mean[0]]);
  return { name: other.name, ...Object.fromEntries(values) };
}

/** What the other run had at the same steps, and by how much this one differs. */
function versus(other, name, value, show) {
  const theirs = other?.[name];
  if (!Number.isFinite(theirs)) return other ? `${other.name}: not recorded at these steps` : "";
  const change = (value - theirs) / Math.abs(theirs);
  return `${other.name}: ${show(theirs)}${Number.isFinite(change) ? ` (here ${change < 0 ? "−" : "+"}${percent(Math.abs(change))})` : ""}`;
}

const joined = (...notes) => notes.filter(Boolean).join("; ");

function glanceCards(run, other) {
  const { mean, latest, first_eval: first, last_eval: last } = run;
  const ratio = mean.max_vio_batch / mean.max_vio_floor;
  const isBetter = last.step > first.step ? last.val_bits_per_byte < first.val_bits_per_byte : null;
  const held = last.step > first.step ? `at step ${last.step}; ${digits(first.val_bits_per_byte)} at step ${first.step}` : `at step ${last.step}`;
  const trouble = run.num_failures ? `${counted(run.num_failures, "failure")}, ${counted(run.num_recoveries, "recovery", "recoveries")}` : "no failure so far";
  const verdict = { failed: "bad", gone: "bad", recovering: "warn" }[run.state] ?? (run.num_failures > run.num_recoveries ? "warn" : "good");
  return [
    card("Loss", digits(mean.loss), joined(last.val_bits_per_byte === undefined ? `${digits(latest.loss)} now` :
      `held out: ${digits(last.val_bits_per_byte)} bits/byte ${held}`, versus(other, "loss", mean.loss, digits),
    other && last.val_bits_per_byte !== undefined && `held out ${versus(other, "val_bits_per_byte", last.val_bits_per_byte, digits)}`),
    isBetter === null ? "" : isBetter ? "good" : "bad"),
    card("Imbalance (MaxVio)", digits(mean.max_vio_batch), joined(Number.isFinite(ratio) ?
      `${digits(ratio)} × chance (${digits(mean.max_vio_floor)}); ${counted(latest.dead_experts ?? 0, "expert")} without a token` : "",
    versus(other, "max_vio_batch", mean.max_vio_batch, digits))),
    card("Tokens per second", short(mean.tokens_per_s), joined(`${milliseconds(mean.step_s)} a step`,
      mean.mfu === undefined ? "" : `MFU ${percent(mean.mfu)}`, versus(other, "tokens_per_s", mean.tokens_per_s, short))),
    card("Health", run.state, trouble, verdict),
  ];
}

function moreCards(run, other) {
  const { latest, mean } = run;
  return [
    card("Time left", run.left_s === null ? "n/a" : duration(run.left_s), run.left_s === null ? "" :
      `until about ${new Date(Date.now() + run.left_s * 1e3).toLocaleString("sv").slice(0, 16)}`),
    card("Learning rate", digits(latest.lr), versus(other, "lr", latest.lr, digits)),
    card("Gradient norm", latest.grad_norm === undefined && latest.step ? "not finite" : digits(latest.grad_norm), joined(latest.skipped && "this step was skipped", versus(other, "grad_norm", latest.grad_norm, digits)), latest.skipped ? "bad" : ""),
    card("Bias range", `${digits(latest.bias_min)} to ${digits(latest.bias_max)}`, other && `${other.name}: ${digits(other.bias_min)} to ${digits(other.bias_max)}`),
    card("Wait for the coordinator", percent(mean.control_wait_s / mean.step_s),
      joined("of the step", other && `${other.name}: ${percent(other.control_wait_s / other.step_s)}`)),
  ];
}

function bars(mean) {
  return PHASES.filter(([name]) => Number.isFinite(mean[name])).map(([name, label]) => {
    const share = Math.max(0, mean[name] / mean.step_s);
    const bar = svg("svg", { viewBox: "0 0 100 1", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("rect", { width: Math.min(share, 1) * 100, height: 1 }));
    return el("div", { class: "bar" }, el("span", { text: label }), el("div", { class: "track" }, bar),
      el("span", { class: "number", text: `${milliseconds(mean[name])}, ${percent(share)}` }));
  });
}
