"use strict";
// Text from the server only ever becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";
const LINES_MAX = 300, REFRESH_MS = 2000, REFRESH_SOON_MS = 120, RECONNECT_MS = 2000;
const TONES = {
  ready: "good", idle: "good", resume: "good", joined: "good", applied: "good",
  loading: "busy", waking: "busy", draining: "busy", starting: "busy", creating: "busy", sleeping: "busy", stopping: "busy",
  start: "busy", wake: "busy", drain: "busy", degraded: "bad", failed: "bad", lost: "bad",
  asleep: "rest", sleep: "rest", stop: "rest", paused: "rest",
};
const $ = (id) => document.getElementById(id);
let key = sessionStorage.getItem("tidegate-key") || "";
let refreshing = false, again = false, soon = 0, generation = 0;

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function shape(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function colour(name) { // one hue an endpoint, the same on every screen
  let hash = 2166136261;
  for (const char of name) hash = Math.imul(hash ^ char.codePointAt(0), 16777619);
  const hue = ((hash >>> 0) * 137.508) % 360;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  return `hsl(${hue.toFixed(0)} ${dark ? "38% 58%" : "45% 55%"})`;
}

function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit++; }
  return `${bytes >= 100 || unit === 0 ? bytes.toFixed(0) : bytes.toFixed(1)} ${units[unit]}`;
}

const milliseconds = (ms) => ms === null || ms === undefined ? "–" : ms < 10000 ? `${ms} ms` : `${(ms / 1000).toFixed(1)} s`;
const several = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

async function api(path, options = {}) {
  const response = await fetch(`/api/v1/${path}`, { ...options, headers: { authorization: `Bearer ${key}` }, cache: "no-store" });
  if (response.status === 401 || response.status === 403) throw Object.assign(new Error("refused"), { refused: (await response.json()).error.message });
  if (!response.ok) throw new Error(`${response.status}`);
  return response;
}

// --- what is there now -------------------------------------------------------------------------------------------

// A pool is some memory and who holds it: { title, memory_bytes, reserved_bytes, residents }.
function bar(pool) {
  const total = pool.memory_bytes || 1;
  const picture = shape("svg", { class: "bar", viewBox: "0 0 1000 10", preserveAspectRatio: "none", role: "img",
    "aria-label": `${size(pool.reserved_bytes)} of ${size(total)} reserved` });
  let x = 0;
  for (const resident of pool.residents) {
    const width = Math.max(resident.bytes / total * 1000, 4);
    const busy = TONES[resident.state] === "busy";
    picture.append(shape("rect", { x, y: 0, width: Math.max(width - 2, 2), height: 10, fill: colour(resident.endpoint), opacity: busy ? .45 : 1 }));
    x += width;
  }
  return picture;
}

function legend(pool) {
  const rows = pool.residents.map((resident) => make("li", {},
    shape("svg", { viewBox: "0 0 10 10", "aria-hidden": "true" }, shape("rect", { width: 10, height: 10, rx: 2, fill: colour(resident.endpoint) })),
    make("span", { class: "grow", title: resident.replica }, resident.endpoint),
    make("span", { class: "amount" }, `${resident.state} · ${size(resident.bytes)}`)));
  if (!rows.length) rows.push(make("li", { class: "amount" }, "free"));
  return make("ul", { class: "legend" }, ...rows);
}

function hostMemory(node, endpoints) {
  const residents = endpoints.flatMap((endpoint) => endpoint.replicas
    .filter((replica) => replica.node === node.id && replica.state === "asleep")
    .map((replica) => ({ replica: replica.id, endpoint: endpoint.name, state: replica.state, bytes: replica.host_bytes })));
  return { title: "host memory", memory_bytes: node.host_memory_bytes, reserved_bytes: node.host_reserved_bytes, residents };
}

function showNodes(nodes, endpoints) {
  const pools = (node) => [...node.accelerators.map((a) => ({ title: a.id, ...a })), hostMemory(node, endpoints)];
  const cards = nodes.flatMap((node) => pools(node).map((pool) => make("div", { class: "card" },
    make("h3", {}, `${nodes.length > 1 ? `${node.id} / ` : ""}${pool.title}`,
      make("span", {}, `${size(pool.reserved_bytes)} of ${size(pool.memory_bytes)}`)),
    bar(pool), legend(pool))));
  $("accelerators").replaceChildren(...(cards.length ? cards : [make("p", { class: "empty" }, "No node has joined.")]));
}

