// What every part of the page is made with. Text from the server only ever becomes text nodes and attributes, never markup.

const SVG = "http://www.w3.org/2000/svg";
export const TONES = {
  ready: "good", idle: "good", resume: "good", joined: "good", applied: "good", active: "good",
  loading: "busy", waking: "busy", draining: "busy", starting: "busy", creating: "busy", sleeping: "busy", stopping: "busy",
  start: "busy", wake: "busy", drain: "busy", degraded: "bad", failed: "bad", lost: "bad", exhausted: "bad",
  asleep: "rest", sleep: "rest", stop: "rest", paused: "rest",
};
export const NOTHING = "–";
export const $ = (id) => document.getElementById(id);
export const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;

export function make(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function shape(tag, attributes, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) if (value !== undefined && value !== null) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

export function colour(name) { // one hue an endpoint, the same on every screen
  let hash = 2166136261;
  for (const char of name) hash = Math.imul(hash ^ char.codePointAt(0), 16777619);
  const hue = ((hash >>> 0) * 137.508) % 360;
  return `hsl(${hue.toFixed(0)} ${dark() ? "38% 58%" : "45% 55%"})`;
}

// --- keeping what did not change -----------------------------------------------------------------------------------

const placed = new WeakMap();

// Makes `parent` hold one element an item { key, data, build }. An element is built again only when its data changed,
// and the keyboard's focus goes to its successor: a refresh under somebody's hands disturbs neither focus nor selection.
export function settle(parent, items) {
  const before = placed.get(parent) || new Map(), after = new Map();
  const focused = parent.contains(document.activeElement) ? document.activeElement.dataset.focus : undefined;
  for (const { key, data, build } of items) {
    const print = JSON.stringify(data), old = before.get(key);
    after.set(key, old?.print === print ? old : { print, element: build(data) });
  }
  const kept = new Set([...after.values()].map((one) => one.element));
  for (const child of [...parent.children]) if (!kept.has(child)) child.remove();
  let at = 0;
  for (const element of kept) {
    if (parent.children[at] !== element) parent.insertBefore(element, parent.children[at] || null);
    at++;
  }
  placed.set(parent, after);
  if (focused && !parent.contains(document.activeElement)) {
    [...parent.querySelectorAll("[data-focus]")].find((one) => one.dataset.focus === focused)?.focus({ preventScroll: true });
  }
}

// --- words and figures -----------------------------------------------------------------------------------------------

export function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) { bytes /= 1024; unit++; }
  return `${bytes >= 100 || unit === 0 ? bytes.toFixed(0) : bytes.toFixed(1)} ${units[unit]}`;
}

export const several = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
export const plain = (word) => word.replaceAll("_", " ");
export const grouped = (count) => count.toLocaleString("en-US");
export const milliseconds = (ms) => ms === null || ms === undefined ? NOTHING : ms < 10000 ? `${ms} ms` : `${(ms / 1000).toFixed(1)} s`;

export function lasting(ms) { // how long, in the two units that matter
  const seconds = Math.round(ms / 1000);
  if (!ms) return NOTHING;
  if (seconds < 60) return ms < 1000 ? "< 1 s" : `${seconds} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${seconds % 60} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.floor(seconds / 60) % 60} min`;
}

export function share(part) { // rounded down: 99.996 % kept is not 100 %
  if (part === null || part === undefined) return NOTHING;
  return `${Number((Math.floor(part * 10000 + 1e-6) / 100).toFixed(2))} %`;
}

// What is left of the misses that an SLO allows; overdrawn 2× is twice the misses allowed.
export function budgetWords(left) {
  if (left === null || left === undefined) return NOTHING;
  return left < 0 ? `overdrawn ${(1 - left).toFixed(1)}×` : `${share(left)} left`;
}

// Amounts come as decimal text with nine places, and are added as whole nano-USD.
export const nano = (usd) => BigInt(usd.replace(".", ""));

export function dollars(amount) {
  const size = Number(amount) / 1e9, absolute = Math.abs(size); // for the eye only; nothing is added up after this
  if (absolute && absolute < 0.0001) return `${size < 0 ? "−" : ""}< $0.0001`;
  const places = absolute === 0 || absolute >= 1 ? 2 : 4;
  return `${size < 0 ? "−" : ""}$${absolute.toLocaleString("en-US", { minimumFractionDigits: places, maximumFractionDigits: places })}`;
}

export function state(word) {
  return make("span", { class: "state", "data-tone": TONES[word] || "" }, plain(word));
}

// A thin bar of how much of something is left or used, from 0 to 1.
export function gauge(part, tone) {
  const width = Math.max(0, Math.min(1, part)) * 100;
  return shape("svg", { class: "gauge", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true", "data-tone": tone },
    shape("rect", { width: width.toFixed(1), height: 4 }));
}
