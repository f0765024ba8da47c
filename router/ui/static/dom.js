// Elements made from values. Text is always set as text: nothing here interprets a string as HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, String(value));
  }
  element.append(...children.filter((child) => child != null).map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

export const el = (tag, attributes = {}, ...children) => fill(document.createElement(tag), attributes, children);

export const svg = (tag, attributes = {}, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);

export const byId = (id) => document.getElementById(id);

// Replaces the text only where it differs, so that a screen reader does not read it again.
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// `head` are column titles, `rows` lists of cells, the first of which names the row.
export function fillTable(table, caption, head, rows) {
  const titles = head.map((title) => el("th", { scope: "col" }, title));
  const lines = rows.map(([name, ...cells]) =>
    el("tr", {}, el("th", { scope: "row" }, name), ...cells.map((cell) => el("td", {}, cell))));
  table.replaceChildren(...(caption ? [el("caption", {}, caption)] : []),
    el("thead", {}, el("tr", {}, ...titles)), el("tbody", {}, ...lines));
}

// `parts`: [{name, value, colour}]; lengths are shares of `total`.
export function bar(parts, total, label, isTall = false) {
  const element = el("div", { class: isTall ? "bar tall" : "bar", role: "img", "aria-label": label, title: label });
  for (const part of parts) {
    if (part.value > 0 && total > 0) {
      const piece = el("i", { class: `fill-${part.colour}` });
      piece.style.width = `${(100 * part.value) / total}%`;
      element.append(piece);
    }
  }
  return element;
}

export const key = (entries) => entries.map(([name, colour]) => el("span", {}, el("i", { class: `fill-${colour}` }), name));
