// Goodput, attainment and latencies of the last requests.

import { byId, el, fillTable, key, setText, svg } from "./dom.js";
import { count, duration, percent, plural, rate, seconds } from "./format.js";

const KINDS = [["met", "met all targets", "good"], ["missed", "missed a target", "bad"], ["untargeted", "without targets, or ended by its client", "idle"]];
const HEIGHT = 120;
const NO_CLASS = "none"; // requests without targets

byId("goodput-key").append(...key(KINDS.map(([, name, colour]) => [name, colour])));

const total = (numbers) => numbers.reduce((sum, [, number]) => sum + number, 0);

const byCode = (numbers) => numbers.map(([code, number]) => `${count(number)} ${code}`).join(", ") || "none";

const tile = (name, value, note) => el("div", {}, el("dt", {}, name), el("dd", {}, value, note ? el("small", {}, note) : null));

export const spread = (times, format = seconds) =>
  times === null ? "–" : `${format(times.p50)} / ${format(times.p90)} / ${format(times.p99)}`;

export function attainment(share, wanted) {
  if (share === null) return "–";
  if (wanted == null) return percent(share);
  return el("span", { class: share >= wanted ? "good" : "bad" }, `${percent(share)} ${share >= wanted ? "≥" : "<"} ${percent(wanted)}`);
}

export function showNow(state) {
  const recent = state.recent;
  setText(byId("window"), recent.requests
    ? `Of ${plural(recent.requests, "request")} that ended in the last ${duration(recent.window_s)}.`
    : `No request has ended in the last ${duration(recent.window_s)}.`);
  const failed = Object.entries(recent.outcomes).filter(([outcome]) => outcome !== "stop" && outcome !== "length");
  const refused = Object.entries(state.early_refusals);
  byId("tiles").replaceChildren(
    tile("Goodput", rate(recent.goodput), `of ${rate(recent.rate)} in all`),
    tile("Attainment", recent.counted ? percent(recent.met / recent.counted) : "–", `${count(recent.met)} of ${count(recent.counted)} with targets`),
    tile("TTFT, median", recent.ttft_s ? seconds(recent.ttft_s.p50) : "–", recent.ttft_s ? `p90 ${seconds(recent.ttft_s.p90)}, p99 ${seconds(recent.ttft_s.p99)}` : null),
    tile("Time per token, median", recent.tpot_s ? seconds(recent.tpot_s.p50) : "–", recent.tpot_s ? `p90 ${seconds(recent.tpot_s.p90)}, p99 ${seconds(recent.tpot_s.p99)}` : null),
    tile("In progress", count(state.running + state.queued), `${count(state.queued)} without a first token, ${count(state.held)} wait here`),
    tile("Not complete", count(total(failed)), byCode(failed)),
    ...refused.length ? [tile("Refused at once", count(total(refused)), `since the router's start: ${byCode(refused)}`)] : [],
  );
  byId("goodput-chart").replaceChildren(chart(recent));
  showClasses(state);
}

function chart(recent) {
  const width = byId("goodput-chart").clientWidth || 600;
  const buckets = recent.buckets;
  const most = Math.max(1, ...buckets.map((bucket) => bucket.met + bucket.missed + bucket.untargeted));
  const label = `Ended requests over the last ${duration(recent.window_s)}: ${recent.met} met their targets, ${recent.counted - recent.met} missed one`;
  const root = svg("svg", { width, height: HEIGHT + 20, role: "img", "aria-label": label });
  const step = width / buckets.length;
  buckets.forEach((bucket, index) => {
    let bottom = HEIGHT;
    for (const [field, , colour] of KINDS) {
      const height = ((HEIGHT - 16) * bucket[field]) / most;
      bottom -= height;
      if (height > 0) root.append(svg("rect", { x: index * step + 1, y: bottom, width: step - 2, height, class: `fill-${colour}` }));
    }
  });
  root.append(
    svg("rect", { x: 0, y: HEIGHT, width, height: 1, class: "fill-idle" }),
    svg("text", { x: 0, y: HEIGHT + 15, class: "faint" }, `${duration(recent.window_s)} ago`),
    svg("text", { x: width, y: HEIGHT + 15, class: "faint", "text-anchor": "end" }, "now"),
    svg("text", { x: 0, y: 11, class: "faint" }, `highest bar: ${rate((most * buckets.length) / recent.window_s)}`),
  );
  return root;
}

function showClasses(state) {
  const declared = new Map(state.classes.map((each) => [each.name, each]));
  const rows = state.recent.classes.map((each) => {
    const targets = declared.get(each.name);
    return [
      each.name === NO_CLASS ? "no targets" : each.name,
      count(each.requests),
      rate(each.name === NO_CLASS ? null : each.goodput),
      attainment(each.counted ? each.met / each.counted : null, targets?.attainment),
      targets ? seconds(targets.ttft_s) : "–",
      spread(each.ttft_s),
      targets ? seconds(targets.tpot_s) : "–",
      spread(each.tpot_s),
    ];
  });
  const head = ["SLO class", "Requests", "Goodput", "Attainment", "TTFT target", "TTFT p50 / p90 / p99", "TPOT target", "TPOT p50 / p90 / p99"];
  fillTable(byId("classes"), "By SLO class", head, rows);
}
