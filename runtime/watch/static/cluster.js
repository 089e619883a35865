// The view Cluster: failures and recoveries, the ranks, and the times of rank 0.

import { ask } from "./api.js";
import { card, el, table } from "./dom.js";
import { bytes, count, counted, duration, milliseconds, setting } from "./format.js";
import { chartGrid, eventTable } from "./parts.js";

export const TITLE = "Cluster";

export function make(root, context) {
  const cards = el("section", { class: "cards", "aria-label": "Figures" });
  const ranks = el("div", {});
  const events = eventTable("Failures, recoveries and warnings", (event) => event.verdict !== "plain", 100);
  root.append(cards, el("h2", { text: "Failures, recoveries and warnings" }), events.box, el("h2", { text: "Ranks" }), ranks,
    el("p", { class: "note", text: "Places as the run began or last resumed. What each rank is in is asked every 2 s while the run is under way; when a collective takes too long, the failure above says who holds it up." }),
    el("h2", { text: "Rank 0 through time" }));
  const grid = chartGrid(root, context, [
    { title: "Sent in a step", names: ["sent_bytes"], show: bytes, lines: [{ label: "rows and gradients", colour: "blue", band: true }] },
    { title: "Exchange", names: ["dispatch_s", "combine_s"], show: milliseconds, lines: [{ label: "tokens to their experts", colour: "blue" }, { label: "results back", colour: "orange" }] },
    { title: "Experts", names: ["experts_s"], show: milliseconds, lines: [{ label: "experts", colour: "green", band: true }] },
    { title: "All else", names: ["other_s"], show: milliseconds, lines: [{ label: "attention, gradients, optimizer", colour: "pink", band: true }] },
  ]);
  return {
    async draw() {
      const run = context.runs[context.run], facts = context.facts[context.run];
      if (!run || !facts) return;
      cards.replaceChildren(...figures(run, facts));
      ranks.replaceChildren(rankTable(facts.ranks, await ask(`runs/${context.run}/now`)));
      await Promise.all([grid.draw(), events.draw(context)]);
    },
    leave: grid.leave,
  };
}

const isRow = (row) => row !== null && typeof row === "object" && !Array.isArray(row);

function figures(run, facts) {
  const rows = Array.isArray(facts.ranks) ? facts.ranks.filter(isRow) : [];
  const nodes = new Set(rows.map((row) => setting(row.node)));
  const since = run.last_time ? `${duration(Date.now() / 1e3 - run.last_time)} ago` : "n/a";
  const bad = ["failed", "gone"].includes(run.state);
  return [
    card("State", run.state, `last written ${since}`, bad ? "bad" : run.state === "recovering" ? "warn" : ""),
    card("Ranks", rows.length ? count(rows.length) : "n/a", rows.length ? `on ${nodes.size} ${nodes.size === 1 ? "node" : "nodes"}` : "not recorded"),
    card("Failures", count(run.num_failures), counted(run.num_recoveries, "recovery", "recoveries"), run.num_failures > run.num_recoveries ? "warn" : ""),
    card("Exchange", isRow(facts.exchange) ? setting(facts.exchange.exchange) : "n/a", isRow(facts.exchange) ? setting(facts.exchange.reason) : ""),
  ];
}

/** What each rank is in, by its number: a text, and the bytes that it holds. */
function activities(now) {
  const rows = isRow(now) && Array.isArray(now.ranks) ? now.ranks.filter(isRow) : [];
  const since = isRow(now) && typeof now.time === "number" ? Math.max(Date.now() / 1e3 - now.time, 0) : 0;
  return new Map(rows.map((row) => [row.rank, {
    place: [setting(row.phase), row.layer ? `of ${setting(row.layer)}` : "", `in step ${setting(row.step)}`].filter(Boolean).join(" "),
    wait: row.waits_in && typeof row.waits_s === "number" ? duration(row.waits_s + since) : "",
    memory: row.memory_bytes > 0 ? bytes(row.memory_bytes) : "n/a",
  }]));
}

function rankTable(ranks, now) {
  const found = activities(now);
  const rows = Array.isArray(ranks) ? ranks.filter(isRow) : [];
  if (!rows.length) return el("p", { class: "muted", text: "No rank map is recorded yet." });
  const experts = (value) => (Array.isArray(value) ? value.map(setting).join(" to ") : setting(value));
  const live = (row) => { const each = found.get(row.rank); return found.size ? [each?.place ?? "n/a", each?.wait ?? "", each?.memory ?? "n/a"] : []; };
  return table("Ranks", ["Rank", "Node", "Device", ...(found.size ? ["Is in", "Waits for others since", "Memory"] : []), "Process", "Experts", "EP rank", "Replica", "Interface"],
    rows.map((row) => [setting(row.rank), setting(row.node), setting(row.device), ...live(row), setting(row.pid), experts(row.experts),
      setting(row.ep_rank), setting(row.edp_rank), setting(row.interface)]), { class: "unbroken" });
}
