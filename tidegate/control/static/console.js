// The console: reads the same REST API as everybody, with the administrator's key, and shows it.

import { $, TONES, dollars, lasting, make, several, share } from "./parts.js";
import { concern, listen, showEndpoints } from "./endpoints.js";
import { showBounds } from "./details.js";
import { showMoney, today } from "./money.js";
import { showNodes } from "./fleet.js";

const LINES_MAX = 300, REFRESH_MS = 2000, REFRESH_SOON_MS = 120, RECONNECT_MS = 2000, ACCOUNTS_MS = 15000;
let key = sessionStorage.getItem("tidegate-key") || "";
let refreshing = false, again = false, soon = 0, generation = 0, limits = [];

async function api(path, options = {}) {
  const response = await fetch(`/api/v1/${path}`, { ...options, headers: { authorization: `Bearer ${key}` }, cache: "no-store" });
  if (response.status === 401 || response.status === 403) throw Object.assign(new Error("refused"), { refused: (await response.json()).error.message });
  if (!response.ok) throw Object.assign(new Error(`${path.split("?")[0]} answered ${response.status}`), { status: response.status });
  return response;
}

const read = async (path) => (await api(path)).json();

// --- what is there now -------------------------------------------------------------------------------------------

function glance(name, value, note, tone) {
  $(name).textContent = value;
  $(name).dataset.tone = tone || "";
  $(`${name}-note`).textContent = note;
}

// An adapter's requests are served, and counted at once, by its base.
function showGlance(endpoints) {
  const sum = (of) => endpoints.filter((e) => !e.base).reduce((total, e) => total + of(e), 0);
  const good = endpoints.filter((e) => TONES[e.state] === "good").length, worried = endpoints.filter(concern).length;
  glance("g-endpoints", `${good} of ${endpoints.length}`, "endpoints ready");
  glance("g-concerned", String(worried), worried === 1 ? "needs attention" : "need attention", worried ? "bad" : "");
  const queued = sum((e) => e.queued);
  glance("g-requests", String(sum((e) => e.in_flight)), `in flight, ${queued} queued`, queued ? "busy" : "");
  const hours = endpoints.map((e) => e.slo_status["1h"]).filter((slo) => slo?.requests);
  const requests = hours.reduce((total, slo) => total + slo.requests, 0);
  const kept = hours.reduce((total, slo) => total + slo.requests * slo.attainment, 0);
  glance("g-slo", requests ? share(kept / requests) : "–", "SLO kept in the last hour");
}

async function refresh() {
  if (refreshing) { again = true; return; }
  refreshing = true;
  try {
    const [nodes, endpoints] = await Promise.all([read("nodes"), read("endpoints")]);
    showNodes(nodes.data, endpoints.data);
    showEndpoints(endpoints.data, limits);
    showGlance(endpoints.data);
    const accelerators = nodes.data.reduce((total, node) => total + node.accelerators.length, 0);
    $("summary").textContent = `${several(accelerators, "accelerator")} on ${several(nodes.data.length, "node")}`;
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

// Money moves slowly and is dear to add up: read seldom, one round at a time.
async function followAccounts(mine) {
  while (key && mine === generation) {
    if (!document.hidden) await accounts();
    await new Promise((resume) => setTimeout(resume, ACCOUNTS_MS));
  }
}

async function accounts() {
  try {
    const since = `from=${today()}`;
    const none = (error) => { if (error.status === 404) return { data: [] }; throw error; }; // a platform without contracts
    const [bounds, limited, usage, time, contracts] = await Promise.all([read("activation-bounds"), read("limits"), read(`usage?by=endpoint&${since}`), read(`usage/time?${since}`), read("contracts").catch(none)]);
    limits = limited.data;
    showBounds(bounds.data);
    const total = showMoney(usage, time, contracts.data);
    glance("g-money", dollars(total.charged + total.drawn), `today; dedicated ${dollars(total.dedicated)}`);
    glance("g-lent", lasting(total.lent_ms), "accelerator time lent today");
    $("money-note").textContent = "";
  } catch (error) {
    if (error.refused) leave(error.refused);
    else $("money-note").textContent = `Money is not up to date (${error.message}); trying again.`;
  }
}

// --- what happens ------------------------------------------------------------------------------------------------

function line(activity) {
  const at = new Date(activity.at_ms);
  const word = activity.kind === "state" ? activity.reason.split("→ ").pop().split(":")[0] : activity.kind;
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
      const past = await read("activity?limit=100");
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
  for (const id of ["main", "parts", "forget", "link"]) $(id).hidden = false;
  refresh();
  follow(++generation);
  followAccounts(generation);
}

function leave(why) {
  key = "";
  generation++;
  sessionStorage.removeItem("tidegate-key");
  for (const id of ["main", "parts", "forget", "link"]) $(id).hidden = true;
  $("entrance").hidden = false;
  $("refused").textContent = why || "";
  $("summary").textContent = "";
  $("link").dataset.state = "off";
  $("link").textContent = "offline";
}

listen();
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
