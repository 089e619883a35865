// Replaces the live page's api.js in a report: the same functions, which answer from the numbers in the file instead.

export const held = JSON.parse(document.getElementById("held").textContent);

const ANSWERS = { load, expert, last_load: () => held.last_load, first_load: () => held.first_load };

export const ask = async (path, parameters = {}) => ANSWERS[path.split("/")[2]](parameters);

export async function askCurves(_, names, { first = 0, last = Infinity }) {
  const { first: firsts, last: lasts, curves } = held.curves;
  const kept = [...firsts.keys()].filter((n) => lasts[n] >= first && firsts[n] <= last);
  const part = (values) => kept.map((n) => values?.[n] ?? null);
  const curve = ({ mean, low = mean, high = mean } = {}) => ({ mean: part(mean), low: part(low), high: part(high) });
  return { first: part(firsts), last: part(lasts), curves: Object.fromEntries(names.map((name) => [name, curve(curves[name])])) };
}

function load({ layer, ...window }) {
  const map = held.layers[layer], [from, to] = inside(map?.steps ?? [], window);
  if (from >= to) return null;
  const rows = atob(map.codes).length / map.steps.length;
  return { ...map, steps: map.steps.slice(from, to), codes: btoa(atob(map.codes).slice(from * rows, to * rows)) };
}

function expert({ layer, expert: number, ...window }) {
  const map = held.layers[layer], [from, to] = inside(map?.steps ?? [], window);
  const rows = map ? atob(map.codes).length / map.steps.length : 0;
  if (from >= to || number >= rows) return null;
  const row = (text) => halves(text, rows, number).slice(from, to);
  return { steps: map.steps.slice(from, to), load: row(map.share), bias: row(map.bias) };
}

/** Start and end of the columns in a window of steps. A column that begins before the window may reach into it. */
function inside(steps, { first = 0, last = Infinity }) {
  const behind = steps.findIndex((step) => step > last);
  return [Math.max(steps.findLastIndex((step) => step <= first), 0), behind < 0 ? steps.length : behind];
}

/** Of float16 numbers, stored column by column with `rows` each, the one at `number` in every column. */
function halves(text, rows, number) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0)), view = new DataView(bytes.buffer);
  return Array.from({ length: bytes.length / 2 / rows }, (_, column) => half(view.getUint16((column * rows + number) * 2, true)));
}

/** A float16 as a number. DataView.getFloat16 is too new for many browsers. */
function half(bits) {
  const power = (bits >> 10) & 31, fraction = (bits & 1023) / 1024;
  return (bits >> 15 ? -1 : 1) * (power ? 2 ** (power - 15) * (1 + fraction) : 2 ** -14 * fraction);
}
