// The ways of the last requests: router -> prefill or colocated instance -> decode instance.

import { byId, el, fillTable, svg } from "./dom.js";
import { bytes, count, seconds } from "./format.js";

const ROUTER = "router";
const MAX_IN_COLUMN = 8;
const NODE_HEIGHT = 38;
const GAP = 14;
const WIDEST_LINE = 16;
const SHORTEST_LINE = 28;
const CHAR_WIDTH = 7.2;

export function showFlow(state) {
  const roles = new Map(state.instances.map((instance) => [instance.id, instance.role]));
  const flows = state.recent.flows;
  byId("flow-chart").replaceChildren(flows.length ? chart(flows, roles) : el("p", { class: "soft" }, "no requests yet"));
  fillTable(byId("flow-table"), "", ["From", "To", "Requests", "KV", "Transport", "Mean transfer"], flows.map((flow) => [
    flow.source, flow.target, count(flow.requests),
    flow.transfer_bytes ? bytes(flow.transfer_bytes) : "–",
    flow.transports.join(", ") || "–",
    flow.transports.length ? seconds(flow.transfer_s / flow.requests) : "–",
  ]));
}

// Columns of nodes, the busiest first; what does not fit is one node.
function columns(flows) {
  const first = new Map();
  const second = new Map();
  for (const { source, target, requests } of flows) {
    const column = source === ROUTER ? first : second;
    column.set(target, (column.get(target) ?? 0) + requests);
  }
  return [first, second].map((column) => {
    const nodes = [...column].map(([id, requests]) => ({ id, name: id, requests })).sort((one, other) => one.id.localeCompare(other.id, "en", { numeric: true }));
    if (nodes.length <= MAX_IN_COLUMN) return nodes;
    const busiest = [...nodes].sort((one, other) => other.requests - one.requests);
    const shown = new Set(busiest.slice(0, MAX_IN_COLUMN - 1));
    const others = busiest.slice(MAX_IN_COLUMN - 1);
    const rest = { id: null, ids: new Set(others.map((node) => node.id)), name: `${others.length} more`, requests: others.reduce((sum, node) => sum + node.requests, 0) };
    return [...nodes.filter((node) => shown.has(node)), rest];
  });
}

function chart(flows, roles) {
  const width = Math.max(300, byId("flow-chart").clientWidth);
  const [first, second] = columns(flows);
  const levels = [[{ id: ROUTER, name: ROUTER, requests: first.reduce((sum, node) => sum + node.requests, 0) }], first, ...(second.length ? [second] : [])];
  const nodeWidth = Math.min(220, (width - SHORTEST_LINE * (levels.length - 1)) / levels.length);
  const height = Math.max(...levels.map((level) => level.length)) * (NODE_HEIGHT + GAP);
  levels.forEach((level, depth) => level.forEach((node, index) => {
    node.x = levels.length === 1 ? 0 : (depth * (width - nodeWidth - 2)) / (levels.length - 1) + 1;
    node.y = ((index + 0.5) * height) / level.length - NODE_HEIGHT / 2;
  }));
  const find = (level, id) => level.find((node) => node.id === id || node.ids?.has(id));
  const lines = new Map();
  for (const flow of flows) {
    const isFirst = flow.source === ROUTER;
    const source = isFirst ? levels[0][0] : find(first, flow.source);
    const target = find(isFirst ? first : second, flow.target);
    if (source === undefined || target === undefined) continue;
    const id = `${levels.flat().indexOf(source)} ${levels.flat().indexOf(target)}`;
    const line = lines.get(id) ?? { source, target, requests: 0 };
    line.requests += flow.requests;
    lines.set(id, line);
  }
  const most = Math.max(...[...lines.values()].map((line) => line.requests));
  const root = svg("svg", { width, height, role: "img", "aria-label": "Flow of requests between instances; the table below has the numbers" });
  for (const { source, target, requests } of lines.values()) {
    const [x1, y1, x2, y2] = [source.x + nodeWidth, source.y + NODE_HEIGHT / 2, target.x, target.y + NODE_HEIGHT / 2];
    const middle = (x1 + x2) / 2;
    const line = svg("path", { d: `M${x1} ${y1}C${middle} ${y1} ${middle} ${y2} ${x2} ${y2}`, class: `line fill-${roles.get(target.id) ?? "idle"}`, "stroke-width": Math.max(1, (WIDEST_LINE * requests) / most), fill: "none" });
    line.append(svg("title", {}, `${source.name} to ${target.name}: ${count(requests)}`));
    root.append(line);
  }
  for (const node of levels.flat()) root.append(box(node, nodeWidth, roles));
  return root;
}

function box(node, width, roles) {
  const chars = Math.floor((width - 16) / CHAR_WIDTH);
  const name = node.name.length > chars ? `${node.name.slice(0, chars - 1)}…` : node.name;
  const gone = node.id !== null && node.id !== ROUTER && !roles.has(node.id) ? ", gone" : "";
  return svg("g", {},
    svg("title", {}, node.name),
    svg("rect", { x: node.x, y: node.y, width, height: NODE_HEIGHT, rx: 8, class: `node fill-${roles.get(node.id) ?? "idle"}` }),
    svg("text", { x: node.x + 8, y: node.y + 16 }, name),
    svg("text", { x: node.x + 8, y: node.y + 31, class: "faint" }, `${count(node.requests)}${gone}`));
}
