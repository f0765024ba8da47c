// The last requests: a line each, with a bar of its time; a line opens to the explanation of the router's decisions.

import { read } from "./api.js";
import { bar, byId, el, key, setText } from "./dom.js";
import { duration, seconds } from "./format.js";
import { PARTS, partsOf, sum } from "./timeline.js";

const COMPLETE = new Set(["stop", "length"]);
const CANCELLED = "cancelled"; // by its client: neither good nor bad
const lines = new Map(); // request id -> {element, ago, isBad}
let longest_s = 1;

byId("parts-key").append(...key(PARTS.map(([, name, colour]) => [name, colour])));
byId("only-bad").addEventListener("change", filter);

export function showRequests(state) {
  const ids = new Set(state.latest.map((request) => request.request_id));
  for (const [id, line] of lines) {
    if (!ids.has(id) && !line.isOpen()) {
      line.element.remove();
      lines.delete(id);
    }
  }
  longest_s = Math.max(1e-3, ...state.latest.map((request) => request.total_s));
  for (const request of [...state.latest].reverse()) {
    if (!lines.has(request.request_id)) {
      const line = makeLine(request);
      lines.set(request.request_id, line);
      byId("request-list").prepend(line.element);
    }
    const line = lines.get(request.request_id);
    setText(line.ago, `${duration(request.ended_ago_s)} ago`);
    line.bar.style.width = `${Math.max(2, (100 * request.total_s) / longest_s)}%`;
  }
  byId("no-requests").hidden = lines.size > 0;
  filter();
}

function filter() {
  const onlyBad = byId("only-bad").checked;
  for (const line of lines.values()) line.element.hidden = onlyBad && !line.isBad;
}

function makeLine(request) {
  const isComplete = COMPLETE.has(request.outcome);
  const missed = request.missed_targets ?? [];
  const isBad = (!isComplete && request.outcome !== CANCELLED) || missed.length > 0;
  const parts = partsOf(request.parts);
  const label = `time: ${parts.map((part) => `${part.name} ${seconds(part.value)}`).join(", ")}`;
  const timeBar = bar(parts, sum(parts), label);
  const ago = el("span", { class: "soft" });
  const details = el("pre", { id: `explanation-${lines.size}-${Date.now()}`, hidden: true, tabindex: 0 });
  const button = el("button", { type: "button", "aria-expanded": "false", "aria-controls": details.id },
    el("span", { class: "id", title: request.request_id }, request.request_id),
    el("span", { class: isBad ? "bad" : isComplete ? "good" : "soft" }, missed.length && isComplete ? `late (${missed.join(", ")})` : request.outcome),
    el("span", {}, `${request.prompt_tokens} + ${request.output_tokens} tokens`),
    el("span", {}, `TTFT ${seconds(request.ttft_s)}`),
    el("span", {}, `TPOT ${seconds(request.tpot_s)}`),
    ago, timeBar);
  button.addEventListener("click", () => toggle(request, button, details));
  return { element: el("li", {}, button, details), ago, bar: timeBar, isBad, isOpen: () => !details.hidden };
}

async function toggle(request, button, details) {
  const willOpen = details.hidden;
  details.hidden = !willOpen;
  button.setAttribute("aria-expanded", String(willOpen));
  if (!willOpen || details.textContent) return;
  try {
    const answer = await read(`ui/requests?id=${encodeURIComponent(request.request_id)}`);
    details.textContent = answer.text;
  } catch (error) {
    details.textContent = error.message;
  }
}
