// All there is to know of one endpoint, below its row.

import { $, NOTHING, budgetWords, dollars, grouped, lasting, make, milliseconds, nano, plain, several, share, size, state } from "./parts.js";

const WINDOWS = ["5m", "1h", "24h", "30d"];
// Year, month, day and time in this order everywhere, in the reader's time zone.
const at = (ms) => new Date(ms).toLocaleString("sv-SE");

function block(title, ...children) {
  return make("section", { class: `block ${title.split(" ")[0].toLowerCase()}` }, make("h3", {}, title), ...children);
}

// `rows` are lists of text or elements; columns after the first are figures.
function table(heads, rows) {
  const line = (kind, values) => make("tr", {}, ...values.map((value, i) => make(kind, { class: i ? "number" : null, scope: kind === "th" ? "col" : null }, value)));
  return make("table", {}, make("thead", {}, line("th", heads)), make("tbody", {}, ...rows.map((values) => line("td", values))));
}

function facts(pairs) {
  const known = pairs.filter(([, value]) => value !== null && value !== "");
  return make("dl", {}, ...known.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

function windows(status) {
  return table(["Window", "Requests", "SLO kept", "Answered", "Error budget"], WINDOWS.filter((w) => status[w]).map((w) => {
    const slo = status[w];
    return [w, grouped(slo.requests), share(slo.attainment), share(slo.availability), budgetWords(slo.error_budget)];
  }));
}

function service(e) {
  return block("Service level", windows(e.slo_status), make("p", { class: "soft" },
    `TTFT within ${milliseconds(e.slo.ttft_ms)} and TPOT within ${milliseconds(e.slo.tpot_ms)}, for ${e.slo.percentile} % of requests. Measured since ${at(e.slo_since_ms)}.`));
}

function activations(e) {
  const rows = Object.entries(e.activation_bounds).map(([tier, b]) => [`from ${tier}`, String(b.count), milliseconds(b.p50_ms), milliseconds(b.p95_ms), milliseconds(b.p99_ms)]);
  return block("Activation bounds", rows.length ? table(["Tier", "Count", "p50", "p95", "p99"], rows) : make("p", { class: "soft" }, e.base ? "An adapter is activated with its base." : "None measured yet."),
    rows.length ? make("p", { class: "soft" }, `${several(e.activations, "activation")}, the last in ${milliseconds(e.activation_ms_last)}.`) : null);
}

// Over all endpoints: what waking or loading a model of a size takes here.
export function showBounds(groups) {
  const rows = groups.flatMap((g) => Object.entries(g.tiers).map(([tier, b]) => [g.size, tier, String(b.count), milliseconds(b.p50_ms), milliseconds(b.p95_ms), milliseconds(b.p99_ms)]));
  $("bounds-part").hidden = !rows.length;
  $("bounds").replaceChildren(table(["Model", "From", "Count", "p50", "p95", "p99"], rows));
}

function replicas(e) {
  const rows = e.replicas.map((r) => [make("span", { class: "mono" }, r.id), `${r.node} ${r.accelerators.join(" ")}`, state(r.state), String(r.generation), size(r.accelerator_bytes), size(r.host_bytes), at(r.since_ms)]);
  const title = e.base ? `Replicas (of ${e.base})` : "Replicas";
  return block(title, rows.length ? table(["Replica", "Where", "State", "Generation", "Accelerator", "Host", "Since"], rows) : make("p", { class: "soft" }, "None."));
}

function threshold(o) {
  if (o.above_concurrency !== null) return `above ${o.above_concurrency} at once`;
  return o.above_queue_ms !== null ? `above ${milliseconds(o.above_queue_ms)} in the queue` : `above ${milliseconds(o.above_ttft_ms)} TTFT`;
}

function desired(e) {
  const schedule = e.schedule.map((s) => `${s.cron} (UTC${s.utc_offset_minutes ? ` ${s.utc_offset_minutes} min` : ""}): ${s.min_replicas} to ${s.max_replicas}`).join("; ");
  return block("Desired", facts([
    ["Why", e.reason], ["Base", e.base], ["Model", e.model.source],
    ["Engine", [e.engine, ...Object.entries(e.engine_args).map(([k, v]) => `${k}=${v}`)].join(" ")],
    ["Mode", plain(e.mode)], ["Regions", e.regions.join(", ")],
    ["Replicas", `${e.min_replicas} to ${e.max_replicas}, ${e.slots} slots each, target ${e.concurrency_target} at once`],
    ["Schedule", schedule], ["Lends", e.lend ? "its reserved accelerators while quiet" : ""],
    ["Overflow", e.overflow ? `to ${e.overflow.to} ${threshold(e.overflow)}` : ""], ["Fallback", e.fallback?.to || ""],
    ["Price plan", e.price_plan],
    ["Generation", `${e.generation}${e.rollback_to === null ? "" : `, rollback goes to ${e.rollback_to}`}`], ["Created", at(e.created_ms)],
  ]));
}

function limited(e, limits) {
  const rate = (value, unit) => value === null ? null : `${grouped(value)} ${unit}`;
  const spent = (b) => `${b.spent_usd === null ? NOTHING : dollars(nano(b.spent_usd))} of ${dollars(nano(b.usd))} a ${b.window}`.replace("a total", "in all");
  const rows = limits.map((l) => [l.subject, [rate(l.requests_per_minute, "requests/min"), rate(l.tokens_per_minute, "tokens/min"), rate(l.concurrency, "at once"), ...l.budgets.map(spent)].filter(Boolean).join(" · ")]);
  return block("Limits", facts([
    ["Waiting", `${grouped(e.limits.queued_max)} requests at most, ${lasting(e.limits.hold_ms_max)} each`],
    ["Context", `${grouped(e.limits.context_tokens_max)} tokens`], ...rows,
  ]));
}

function canary(e) {
  const c = e.canary;
  return c && block("Canary", make("p", {}, state(c.state), ` ${share(c.weight)} of requests to ${c.model.source}, generation ${c.generation}`, c.reason ? `: ${c.reason}` : ""), windows(c.slo_status));
}

export function details(endpoint, limits) {
  return make("div", { class: "blocks" }, ...[service(endpoint), activations(endpoint), desired(endpoint), limited(endpoint, limits), canary(endpoint), replicas(endpoint)].filter(Boolean));
}
