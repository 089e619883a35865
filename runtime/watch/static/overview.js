// Is it learning, is it balanced, is it fast, is it healthy?

import { smoothed } from "./chart.js";
import { card, el, svg } from "./dom.js";
import { counted, digits, duration, milliseconds, percent, short } from "./format.js";
import { chartGrid, eventTable } from "./parts.js";

export const TITLE = "Overview";

const SMOOTHING = [["none", 0], ["some", 0.6], ["strong", 0.92]];
const PHASES = [["dispatch_s", "tokens to their experts"], ["experts_s", "experts"], ["combine_s", "results back"],
  ["bias_update_s", "bias update"], ["control_wait_s", "wait for the coordinator"], ["other_s", "attention, gradients, optimizer, all else"]];

export function make(root, context) {
  const glance = el("section", { class: "cards glance", "aria-label": "At a glance" });
  const more = el("section", { class: "cards", "aria-label": "Figures" });
  const smoothing = el("select", { onchange: () => { context.smoothing = Number(smoothing.value); context.redraw(); } },
    ...SMOOTHING.map(([text, value]) => el("option", { value, text, selected: value === context.smoothing })));
  const controls = el("div", { class: "controls" }, el("label", {}, "Smoothing ", smoothing));
  root.append(glance, more, controls);
  const smooth = (curve) => ({ ...curve, mean: smoothed(curve.mean, context.smoothing) });
  const grid = chartGrid(root, context, [
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
  ]);
  const phases = el("div", { class: "bars" });
  const events = eventTable("Last events", () => true, 12);
  root.append(el("h2", { text: "Where the time of a step goes" }), el("p", { class: "note", text: "Rank 0, mean of the last 64 steps." }),
    phases, el("h2", { text: "Last events" }), events.box);
  return {
    async draw() {
      const run = context.runs[context.run];
      if (!run) return;
      glance.replaceChildren(...glanceCards(run));
      more.replaceChildren(...moreCards(run));
      phases.replaceChildren(...bars(run.mean));
      await Promise.all([grid.draw(), events.draw(context)]);
    },
    leave: grid.leave,
  };
}

function glanceCards(run) {
  const { mean, latest, first_eval: first, last_eval: last } = run;
  const ratio = mean.max_vio_batch / mean.max_vio_floor;
  const isBetter = last.step > first.step ? last.val_bits_per_byte < first.val_bits_per_byte : null;
  const held = last.step > first.step ? `at step ${last.step}; ${digits(first.val_bits_per_byte)} at step ${first.step}` : `at step ${last.step}`;
  const trouble = run.num_failures ? `${counted(run.num_failures, "failure")}, ${counted(run.num_recoveries, "recovery", "recoveries")}` : "no failure so far";
  const healthy = { failed: "bad", gone: "bad", recovering: "warn" }[run.state] ?? (run.num_failures > run.num_recoveries ? "warn" : "good");
  return [
    card("Loss", digits(mean.loss), last.val_bits_per_byte === undefined ? `${digits(latest.loss)} now` :
      `held out: ${digits(last.val_bits_per_byte)} bits/byte ${held}`, isBetter === null ? "" : isBetter ? "good" : "bad"),
    card("Imbalance (MaxVio)", digits(mean.max_vio_batch), Number.isFinite(ratio) ?
      `${digits(ratio)} × chance (${digits(mean.max_vio_floor)}); ${latest.dead_experts ?? 0} experts without a token` : ""),
    card("Tokens per second", short(mean.tokens_per_s), [`${milliseconds(mean.step_s)} a step`,
      mean.mfu === undefined ? "" : `MFU ${percent(mean.mfu)}`].filter(Boolean).join("; ")),
    card("Health", run.state, trouble, healthy),
  ];
}

function moreCards(run) {
  const { latest, mean } = run;
  return [
    card("Time left", run.left_s === null ? "n/a" : duration(run.left_s), run.left_s === null ? "" :
      `until about ${new Date(Date.now() + run.left_s * 1e3).toLocaleString("sv").slice(0, 16)}`),
    card("Learning rate", digits(latest.lr)),
    card("Gradient norm", latest.grad_norm === undefined && latest.step ? "not finite" : digits(latest.grad_norm), latest.skipped ? "this step was skipped" : "", latest.skipped ? "bad" : ""),
    card("Bias range", `${digits(latest.bias_min)} to ${digits(latest.bias_max)}`),
    card("Wait for the coordinator", percent(mean.control_wait_s / mean.step_s), "of the step"),
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
