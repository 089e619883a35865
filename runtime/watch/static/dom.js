// Elements made of text that may come from anybody: nothing here, or anywhere on the page, reads text as markup.

/** An element. Attributes named `on…` listen; `text` is its text; null and false leave an attribute or a child out. */
export function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

/** An element of a drawing. */
export function svg(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Text where it has changed: a screen reader would say it again, and a selection in it would be lost. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A label, a value in large print and a note. verdict: good, bad, warn or "". */
export function card(label, value, note = "", verdict = "") {
  return el("div", { class: `card ${verdict}` },
    el("div", { class: "label", text: label }),
    el("div", { class: "value", text: value }),
    note && el("p", { class: "note", text: note }));
}

/** A table that scrolls by itself where it is wider than the page. rows: lists of texts or elements. */
export function table(label, head, rows, attributes = {}) {
  const cell = (content) => (content instanceof Element && content.tagName === "TD" ? content : el("td", {}, content));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label },
    el("table", attributes,
      el("thead", {}, el("tr", {}, ...head.map((text) => el("th", { scope: "col", text })))),
      el("tbody", {}, ...rows.map((row) => el("tr", {}, ...row.map(cell))))));
}

/** Colours of the page as it is shown now, light or dark. */
export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