function showEndpoints(endpoints) {
  const rows = endpoints.map((endpoint) => make("tr", {},
    make("td", { class: "mono" }, endpoint.name),
    make("td", {}, make("span", { class: "state", "data-tone": TONES[endpoint.state] || "" }, endpoint.state)),
    make("td", {}, endpoint.tier),
    make("td", {}, endpoint.mode.replace("_", " ")),
    make("td", { class: "number" }, String(endpoint.queued)),
    make("td", { class: "number" }, String(endpoint.in_flight)),
    make("td", { class: "number" }, String(endpoint.activations)),
    make("td", { class: "number" }, milliseconds(endpoint.activation_ms_last)),
    make("td", {}, endpoint.reason)));
  if (!rows.length) rows.push(make("tr", {}, make("td", { colspan: "9", class: "empty" }, "No endpoints yet: tidegate endpoints create TENANT/NAME --model DIR")));
  $("endpoints").replaceChildren(...rows);
}

async function refresh() {
  if (refreshing) { again = true; return; }
  refreshing = true;
  try {
    const [nodes, endpoints] = await Promise.all([api("nodes").then((r) => r.json()), api("endpoints").then((r) => r.json())]);
    showNodes(nodes.data, endpoints.data);
    showEndpoints(endpoints.data);
    const accelerators = nodes.data.reduce((sum, node) => sum + node.accelerators.length, 0);
    const ready = endpoints.data.filter((e) => TONES[e.state] === "good").length;
    $("summary").textContent = `${several(endpoints.data.length, "endpoint")} (${ready} ready) on ${several(accelerators, "accelerator")}, ${several(nodes.data.length, "node")}`;
  } catch (error) {
    if (error.refused) leave(error.refused);
    else $("summary").textContent = "The control plane does not answer; trying again.";
  } finally {
    refreshing = false;
    if (again) { again = false; refreshSoon(); }
  }
}

function refreshSoon() {
  if (!soon && key) soon = setTimeout(() => { soon = 0; refresh(); }, REFRESH_SOON_MS);
}

// --- what happens ------------------------------------------------------------------------------------------------

function line(activity) {
  const at = new Date(activity.at_ms);
  const word = activity.kind === "state" ? activity.reason.split("→ ")[1]?.split(":")[0] : activity.kind;
  return make("li", {},
    make("time", { datetime: at.toISOString() }, at.toLocaleTimeString([], { hour12: false }) + "." + String(at.getMilliseconds()).padStart(3, "0")),
    make("span", { class: "kind", "data-tone": TONES[word] || "", title: activity.actor }, activity.kind),
    make("span", { class: "mono" }, activity.subject),
    make("span", { class: "reason" }, activity.reason));
}

async function follow(mine) {
  while (key && mine === generation) {
    try {
      const response = await api("activity/stream");
      const past = await (await api("activity?limit=100")).json();
      $("activity").replaceChildren(...past.data.map(line));
      const shown = new Set(past.data.map((activity) => JSON.stringify(activity))); // what the stream will repeat
      $("link").dataset.state = "on";
      $("link").textContent = "live";
      refreshSoon();
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done || mine !== generation) { reader.cancel(); break; }
        const events = (text + value).split("\n\n");
        text = events.pop();
        for (const event of events) {
          if (!event.startsWith("data: ")) continue;
          const activity = JSON.parse(event.slice(6));
          if (shown.delete(JSON.stringify(activity))) continue;
          $("activity").prepend(line(activity));
          while ($("activity").childElementCount > LINES_MAX) $("activity").lastElementChild.remove();
          refreshSoon();
        }
      }
    } catch (error) {
      if (error.refused) { leave(error.refused); return; }
    }
    $("link").dataset.state = "off";
    $("link").textContent = "offline";
    await new Promise((resume) => setTimeout(resume, RECONNECT_MS));
  }
}

// --- the door ----------------------------------------------------------------------------------------------------

function enter() {
  $("entrance").hidden = true;
  for (const id of ["main", "forget", "link"]) $(id).hidden = false;
  refresh();
  follow(++generation);
}

function leave(why) {
  key = "";
  generation++;
  sessionStorage.removeItem("tidegate-key");
  for (const id of ["main", "forget", "link"]) $(id).hidden = true;
  $("entrance").hidden = false;
  $("refused").textContent = why || "";
  $("summary").textContent = "";
  $("link").dataset.state = "off";
  $("link").textContent = "offline";
}

document.addEventListener("DOMContentLoaded", () => {
  $("entrance").addEventListener("submit", (event) => {
    event.preventDefault();
    key = $("key").value.trim();
    $("key").value = "";
    sessionStorage.setItem("tidegate-key", key);
    enter();
  });
  $("forget").addEventListener("click", () => leave(""));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refreshSoon);
  setInterval(() => { if (key && !document.hidden) refresh(); }, REFRESH_MS);
  if (key) enter(); else leave("");
});
