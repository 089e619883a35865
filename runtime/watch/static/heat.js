// A heat map of loads, one byte for each cell: blue below the mean, red above it, and magenta for no load at all.

import { el, setText } from "./dom.js";

const LOAD_RANGE = 4; // as in runtime/watch/load_codes.py
const DEAD = [209, 0, 165];
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

/** Bytes of an answer. */
export const decoded = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

/** The load that a byte stands for, as a multiple of the mean. */
export const loadOf = (code) => (code === 0 ? 0 : LOAD_RANGE ** ((code - 128) / 127));

/** The colour of a byte, [red, green, blue]. */
function mixed(code) {
  if (code === 0) return DEAD;
  const height = (code - 128) / 127;
  const middle = isDark() ? [44, 49, 57] : [244, 244, 242];
  const end = height < 0 ? (isDark() ? [64, 156, 226] : [22, 84, 158]) : isDark() ? [247, 108, 70] : [170, 28, 40];
  const weight = Math.abs(height) ** 0.8;
  return middle.map((from, n) => Math.round(from + (end[n] - from) * weight));
}

/** Colours of all bytes, for the present colour scheme (light or dark). */
export function palette() {
  return Array.from({ length: 256 }, (_, code) => mixed(code));
}

/** Draw rows × columns; codeAt(row, column) is the byte of a cell, or undefined for none. */
export function drawCells(canvas, rows, columns, codeAt) {
  canvas.width = Math.max(columns, 1);
  canvas.height = Math.max(rows, 1);
  const context = canvas.getContext("2d"), colours = palette();
  const image = context.createImageData(canvas.width, canvas.height);
  for (let row = 0; row < rows; row += 1) {
    for (let column = 0; column < columns; column += 1) {
      const code = codeAt(row, column);
      if (code !== undefined) image.data.set([...colours[code], 255], (row * columns + column) * 4);
    }
  }
  context.putImageData(image, 0, 0);
}

/** What the colours mean. */
export function legend() {
  const canvas = el("canvas", { width: 128, height: 1, "aria-hidden": "true" });
  const dead = el("canvas", { width: 1, height: 1, "aria-hidden": "true" });
  drawCells(canvas, 1, 127, (_, column) => column * 2 + 1);
  drawCells(dead, 1, 1, () => 0);
  dead.classList.add("small");
  return el("div", { class: "legend" }, el("span", { text: "≤ ¼ ×" }), canvas, el("span", { text: "≥ 4 × the mean load" }), dead, el("span", { text: "none" }));
}

export class HeatMap {
  /** textOf(row, column): the text for a cell. onPick(row, column): a cell was clicked. */
  constructor({ title, note, textOf, onPick }) {
    Object.assign(this, { title, note, textOf, onPick });
    this.canvas = el("canvas", { class: "map", role: "img", "aria-label": title });
    this.axis = el("div", { class: "axis", "aria-hidden": "true" });
    this.caption = el("figcaption", { text: note });
    this.figure = el("figure", { class: "wide", "data-chart": title }, el("header", {}, el("h3", { text: title })), this.canvas, this.axis, this.caption);
    this.canvas.addEventListener("pointermove", (event) => setText(this.caption, this.textOf(...this.cell(event))));
    this.canvas.addEventListener("pointerleave", () => setText(this.caption, this.note));
    this.canvas.addEventListener("click", (event) => this.onPick?.(...this.cell(event)));
  }

  /** codeAt: see drawCells. ends: the texts below the left and the right edge. description: for a screen reader. */
  draw(rows, columns, codeAt, ends, description, height) {
    Object.assign(this, { rows, columns });
    this.canvas.style.height = `${height}px`;
    this.canvas.setAttribute("aria-label", `${this.title}. ${description}`);
    this.axis.replaceChildren(...ends.map((text) => el("span", { text })));
    drawCells(this.canvas, rows, columns, codeAt);
  }

  cell(event) {
    const box = this.canvas.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) / box.height) * this.rows);
    const column = Math.floor(((event.clientX - box.left) / box.width) * this.columns);
    return [Math.min(Math.max(row, 0), this.rows - 1), Math.min(Math.max(column, 0), this.columns - 1)];
  }
}
