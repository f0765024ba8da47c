// Means of the parts of requests' time, before and after the first token.

import { bar, byId, el, fillTable, key } from "./dom.js";
import { percent, seconds } from "./format.js";
import { BEFORE_FIRST_TOKEN, PARTS, partsOf, sum } from "./timeline.js";

export function showParts(state) {
  const values = state.recent.parts_s;
  const halves = [["Before the first token", PARTS.slice(0, BEFORE_FIRST_TOKEN)], ["After it", PARTS.slice(BEFORE_FIRST_TOKEN)]];
  const shown = halves.flatMap(([title, names]) => {
    const parts = partsOf(values, names);
    const total = sum(parts);
    if (!parts.length) return [];
    const table = el("table");
    fillTable(table, "", parts.map((part) => part.name), []);
    const label = `${title}: ${parts.map((part) => `${part.name} ${seconds(part.value)}`).join(", ")}`;
    table.tBodies[0].append(el("tr", {}, ...parts.map((part) => el("td", {}, `${seconds(part.value)} (${percent(part.value / total)})`))));
    return [
      el("h3", {}, `${title}: ${seconds(total)}`),
      bar(parts, total, label, true),
      el("div", { class: "key" }, ...key(parts.map((part) => [part.name, part.colour]))),
      el("div", { class: "scroll" }, table),
    ];
  });
  byId("parts").replaceChildren(...(shown.length ? shown : [el("p", { class: "soft" }, "no complete request yet")]));
}
