// Instances by role, with their load and KV memory.

import { bar, byId, el, key } from "./dom.js";
import { count, percent, plural, seconds } from "./format.js";

const OWNERS = [["running", "running", "colocated"], ["leased", "held for decode", "mixed"], ["cached", "cached prefixes", "sky"], ["leaked", "leaked", "bad"]];
const ROLE_NAMES = { prefill: "Prefill", decode: "Decode", colocated: "Colocated" };

byId("kv-key").append(...key([...OWNERS.map(([, name, colour]) => [name, colour]), ["free", "rule"]]));

let earlier = new Map(); // totals of the last look, by instance

export function showInstances(state) {
  const groups = state.roles.filter((role) => role.instances > 0).map((role) => {
    const shown = state.instances.filter((instance) => instance.role === role.role);
    const hidden = role.instances - shown.length;
    const ready = role.usable === role.instances ? "" : `, ${role.usable} ready`;
    return el("div", {},
      el("h3", {}, `${ROLE_NAMES[role.role] ?? role.role} (${role.instances}${ready}): ${kvText(role.blocks)}`),
      el("ul", { class: "cards" }, ...shown.map(card)),
      hidden > 0 ? el("p", { class: "soft" }, `and ${hidden} more that are less busy`) : null);
  });
  byId("instance-cards").replaceChildren(...(groups.length ? groups : [el("p", { class: "soft" }, "no instance has reported yet")]));
  earlier = new Map(state.instances.map((instance) => [instance.id, { steps: instance.steps, step_s: instance.step_s, mean: meanStep(instance) }]));
}

const kvText = (blocks) => `KV memory ${percent((blocks.total - blocks.free - blocks.cached) / blocks.total)} in use`;

// Of the steps since the last look; without any, as before.
function meanStep(instance) {
  const before = earlier.get(instance.id) ?? { steps: 0, step_s: 0, mean: null };
  const steps = instance.steps - before.steps;
  return steps > 0 ? (instance.step_s - before.step_s) / steps : before.mean;
}

function card(instance) {
  const blocks = instance.blocks;
  const parts = OWNERS.map(([owner, name, colour]) => ({ name, colour, value: blocks[owner] }));
  const owned = parts.filter((part) => part.value > 0).map((part) => `${count(part.value)} ${part.name}`).join(", ") || "all free";
  const troubles = [];
  if (blocks.leaked) troubles.push(`${count(blocks.leaked)} blocks leaked`);
  if (instance.failed_transfers) troubles.push(plural(instance.failed_transfers, "failed transfer"));
  if (instance.preemptions) troubles.push(plural(instance.preemptions, "preemption"));
  const isUsable = instance.is_usable;
  const stateText = isUsable || instance.state !== "ready" ? instance.state : "not connected";
  return el("li", { class: instance.role },
    el("div", { class: "name" }, el("span", {}, instance.id), el("span", { class: isUsable ? "good" : "bad" }, stateText)),
    el("div", {}, `${count(instance.running)} running, ${count(instance.waiting)} waiting (${plural(instance.waiting_tokens, "token")})`),
    bar(parts, blocks.total, `KV blocks: ${owned}, of ${count(blocks.total)}`),
    el("div", { class: "soft" }, `${owned}, of ${count(blocks.total)} blocks of ${instance.block_tokens} tokens`),
    el("div", { class: "soft" }, `step ${seconds(meanStep(instance))}, ${count(instance.computed_tokens)} tokens computed`),
    troubles.length ? el("div", { class: blocks.leaked ? "bad" : "soft" }, troubles.join(", ")) : null);
}
