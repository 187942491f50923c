// The endpoints' table: one row an endpoint, adapters under their base; a row opens its details.

import { $, NOTHING, TONES, gauge, make, milliseconds, plain, settle, several, share, state } from "./parts.js";
import { details } from "./details.js";

const FOLDED_ABOVE = 8; // adapters of one base; more are folded away until asked for
const TIERS = ["accelerator", "host", "disk", "remote"];
const opened = new Set(), unfolded = new Map();
let shown = { endpoints: [], limits: [] };

// Why somebody should look at this endpoint; empty when nobody need.
export function concern(endpoint) {
  if (TONES[endpoint.state] === "bad") return endpoint.reason || endpoint.state;
  if (endpoint.canary && TONES[endpoint.canary.state] === "bad") return `canary: ${endpoint.canary.reason || endpoint.canary.state}`;
  const budget = endpoint.slo_status["1h"]?.error_budget;
  return typeof budget === "number" && budget < 0 ? "error budget overdrawn in 1 h" : "";
}

// The bound that its next activation falls under, and the tier it counts from: where its weights are, or else from the tier it would go to.
function bound(endpoint) {
  const from = TIERS.slice(TIERS.indexOf(endpoint.tier)).find((tier) => endpoint.activation_bounds[tier]);
  return [from, endpoint.activation_bounds[from]];
}

function budget(slo) {
  const left = slo?.error_budget;
  if (left === null || left === undefined) return [NOTHING];
  const tone = left < 0 ? "bad" : left < 0.25 ? "busy" : "good";
  const title = left < 0 ? `${(1 - left).toFixed(1)} times the misses that the SLO allows` : "of the misses that the SLO allows";
  return [make("span", { class: "budget", title }, gauge(left < 0 ? 1 : left, tone), left < 0 ? "overdrawn" : share(left))];
}

const cell = (label, kind, ...children) =>
  make("td", { class: kind, "data-label": label, "data-empty": children.every((c) => c === NOTHING || c === "") ? "" : null }, ...children);

function nameCell(endpoint, adapters, isOpen, isUnfolded) {
  const toggle = make("button", { type: "button", class: "open", "data-focus": `open ${endpoint.name}`, "aria-expanded": isOpen, title: endpoint.name }, endpoint.name);
  const fold = adapters ? make("button", { type: "button", class: "fold", "data-focus": `fold ${endpoint.name}`, "aria-expanded": isUnfolded }, several(adapters, "adapter")) : null;
  return make("td", { class: "name mono" }, toggle, fold);
}

function stateCell(endpoint) {
  const why = concern(endpoint) || (TONES[endpoint.state] === "busy" ? endpoint.reason : "");
  return make("td", { class: "status", "data-label": "State" },
    make("span", { class: "where" }, state(endpoint.state), " ", make("span", { class: "soft" }, endpoint.tier)), " ",
    endpoint.canary ? make("span", { class: "tag", title: `canary ${endpoint.canary.state}` }, `canary ${share(endpoint.canary.weight)}`) : null,
    why ? make("div", { class: "why", "data-tone": concern(endpoint) ? "bad" : "busy" }, why) : null);
}

function row({ endpoint, adapters, isOpen, isUnfolded }) {
  const hour = endpoint.slo_status["1h"], [from, took] = bound(endpoint), alone = !endpoint.base; // an adapter's capacity is its base's
  return make("tr", { "data-name": endpoint.name, class: `${endpoint.base ? "adapter " : ""}${isOpen ? "opened" : ""}` },
    nameCell(endpoint, adapters, isOpen, isUnfolded),
    stateCell(endpoint),
    cell("Mode", "mode", alone ? plain(endpoint.mode) : "adapter"),
    cell("SLO kept, 1 h", "number", share(hour?.attainment)),
    cell("Budget, 1 h", "", ...budget(hour)),
    cell("Activation p95", "number", took ? milliseconds(took.p95_ms) : NOTHING, took ? make("span", { class: "soft" }, ` ${from}`) : ""),
    cell("In flight", "number", alone ? String(endpoint.in_flight) : NOTHING),
    cell("Queued", `number${alone && endpoint.queued ? " strong" : ""}`, alone ? String(endpoint.queued) : NOTHING),
    cell("Concurrency", "number", alone && endpoint.concurrency.full ? `${endpoint.concurrency.current} / ${endpoint.concurrency.full}` : NOTHING),
    cell("Overflows to", "mono to", endpoint.overflow?.to || NOTHING));
}

