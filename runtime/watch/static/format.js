// Numbers as people read them, as in runtime/terminal/quantities.py.

const isNumber = (value) => typeof value === "number" && Number.isFinite(value);

/** At least three digits, at most four decimals. */
export function digits(value) {
  if (!isNumber(value)) return "n/a";
  if (value === 0) return "0";
  if (Math.abs(value) < 0.0005 || Math.abs(value) >= 1e7) return value.toExponential(2);
  const decimals = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(Number(value.toPrecision(3))))));
  return value.toFixed(Math.min(decimals, 4));
}

/** Three digits with k, M or G. */
export function short(value) {
  if (!isNumber(value)) return "n/a";
  for (const [limit, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= limit * 0.9995) return digits(value / limit) + unit;
  }
  return digits(value);
}

/** Hours, minutes and seconds. */
export function duration(seconds) {
  if (!isNumber(seconds)) return "-:--";
  const whole = Math.round(seconds);
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60].map((n) => String(n));
  const days = Math.floor(Number(h) / 24);
  if (days) return `${days} d ${Number(h) % 24} h`;
  return Number(h) ? `${h}:${m.padStart(2, "0")}:${s.padStart(2, "0")}` : `${m}:${s.padStart(2, "0")}`;
}

/** A short time. */
export function milliseconds(seconds) {
  if (!isNumber(seconds)) return "n/a";
  return seconds >= 1 ? `${digits(seconds)} s` : `${digits(seconds * 1e3)} ms`;
}

export function percent(share) {
  if (!isNumber(share)) return "n/a";
  return `${(share * 100).toFixed(share >= 0.01 ? 1 : 2)} %`;
}

export function bytes(value) {
  if (!isNumber(value)) return "n/a";
  for (const [power, unit] of [[40, "TiB"], [30, "GiB"], [20, "MiB"], [10, "KiB"]]) {
    if (value >= 2 ** power * 0.9995) return `${digits(value / 2 ** power)} ${unit}`;
  }
  return `${digits(value)} B`;
}

/** 1 failure, 2 failures. */
export const counted = (number, one, many = `${one}s`) => `${count(number)} ${number === 1 ? one : many}`;
export const count = (value) => (isNumber(value) ? value.toLocaleString("en") : "n/a");
export const when = (seconds) => new Date(seconds * 1e3).toLocaleString("sv").slice(0, 19);
/** A setting as config.yaml has it. */
export const setting = (value) => (value === undefined ? "" : value === null ? "not set" : typeof value === "string" ? value : JSON.stringify(value));
