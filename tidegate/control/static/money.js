// Money since midnight UTC: what was charged, what dedicated would have cost, whose accelerator time others used.

import { $, NOTHING, dollars, gauge, grouped, lasting, make, nano, settle, several, state } from "./parts.js";

const LENT_LINES_MAX = 8, ROWS_MAX = 12; // the dearest; the others are one row until asked for
export const today = () => new Date().toISOString().slice(0, 10);

let wholly = false, shown = null;
const NONE = { requests: 0, input_tokens: 0, output_tokens: 0 };

// Usage counts requests and tokens, accelerator time knows amounts: one line an endpoint, dearest first.
function lines(usage, time) {
  const used = new Map(usage.rows.map((row) => [row.group, row])), known = new Set(time.endpoints.map((e) => e.endpoint));
  const gone = usage.rows.filter((row) => !known.has(row.group)).map((row) => ({ ...row, endpoint: row.group, charged: BigInt(row.nano_usd), drawn: 0n, dedicated: 0n, lent_ms: 0, borrowed_ms: 0 }));
  const all = time.endpoints.map((e) => ({ ...NONE, ...used.get(e.endpoint), endpoint: e.endpoint, charged: nano(e.tokens_usd) + nano(e.time_usd),
    drawn: nano(e.drawn_usd), dedicated: nano(e.dedicated_usd), lent_ms: e.lent_ms, borrowed_ms: e.borrowed_ms }));
  const worth = (one) => one.charged + one.drawn;
  return [...all, ...gone].sort((a, b) => worth(a) < worth(b) ? 1 : worth(a) > worth(b) ? -1 : a.endpoint < b.endpoint ? -1 : 1);
}

function sum(rows, endpoint) {
  const total = { endpoint, requests: 0, input_tokens: 0, output_tokens: 0, charged: 0n, drawn: 0n, dedicated: 0n, lent_ms: 0, borrowed_ms: 0 };
  for (const one of rows) for (const name of Object.keys(total)) if (name !== "endpoint") total[name] += one[name];
  return total;
}

function row(one, fold = null) {
  const cell = (label, text) => make("td", { class: "number", "data-label": label, "data-empty": text === NOTHING ? "" : null }, text);
  const money = (amount) => amount === 0n ? NOTHING : dollars(amount);
  const paid = one.charged + one.drawn, part = one.dedicated > 0n ? Number(paid) / Number(one.dedicated) : null;
  return make("tr", {}, make("td", { class: "name mono" }, one.endpoint, fold),
    cell("Requests", one.requests ? grouped(one.requests) : NOTHING),
    cell("Tokens in", one.input_tokens ? grouped(one.input_tokens) : NOTHING),
    cell("Tokens out", one.output_tokens ? grouped(one.output_tokens) : NOTHING),
    cell("Charged", money(one.charged)), cell("From commitments", money(one.drawn)), cell("Dedicated", money(one.dedicated)),
    make("td", { "data-label": "Of dedicated", "data-empty": part === null ? "" : null }, part === null ? NOTHING
      : make("span", { class: "budget" }, gauge(part, part > 1 ? "busy" : "good"), part > 1 ? `${part.toFixed(1)}×` : `${(part * 100).toFixed(1)} %`)),
    cell("Lent", lasting(one.lent_ms)), cell("Borrowed", lasting(one.borrowed_ms)));
}

function lent(time) {
  const longest = [...time.lent].sort((a, b) => b.duration_ms - a.duration_ms), more = longest.length - LENT_LINES_MAX;
  const items = longest.slice(0, LENT_LINES_MAX).map((one) => make("li", {}, make("span", { class: "mono" }, one.lender), " lent ", make("span", { class: "mono" }, one.borrower), ` ${lasting(one.duration_ms)}`));
  if (more > 0) items.push(make("li", { class: "soft" }, `and ${several(more, "more pair")}`));
  $("lent").replaceChildren(...items);
}

function commitments(contracts) {
  settle($("contracts"), contracts.map((contract) => ({ key: contract.id, data: contract, build: (c) => make("li", { class: "card" },
    make("h3", {}, c.tenant, make("span", {}, state(c.state))), gauge(c.percent_used / 100, c.percent_used >= 80 ? "busy" : "good"),
    make("p", { class: "soft" }, `${grouped(c.used_tokens)} of ${grouped(c.tokens)} tokens used; ${dollars(nano(c.worth_left_usd))} of ${dollars(nano(c.price_usd))} left until ${c.expires.slice(0, 10)}`)) })));
  $("contracts-part").hidden = !contracts.length;
}

function draw() {
  const rest = shown.length > ROWS_MAX + 1 ? shown.slice(ROWS_MAX) : [];
  const rows = shown.slice(0, wholly ? shown.length : shown.length - rest.length).map((one) => row(one));
  if (rest.length) {
    const fold = make("button", { type: "button", class: "fold", "aria-expanded": wholly }, wholly ? "show fewer" : "show all");
    fold.addEventListener("click", () => { wholly = !wholly; draw(); });
    rows.push(wholly ? make("tr", {}, make("td", { class: "name", colspan: "10" }, fold)) : row(sum(rest, several(rest.length, "more endpoint")), fold));
  }
  const focused = $("money").contains(document.activeElement);
  $("money").replaceChildren(...rows);
  if (focused) $("money").querySelector(".fold")?.focus({ preventScroll: true });
}

export function showMoney(usage, time, contracts) {
  shown = lines(usage, time);
  const total = sum(shown, "all endpoints");
  draw();
  $("money-total").replaceChildren(row(total));
  lent(time);
  commitments(contracts);
  return total;
}
