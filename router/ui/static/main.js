// Reads the router's state every two seconds while somebody looks, and gives it to the sections of the page.

import { KeyNeeded, hasKey, read, setKey } from "./api.js";
import { byId, setText } from "./dom.js";
import { duration, plural } from "./format.js";
import { showFlow } from "./flow.js";
import { showInstances } from "./instances.js";
import { showNow } from "./now.js";
import { showPlan } from "./plan.js";
import { showRequests } from "./requests.js";
import { showParts } from "./parts.js";
import "./try.js";

const PERIOD_MS = 2000;
const SECTIONS = [showNow, showFlow, showInstances, showParts, showPlan, showRequests];

let isPaused = false;
let timer = null;
let lastAnswer = null;
let state = null;

function show() {
  if (state === null) return;
  for (const section of SECTIONS) section(state);
}

function connected() {
  lastAnswer = Date.now();
  document.body.classList.remove("stale");
  byId("connection").classList.remove("lost");
  byId("key-form").hidden = true;
  setText(byId("model"), state.model);
  document.title = `${state.model} · Tandem`;
  const usable = state.roles.map((role) => role.usable).reduce((one, other) => one + other, 0);
  const all = state.roles.map((role) => role.instances).reduce((one, other) => one + other, 0);
  const ready = usable === all ? plural(all, "instance") : `${usable} of ${plural(all, "instance")} ready`;
  setText(byId("connection"), `${isPaused ? "paused" : "live"}: ${ready}, up ${duration(state.uptime_s)}`);
}

function disconnected(error) {
  document.body.classList.add("stale");
  byId("connection").classList.add("lost");
  const since = lastAnswer === null ? "" : ` The last answer is ${duration((Date.now() - lastAnswer) / 1000)} old.`;
  setText(byId("connection"), `No answer from the router.${since}`);
  console.warn(error);
}

function askForKey(error) {
  document.body.classList.add("stale");
  setText(byId("connection"), "an API key is needed");
  setText(byId("key-error"), hasKey() ? error.message : "");
  if (byId("key-form").hidden) {
    byId("key-form").hidden = false;
    byId("key").focus();
  }
}

async function look() {
  const [cluster, latest] = await Promise.all([read("ui/state"), read("ui/requests")]);
  state = { ...cluster, latest };
}

async function update() {
  clearTimeout(timer);
  let failure = null;
  try {
    await look();
  } catch (error) {
    failure = error;
  }
  clearTimeout(timer); // of another update, which was begun meanwhile
  if (failure instanceof KeyNeeded) return askForKey(failure);
  if (!isPaused && !document.hidden) timer = setTimeout(update, PERIOD_MS);
  if (failure !== null) return disconnected(failure);
  connected();
  show();
}

byId("pause").addEventListener("click", () => {
  isPaused = !isPaused;
  byId("pause").setAttribute("aria-pressed", String(isPaused));
  if (isPaused) {
    clearTimeout(timer);
    if (state !== null) connected();
  } else update();
});

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(byId("key").value.trim());
  byId("key").value = "";
  update();
});

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (!document.hidden && !isPaused) update();
});

let resizing = null;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(show, 150);
});

update();
