// The view Text: the text that a run reads, and its samples, each token in the colour of its expert.

import { ask } from "./api.js";
import { card, el, setText, table } from "./dom.js";
import { count, counted, digits, percent, setting, short } from "./format.js";
import { sampleBox } from "./tokens.js";

export const TITLE = "Text";

const NEWEST = "";
const HOW = `trimtab train --run.sample_prompts='["Once upon a time", "def main("]'`;

export function make(root, context) {
  const cards = el("section", { class: "cards", "aria-label": "Figures" });
  const sources = el("div", {}), samples = el("div", {});
  const chosen = { step: NEWEST, layer: 0 };
  const step = el("select", { onchange: () => { chosen.step = step.value; context.redraw(); } });
  const layer = el("select", { onchange: () => { chosen.layer = Number(layer.value); context.redraw(); } });
  const controls = el("div", { class: "controls" }, el("label", {}, "After step ", step), el("label", {}, "Experts of layer ", layer));
  const note = el("p", { class: "note" });
  root.append(cards, el("h2", { text: "Sources" }), sources, el("h2", { text: "Samples" }), controls, note, samples);
  let seen = "";

  async function drawSamples() {
    const signNow = () => `${context.run} ${context.runs[context.run].epoch} ${context.runs[context.run].num_samples} ${chosen.step} ${chosen.layer}`;
    const sign = signNow();
    if (sign === seen) return;
    const wanted = chosen.step === NEWEST ? {} : { step: chosen.step };
    const found = await ask(`runs/${context.run}/samples`, { ...wanted, layer: chosen.layer });
    if (sign !== signNow()) return; // Another choice was made meanwhile: experts of this layer would stand under its name.
    seen = sign;
    controls.hidden = !found;
    setText(note, found ? toldOf(found, chosen.layer) : `This run continues no texts. To have some continued at each evaluation: ${HOW}`);
    samples.replaceChildren(...(found?.samples ?? []).map(sampleBox));
    if (!found) return;
    const steps = found.steps.map((each) => [String(each), `${count(each)}`]).reverse();
    fill(step, [[NEWEST, "the newest"], ...steps], chosen.step);
    fill(layer, found.layers.map((name, number) => [String(number), name]), String(chosen.layer));
  }

  return {
    async draw() {
      const run = context.runs[context.run], facts = context.facts[context.run];
      if (!run || !facts) return;
      const text = textOf(run, facts);
      cards.replaceChildren(...figures(run, facts, text));
      sources.replaceChildren(sourceTable(text));
      await drawSamples();
    },
    leave() {},
  };
}

/** Options as they are now; the list is made anew only where there are others, so that an open one stays. */
function fill(select, options, value) {
  const same = select.options.length === options.length && options.every(([each, text], n) => select.options[n].value === each && select.options[n].text === text);
  if (!same) select.replaceChildren(...options.map(([each, text]) => el("option", { value: each, text })));
  select.value = value;
}

function toldOf(found, layer) {
  const where = found.layers[layer];
  return `${counted(found.samples.length, "text")} after step ${count(found.step)}. ` +
    (where ? `A token has the colour of its best expert in ${where}; what is underlined was given. Below a text: how many of its tokens each expert took. Arrow keys go from token to token.` : "No experts are recorded.");
}

const isObject = (value) => value !== null && typeof value === "object" && !Array.isArray(value);
const number = (value) => (typeof value === "number" && Number.isFinite(value) && value >= 0 ? value : 0);

/** The sources, and how many tokens of each the steps so far have read: [{ name, files, train, held, share, read }]. */
function textOf(run, { data, settings }) {
  const rows = isObject(data) && Array.isArray(data.sources) ? data.sources.filter(isObject) : [];
  const tokens = number(settings["run.global_batch_size"]) * number(settings["model.max_seq_len"]);
  const shift = number(settings["data.shift_at"]);
  const before = shift ? Math.min(run.step, shift - 1) : run.step;
  const sizes = rows.map((row) => number(row.num_train_tokens));
  const first = shares(settings["data.mix"], sizes), then = shift ? shares(settings["data.mix_after"], sizes) : first;
  const sources = rows.map((row, n) => ({
    name: setting(row.name), files: number(row.num_files), train: sizes[n], held: number(row.num_val_tokens),
    share: (shift && run.step >= shift ? then : first)[n], read: tokens * (before * first[n] + (run.step - before) * then[n]),
  }));
  return { sources, tokens, read: tokens * run.step, size: sizes.reduce((sum, each) => sum + each, 0), tokenizer: isObject(data) ? setting(data.tokenizer) : "" };
}

/** Of each source in a batch: as the weights of a mix say, else as large as it is. */
function shares(mix, sizes) {
  const weights = Array.isArray(mix) && mix.length === sizes.length ? mix.map(number) : sizes;
  const sum = weights.reduce((total, each) => total + each, 0);
  return weights.map((each) => (sum ? each / sum : 0));
}

function figures(run, { settings, data }, text) {
  const isChat = settings["data.format"] === "chat", isPacked = isChat || settings["data.pack_documents"] === true;
  const isKnown = text.tokens > 0;
  const passes = text.size ? `${digits(text.read / text.size)} times the text` : "";
  return [
    card("Tokens read", isKnown ? short(text.read) : "n/a", isKnown ? passes : "of a batch nothing is recorded"),
    card("Tokens of a batch", isKnown ? count(text.tokens) : "n/a", isKnown ? `${count(settings["run.global_batch_size"])} sequences of ${count(settings["model.max_seq_len"])}` : ""),
    card("Packing", isPacked ? "whole documents" : "one stream", isPacked ? "attention sees one document alone" : "a sequence runs on over the ends of documents"),
    card("Tokenizer", text.tokenizer.split(":")[0] || "n/a", isObject(data) ? `${count(data.vocab_size)} ids${isChat ? "; conversations" : ""}` : ""),
  ];
}

function sourceTable({ sources }) {
  if (!sources.length) return el("p", { class: "muted", text: "The run does not say what text it reads." });
  const rows = sources.map((each) => [each.name, count(each.files), count(each.train), count(each.held), percent(each.share),
    short(each.read), each.train ? digits(each.read / each.train) : "n/a"]);
  return table("Sources", ["Source", "Files", "Tokens", "Held-out tokens", "Share of a batch", "Tokens read, about", "Times read"], rows, { class: "unbroken" });
}
