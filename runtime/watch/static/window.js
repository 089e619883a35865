// The window of steps that all charts show: the whole run or its last steps, which follow the run, or a fixed part.

import { el, setText } from "./dom.js";
import { count } from "./format.js";

export class StepWindow {
  /** lastStep(): returns the run's last step. changed(): called when the charts must be drawn again. */
  constructor(root, { lastStep, changed }) {
    // part: [first, last] if a fixed part is shown; newest: how many last steps are shown and followed, or 0.
    Object.assign(this, { lastStep, changed, part: null, newest: 0 });
    this.range = el("span", { class: "range" });
    const button = (text, label, act) => el("button", { type: "button", "aria-label": label, title: label, onclick: act, text });
    this.whole = button("All", "Show all steps", () => this.set(null));
    this.lastButtons = [1000, 100].map((steps) => [steps, button(`Last ${count(steps)}`, `Show the last ${steps} steps`, () => this.follow(steps))]);
    this.moves = [button("−", "Zoom out", () => this.zoom(2)), button("+", "Zoom in", () => this.zoom(0.5)),
      button("←", "Earlier steps", () => this.move(-0.5)), button("→", "Later steps", () => this.move(0.5))];
    root.append(this.whole, ...this.lastButtons.map(([, each]) => each), ...this.moves, this.range);
    this.tell();
  }

  /** Parameters of a request; {} asks for all steps. */
  get parameters() {
    if (this.newest) return { first: Math.max(this.lastStep() - this.newest + 1, 0), last: this.lastStep() };
    return this.part ? { first: this.part[0], last: this.part[1] } : {};
  }

  set(part) {
    this.part = part;
    this.newest = 0;
    this.tell();
    this.changed();
  }

  follow(steps) {
    this.newest = steps;
    this.tell();
    this.changed();
  }

  zoom(factor) {
    const { first = 0, last = this.lastStep() } = this.parameters;
    const middle = (first + last) / 2, half = Math.max(((last - first) / 2) * factor, 4);
    const part = [Math.max(0, Math.round(middle - half)), Math.min(this.lastStep(), Math.round(middle + half))];
    this.set(part[0] === 0 && part[1] === this.lastStep() ? null : part);
  }

  move(share) {
    const { first = 0, last = this.lastStep() } = this.parameters;
    const width = last - first, start = Math.max(0, Math.min(this.lastStep() - width, Math.round(first + width * share)));
    this.set(width >= this.lastStep() ? null : [start, start + width]);
  }

  tell() {
    const { first = 0, last = this.lastStep() } = this.parameters;
    setText(this.range, `steps ${count(first)} to ${count(last)}`);
    this.whole.setAttribute("aria-pressed", String(!this.part && !this.newest));
    for (const [steps, each] of this.lastButtons) each.setAttribute("aria-pressed", String(this.newest === steps));
  }
}
