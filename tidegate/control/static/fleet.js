// Accelerators and host memory: how much there is and who is on it.

import { $, TONES, colour, dark, make, settle, several, shape, size } from "./parts.js";

// A pool is some memory and who holds it: { key, title, memory_bytes, reserved_bytes, residents, note }.
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
  if (pool.note) rows.push(make("li", { class: "amount", title: pool.note_title }, pool.note));
  return make("ul", { class: "legend" }, ...rows);
}

function hostMemory(node, endpoints) {
  const residents = endpoints.filter((endpoint) => !endpoint.base).flatMap((endpoint) => endpoint.replicas
    .filter((replica) => replica.node === node.id && replica.state === "asleep")
    .map((replica) => ({ replica: replica.id, endpoint: endpoint.name, state: replica.state, bytes: replica.host_bytes })));
  const source = new Map(endpoints.map((endpoint) => [endpoint.model.digest, endpoint.model.source]));
  return { title: "host memory", memory_bytes: node.host_memory_bytes, reserved_bytes: node.host_reserved_bytes, residents,
    note: node.on_disk.length ? `${several(node.on_disk.length, "fetched model")} on disk` : "",
    note_title: node.on_disk.map((digest) => source.get(digest) || digest).join("\n") };
}

function card(pool) {
  return make("div", { class: "card" },
    make("h3", {}, pool.title, make("span", {}, `${size(pool.reserved_bytes)} of ${size(pool.memory_bytes)}`)), bar(pool), legend(pool));
}

export function showNodes(nodes, endpoints) {
  const pools = nodes.flatMap((node) => [...node.accelerators.map((a) => ({ title: a.id, ...a })), hostMemory(node, endpoints)]
    .map((pool) => ({ ...pool, title: nodes.length > 1 ? `${node.id} / ${pool.title}` : pool.title, key: `${node.id} ${pool.title}` })));
  const none = { key: "", data: 0, build: () => make("p", { class: "empty" }, "No node has joined.") };
  settle($("accelerators"), pools.length ? pools.map((pool) => ({ key: pool.key, data: [pool, dark()], build: () => card(pool) })) : [none]);
}
