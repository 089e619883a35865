// A text as its tokens, each in the colour of the expert that took it.

import { el, setText } from "./dom.js";
import { count } from "./format.js";

const MAX_CHIPS = 32;
const NO_TEXT = "·"; // what a token without a text of its own shows

const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

/** Neighbouring ids differ most: a step of the golden angle in hue, and three depths. Ink stays readable on all. */
function colourOf(expert) {
  const hue = (expert * 137.508) % 360, depth = expert % 3;
  return isDark() ? `hsl(${hue} 42% ${20 + 4 * depth}%)` : `hsl(${hue} 72% ${90 - 5 * depth}%)`;
}

/** sample: { tokens, num_prompt_tokens, experts }, with the experts of each token, best first, or null. */
export function sampleBox(sample, number) {
  const told = el("p", { class: "told", "aria-live": "polite" });
  const tokens = sample.tokens.map((text, n) => token(text, sample.experts[n], n < sample.num_prompt_tokens));
  const name = `Text ${number + 1}`;
  const text = el("div", { class: "tokens", role: "listbox", "aria-label": `${name}, token by token`, "aria-orientation": "horizontal" }, ...tokens);
  const tell = (index) => { const chosen = tokens[index]; if (chosen) setText(told, chosen.getAttribute("aria-label")); };
  followPointer(text, tokens, tell);
  followKeys(text, tokens, tell);
  const given = sample.tokens.slice(0, sample.num_prompt_tokens).join(""), rest = sample.tokens.slice(sample.num_prompt_tokens).join("");
  return el("section", { class: "sample", "aria-label": name }, el("p", { class: "hidden-text", text: `Given: ${given}. Continued: ${rest}` }), tokens.length ? text : null,
    told, chips(name, sample.experts, tokens));
}

function token(text, experts, isGiven) {
  const where = experts ? `experts ${experts.join(", ")}` : "not read by the model";
  const made = el("span", { role: "option", tabindex: "-1", "aria-selected": "false", "aria-label": `${shown(text)}: ${where}`, title: where, class: isGiven ? "given" : null,
    text: text.replaceAll("\n", "↵\n") || NO_TEXT });
  if (experts?.length) made.style.backgroundColor = colourOf(experts[0]);
  return made;
}

const shown = (text) => (text ? `“${text.replaceAll("\n", "↵")}”` : "part of a character");

function followPointer(text, tokens, tell) {
  text.addEventListener("pointerover", (event) => tell(tokens.indexOf(event.target)));
}

/** One stop of the Tab key for a text; within it the arrow keys, Home and End. */
function followKeys(text, tokens, tell) {
  let chosen = 0;
  const choose = (index) => {
    chosen = Math.min(Math.max(index, 0), tokens.length - 1);
    tokens.forEach((each, n) => { each.tabIndex = n === chosen ? 0 : -1; each.setAttribute("aria-selected", String(n === chosen)); });
  };
  text.addEventListener("keydown", (event) => {
    const index = { ArrowRight: chosen + 1, ArrowDown: chosen + 10, ArrowLeft: chosen - 1, ArrowUp: chosen - 10, Home: 0, End: tokens.length - 1 }[event.key];
    if (index === undefined) return;
    event.preventDefault();
    choose(index);
    tokens[chosen].focus();
  });
  text.addEventListener("focusin", (event) => { const index = tokens.indexOf(event.target); if (index >= 0) { choose(index); tell(index); } });
  if (tokens.length) tokens[0].tabIndex = 0;
}

/** How many tokens each expert took, the busiest first; a click marks them. */
function chips(name, experts, tokens) {
  const taken = new Map();
  experts.forEach((ids) => new Set(ids ?? []).forEach((id) => taken.set(id, (taken.get(id) ?? 0) + 1)));
  const busiest = [...taken].sort(([a, x], [b, y]) => y - x || a - b);
  const made = busiest.slice(0, MAX_CHIPS).map(([id, num]) => chip(id, num, experts, tokens));
  const rest = busiest.length - made.length;
  return el("ul", { class: "chips", "aria-label": `Experts of ${name.toLowerCase()}` }, ...made.map((button) => el("li", {}, button)),
    rest > 0 ? el("li", { class: "note", text: `and ${count(rest)} more` }) : null);
}

function chip(id, num, experts, tokens) {
  const button = el("button", { type: "button", "aria-pressed": "false", "aria-label": `Expert ${id} took ${num} tokens; mark them`, text: `${id} · ${num}` });
  button.style.backgroundColor = colourOf(id);
  button.addEventListener("click", () => {
    const isOn = button.getAttribute("aria-pressed") !== "true";
    button.closest("ul").querySelectorAll("button").forEach((each) => each.setAttribute("aria-pressed", String(each === button && isOn)));
    tokens.forEach((each, n) => each.classList.toggle("marked", isOn && (experts[n] ?? []).includes(id)));
  });
  return button;
}