function detailRow({ endpoint, limits }) {
  return make("tr", { class: "details", "data-of": endpoint.name }, make("td", { colspan: "10" }, details(endpoint, limits)));
}

function matcher() {
  const words = $("filter").value.toLowerCase().split(/\s+/).filter(Boolean), only = $("concerned").checked;
  if (!words.length && !only) return null;
  return (e) => {
    const text = `${e.name} ${e.state} ${e.tier} ${plain(e.mode)} ${e.model.source} ${e.regions.join(" ")}`.toLowerCase();
    return (!only || concern(e)) && words.every((word) => text.includes(word));
  };
}

function draw() {
  const { endpoints, limits } = shown, matches = matcher(), adaptersOf = new Map(), items = [];
  for (const e of endpoints) if (e.base) adaptersOf.set(e.base, [...(adaptersOf.get(e.base) || []), e]);
  const push = (endpoint, adapters = 0, isUnfolded = false) => {
    const isOpen = opened.has(endpoint.name);
    items.push({ key: endpoint.name, data: { endpoint, adapters, isOpen, isUnfolded }, build: row });
    if (isOpen) items.push({ key: `${endpoint.name} details`, data: { endpoint, limits: limits.filter((l) => about(l, endpoint)) }, build: detailRow });
  };
  for (const endpoint of endpoints.filter((e) => !e.base)) {
    const mine = adaptersOf.get(endpoint.name) || [];
    const isUnfolded = unfolded.get(endpoint.name) ?? mine.length <= FOLDED_ABOVE;
    const below = matches ? mine.filter(matches) : isUnfolded ? mine : [];
    if (matches && !matches(endpoint) && !below.length) continue;
    push(endpoint, mine.length, matches ? below.length > 0 : isUnfolded);
    for (const adapter of below) push(adapter);
  }
  if (!items.length) items.push({ key: "", data: endpoints.length, build: nothing });
  settle($("endpoints"), items);
}

function nothing(existing) {
  const text = existing ? "No endpoint matches." : "No endpoints yet: tidegate endpoints create TENANT/NAME --model DIR";
  return make("tr", {}, make("td", { colspan: "10", class: "empty" }, text));
}

const about = (limit, endpoint) => (limit.scope === "endpoint" && limit.subject === endpoint.name) || (limit.scope === "tenant" && limit.subject === endpoint.tenant);

export function showEndpoints(endpoints, limits) {
  shown = { endpoints, limits };
  draw();
}

function turn(name) {
  if (!opened.delete(name)) opened.add(name);
  draw();
}

function onKey(event) {
  const buttons = [...$("endpoints").querySelectorAll("button.open")], at = buttons.indexOf(event.target);
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (at >= 0 && step) {
    buttons[at + step]?.focus();
    event.preventDefault();
  } else if (event.key === "Escape") {
    const name = event.target.closest("tr")?.dataset.name;
    if (opened.has(name)) turn(name);
  }
}

export function listen() {
  $("endpoints").addEventListener("click", (event) => {
    const name = event.target.closest("tr[data-name]")?.dataset.name;
    if (!name) return;
    if (event.target.closest("button.fold")) {
      unfolded.set(name, event.target.getAttribute("aria-expanded") !== "true");
      draw();
    } else if (getSelection().isCollapsed) turn(name); // who marks text to copy it does not mean to open the row
  });
  $("endpoints").addEventListener("keydown", onKey);
  $("filter").addEventListener("input", draw);
  $("concerned").addEventListener("change", draw);
}
