// What the plan expects beside what is measured, and whether the plan still fits the requests.

import { byId, el, fillTable } from "./dom.js";
import { percent, rate, seconds } from "./format.js";

const DRIFT = { rate: "requests/s", prompt_tokens: "prompt tokens", output_tokens: "output tokens", cached_share: "cached share" };

export function showPlan(state) {
  const { plan, replan } = state;
  const content = byId("plan-content");
  if (plan === null) {
    content.replaceChildren(el("p", { class: "soft" }, "This cluster serves no plan, or nobody has told it to this router (router.plan)."));
    return;
  }
  content.replaceChildren(
    el("p", {}, plan.summary || plan.verdict),
    el("div", { class: "scroll" }, groupsTable(plan, state)),
    ...(plan.expected ? [el("div", { class: "scroll" }, expectedTable(plan.expected, state))] : [el("p", { class: "soft" }, "The plan says nothing of what to expect.")]),
    ...(replan ? replanParts(replan) : []),
  );
}

function groupsTable(plan, state) {
  const table = el("table");
  const planned = new Map();
  for (const group of plan.groups) planned.set(group.role, [...(planned.get(group.role) ?? []), group]);
  const rows = [...planned].map(([role, groups]) => {
    const number = groups.reduce((sum, group) => sum + group.instances, 0);
    const actual = state.roles.find((each) => each.role === role);
    const text = groups.map((group) => `${group.instances} × ${group.shape} on ${group.device}`).join(", ");
    return [role, text, el("span", { class: actual.usable < number ? "bad" : "good" }, `${actual.usable} ready`)];
  });
  fillTable(table, "Instances", ["Role", "Planned", "Now"], rows);
  return table;
}

function expectedTable(expected, state) {
  const table = el("table");
  const recent = state.recent;
  const rows = [["requests per second", rate(expected.rate), rate(recent.rate)],
    ["goodput", `at most ${rate(expected.goodput)} (${expected.goodput_ci.map(rate).join(" to ")})`, rate(recent.goodput)]];
  for (const each of expected.classes) {
    const live = recent.classes.find((found) => found.name === each.name);
    const share = live && live.counted ? live.met / live.counted : null;
    rows.push(
      [`${each.name}: attainment (target ${percent(each.attainment)})`, percent(each.expected_attainment), percent(share)],
      [`${each.name}: TTFT p50 / p90`, pair(each.expected_ttft_s), pair(live?.ttft_s)],
      [`${each.name}: time per token p50 / p90`, pair(each.expected_tpot_s), pair(live?.tpot_s)],
    );
  }
  fillTable(table, `Expected at ${rate(expected.rate)}, and measured in the last minute`, ["", "Plan", "Measured"], rows);
  return table;
}

const pair = (times) => (times ? `${seconds(times.p50)} / ${seconds(times.p90)}` : "–");

function replanParts(replan) {
  const parts = [el("h3", {}, `Does it still fit? ${replan.state}`), el("p", {}, replan.note)];
  if (replan.changes.length) {
    const table = el("table");
    fillTable(table, "Requests", ["", "Planned", "Live", "Strength (from 1 on it matters)"], replan.changes.map((change) => [
      DRIFT[change.name] ?? change.name, change.planned.toPrecision(4), change.live.toPrecision(4), change.strength.toFixed(2)]));
    parts.push(el("div", { class: "scroll" }, table));
  }
  if (replan.proposal) {
    parts.push(el("p", {}, `Another plan would gain ${percent(replan.proposal.gain)}: ${replan.proposal.summary}`),
      el("ul", {}, ...replan.proposal.changes.map((change) => el("li", {}, change))));
  }
  return parts;
}
