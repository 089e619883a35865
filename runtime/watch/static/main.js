// The frame of the page: it chooses run and view, takes the news from the server, and decides when to draw.

import { ask, listen } from "./api.js";
import { el, setText } from "./dom.js";
import { count, duration, percent, when } from "./format.js";
import { StepWindow } from "./window.js";
import * as overview from "./overview.js";
import * as balance from "./balance.js";
import * as cluster from "./cluster.js";
import * as text from "./text.js";
import * as compare from "./compare.js";

const VIEWS = { overview, balance, cluster, text, compare };
const REDRAW_MS = 1000; // least time between two drawings, however fast the steps come
const WORDS = { gone: "gone: ended without a word", "not begun": "not begun" };

const page = Object.fromEntries(["name", "chooser", "run", "state", "progress", "bar", "when", "tabs", "window", "view", "trouble"]
  .map((id) => [id, document.getElementById(id)]));
const context = { runs: [], facts: [], run: 0, smoothing: 0.6, redraw };
let view = null, shown = "", isDrawing = false, isStale = false, lastDrawn = 0;

const steps = new StepWindow(page.window, { lastStep: () => current()?.step ?? 0, changed: redraw });
context.window = steps;

function current() {
  return context.runs[context.run];
}

/** Draw soon. Calls before that are drawn together; a hidden page is drawn a tenth as often. */
function redraw() {
  isStale = true;
  if (!isDrawing) setTimeout(draw, Math.max(0, lastDrawn + REDRAW_MS - Date.now()) * (document.hidden ? 10 : 1));
  isDrawing = true;
}

async function draw() {
  isStale = false;
  lastDrawn = Date.now();
  try {
    await Promise.all(context.runs.map(learn));
    await view?.draw();
    complain("");
  } catch (error) {
    complain(error.message);
  }
  isDrawing = false;
  if (isStale) redraw();
}

/** Ask for the facts of a run (settings, layers, ranks); again only after an event, the first step or the first sample. */
async function learn(run, number) {
  const sign = `${run.epoch} ${run.num_events} ${run.num_samples > 0} ${run.step > 0} ${run.total_steps}`;
  if (context.facts[number]?.sign !== sign) context.facts[number] = { ...(await ask(`runs/${number}`)), sign };
}

function take(summary) {
  const { run, ...rest } = summary;
  const isNew = context.runs[run] === undefined;
  context.runs[run] = rest;
  if (isNew) chooseFrom(context.runs);
  tellHead();
  steps.tell();
  redraw();
}

function chooseFrom(runs) {
  page.chooser.hidden = runs.length < 2;
  page.run.replaceChildren(...runs.map((run, number) => el("option", { value: number, text: run.name, selected: number === context.run })));
}

function tellHead() {
  const run = current();
  if (!run) return;
  document.title = `${run.state === "running" && run.total_steps ? percent(run.step / run.total_steps) : run.state} · ${run.name}`;
  setText(page.name, run.name);
  page.state.className = `state ${run.state}`;
  setText(page.state.firstElementChild, WORDS[run.state] ?? run.state);
  const share = run.total_steps ? Math.min(run.step / run.total_steps, 1) : 0;
  page.bar.style.width = `${share * 100}%`;
  page.progress.setAttribute("aria-valuenow", String(Math.round(share * 100)));
  tellTime();
}

function tellTime() {
  const run = current();
  if (!run) return;
  const parts = [`step ${count(run.step)}${run.total_steps ? ` of ${count(run.total_steps)}` : ""}`];
  if (run.left_s !== null) parts.push(`${duration(run.left_s)} left`);
  if (run.last_time) parts.push(`last written ${when(run.last_time)}, ${duration(Date.now() / 1e3 - run.last_time)} ago`);
  if (run.share_read < 1) parts.push(`${percent(run.share_read)} read; the rest is drawn from samples`);
  setText(page.when, parts.join(" · "));
}

function show() {
  const name = location.hash.slice(1) in VIEWS ? location.hash.slice(1) : "overview";
  if (name === shown) return;
  shown = name;
  for (const link of page.tabs.querySelectorAll("a")) {
    if (link.hash === `#${name}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  build();
}

function build() {
  view?.leave();
  page.view.replaceChildren();
  view = VIEWS[shown].make(page.view, context);
  redraw();
}

function complain(text) {
  page.trouble.hidden = !text;
  setText(page.trouble, text);
}

page.tabs.append(...Object.entries(VIEWS).map(([name, each]) => el("li", {}, el("a", { href: `#${name}`, text: each.TITLE }))));
page.run.addEventListener("change", () => { context.run = Number(page.run.value); steps.set(null); tellHead(); build(); });
addEventListener("hashchange", show);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => build());
document.addEventListener("visibilitychange", redraw);
setInterval(tellTime, 1000);
show();
listen(take, (isLost) => complain(isLost ? "The server does not answer; the page goes on when it is back." : ""));
