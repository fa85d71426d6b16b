// The playground: text, and the block of it that comes into focus. One module, no library.
// Text of a model or of a user reaches the page by textContent alone. Nothing is stored: settings are in the
// address (after #), prompts and the key nowhere.

const $ = (selector, within = document) => within.querySelector(selector);
const $$ = (selector, within = document) => [...within.querySelectorAll(selector)];

/** Make an element with properties, attributes and children. */
function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const ICONS = {
  play: "M5 3l8 5-8 5z",
  pause: "M4 3h3v10H4zM9 3h3v10H9z",
  auto: "M8 2a6 6 0 1 0 0 12zM8 2a6 6 0 0 1 0 12",
  light:
    "M8 5a3 3 0 1 0 0 6 3 3 0 0 0 0-6zM8 1v1.5M8 13.5V15M1 8h1.5M13.5 8H15M3 3l1 1M12 12l1 1M13 3l-1 1M4 12l-1 1",
  dark: "M13 9.5A5.5 5.5 0 0 1 6.5 3 5.5 5.5 0 1 0 13 9.5z",
  die: "M3.5 2h9A1.5 1.5 0 0 1 14 3.5v9a1.5 1.5 0 0 1-1.5 1.5h-9A1.5 1.5 0 0 1 2 12.5v-9A1.5 1.5 0 0 1 3.5 2zM5 5h.01M11 5h.01M8 8h.01M5 11h.01M11 11h.01",
};

function icon(name) {
  const [svg, path] = ["svg", "path"].map((tag) => document.createElementNS("http://www.w3.org/2000/svg", tag));
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

function press(buttons, pressed) {
  for (const button of buttons) button.setAttribute("aria-pressed", String(button === pressed));
}

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);
const seconds = (ms) => `${(ms / 1000).toFixed(ms < 995 ? 2 : ms < 9950 ? 1 : 0)} s`;

// --- settings: what may be asked for, what is, and the address that keeps it -------------------------------

// A slider has min, max and step, and beside it a number within bounds. `shared` is the same for both sides of a
// comparison; `colada` is a field of that extension, which models know or not.
const FIELDS = [
  { name: "max_tokens", label: "Length", min: 1, max: 256, bounds: [1, "max_tokens"], value: 48, shared: true },
  { name: "steps", label: "Steps", min: 1, max: 64, bounds: [1, "max_steps"], colada: true },
  { name: "guidance", label: "Guidance", min: 0, max: 12, step: 0.5, bounds: [-20, 100], colada: true },
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.05, bounds: [0, 100], value: 0 },
  { name: "seed", label: "Seed", kind: "seed", bounds: [0, Number.MAX_SAFE_INTEGER], value: 0, shared: true },
  { name: "guidance_interval", label: "Guidance from, to", kind: "pair", bounds: [0, 1], colada: true, more: true },
  { name: "top_p", label: "Top-p", min: 0.05, max: 1, step: 0.05, bounds: [0.05, 1], value: 1, more: true },
  { name: "guidance_against", label: "Guidance against", kind: "choice", choices: "against", colada: true, more: true },
  { name: "solver", label: "Solver", kind: "choice", choices: "solvers", colada: true, more: true },
  { name: "schedule", label: "Schedule", kind: "choice", choices: "schedules", colada: true, more: true },
  { name: "stop", label: "Stop at", kind: "text", value: "", shared: true, more: true },
  { name: "watch", label: "Watch every step", kind: "check", value: true, shared: true, more: true },
];
const named = (name) => FIELDS.find((field) => field.name === name);
const [LENGTH, SEED, WATCH] = ["max_tokens", "seed", "watch"].map(named);
const SIDES = ["a", "b"];
const THEMES = ["auto", "light", "dark"];

let models = []; // As /v1/models tells of them.
let key = "";
let side = "a"; // Whose settings are shown.
let comparing = false;
let theme = "auto";
const chosen = { a: {}, b: {} }; // By side: the settings that are not the model's own.

const modelOf = (which) => models.find((model) => model.id === chosen[which].model) ?? models[0];
const facts = (which) => modelOf(which)?.colada ?? {};
const ordinary = (which, field) => facts(which).defaults?.[field.name] ?? field.value ?? null;
const valueOf = (which, field) => chosen[field.shared ? "a" : which][field.name] ?? ordinary(which, field);
const known = (which, field) => !field.colada || facts(which).defaults?.[field.name] != null;
const both = (field) => !field.shared && SIDES.every((which) => known(which, field));
const differs = (field) => both(field) && !same(valueOf("a", field), valueOf("b", field));
const boundOf = (field, bound) => (typeof bound === "string" ? (facts(side)[bound] ?? field.max) : bound);
const boundsOf = (field) => field.bounds.map((bound) => boundOf(field, bound));

function choose(field, value, which = side) {
  const where = chosen[field.shared ? "a" : which];
  if (same(value, ordinary(which, field))) delete where[field.name];
  else where[field.name] = value;
  remember();
}

/** Write the settings into the address; never a prompt, never the key. */
function remember() {
  const parts = new URLSearchParams();
  if (comparing) parts.set("compare", "1");
  if (theme !== "auto") parts.set("theme", theme);
  for (const which of SIDES) {
    const prefix = which === "a" ? "" : "b.";
    for (const [name, value] of Object.entries(chosen[which])) parts.set(prefix + name, String(value));
  }
  history.replaceState(null, "", parts.size ? `#${parts}` : location.pathname + location.search);
  for (const which of SIDES) $(`[data-side="${which}"] .summary`).textContent = summary(which);
  $("#reset").hidden = Object.keys(chosen[side]).every((name) => name === "model");
}

/** Read the settings from the address; what is unknown or out of bounds is left out. */
function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  comparing = parts.get("compare") === "1";
  theme = THEMES.includes(parts.get("theme")) ? parts.get("theme") : "auto";
  for (const which of SIDES) {
    chosen[which] = {};
    for (const field of [{ name: "model", kind: "choice" }, ...FIELDS]) {
      const text = parts.get(which === "a" ? field.name : `b.${field.name}`);
      const value = text === null || (field.shared && which === "b") ? null : parsed(field, text);
      if (value !== null) chosen[which][field.name] = value;
    }
  }
}

/** A setting's value from text, or null for what it cannot be. */
function parsed(field, text) {
  if (field.kind === "check") return text === "true";
  if (field.kind === "choice" || field.kind === "text") return text.slice(0, 256);
  const [low, high] = boundsOf(field);
  const numbers = text.split(",").map((part) => (part.trim() === "" ? NaN : Number(part)));
  if (!numbers.every((number) => number >= low && number <= high)) return null;
  if (field.kind === "pair") return numbers.length === 2 && numbers[0] <= numbers[1] ? numbers : null;
  return numbers.length === 1 && (field.step || Number.isInteger(numbers[0])) ? numbers[0] : null;
}

/** Make the rows of settings of the side that is shown. */
function drawFields() {
  const rows = FIELDS.filter((field) => known(side, field)).map((field) => [field.more, fieldRow(field)]);
  const model = { name: "model", label: "Model", kind: "choice", options: models.map((one) => one.id) };
  if (models.length > 1) rows.unshift([false, fieldRow(model)]);
  $("#fields").replaceChildren(...rows.filter(([more]) => !more).map(([, row]) => row));
  $("#more-fields").replaceChildren(...rows.filter(([more]) => more).map(([, row]) => row));
  press([$("#mode-one"), $("#mode-two")], $(comparing ? "#mode-two" : "#mode-one"));
  press($$("#sides button"), $(`#sides [data-side="${side}"]`));
  $("#sides").hidden = !comparing;
  $("#model-name").textContent = comparing ? "" : (modelOf("a")?.id ?? "");
  remember();
}

/** What distinguishes one side: its model where there are several, and the settings that differ. */
function summary(which) {
  const several = models.length > 1;
  const telling = FIELDS.filter(differs);
  if (!telling.length && !several) telling.push(FIELDS[1]);
  const parts = telling.map((field) => `${field.label.toLowerCase()} ${[valueOf(which, field)].flat().join("–")}`);
  return [...(several ? [modelOf(which)?.id] : []), ...parts].join(" · ");
}

function fieldRow(field) {
  const id = `set-${field.name}`;
  const value = field.name === "model" ? modelOf(side).id : valueOf(side, field);
  const row = element("div", { className: `field ${field.kind ?? "slider"}` }, element("label", { htmlFor: id }, field.label));
  const set = (next) => {
    if (next === null) return;
    choose(field, next);
    if (comparing) row.toggleAttribute("data-differs", differs(field));
  };
  const put = (input, event, read) => {
    input.addEventListener(event, () => set(read()));
    row.append(input);
    return input;
  };
  if (comparing && field.name !== "model") row.toggleAttribute("data-differs", differs(field));
  if (field.kind === "check") {
    const box = element("input", { type: "checkbox", id, checked: value });
    put(box, "change", () => box.checked);
  } else if (field.kind === "text") {
    const input = element("input", { type: "text", id, value, maxLength: 256, autocomplete: "off" });
    put(input, "input", () => input.value);
  } else if (field.kind === "choice") {
    const options = (field.options ?? facts(side)[field.choices] ?? [value]).map((one) => element("option", { value: one }, one));
    const select = put(element("select", { id }, ...options), "change", () => select.value);
    select.value = value;
    if (field.name === "model") select.addEventListener("change", () => (drawFields(), selected(), $("#set-model").focus()));
  } else {
    const [min, max] = boundsOf(field);
    const common = { type: "number", min, max, step: field.step || field.kind === "pair" ? 0.01 : 1 };
    const ids = [id, `${id}-to`];
    const numbers = [value].flat().map((one, place) => element("input", { ...common, id: ids[place], value: one }));
    const read = () => parsed(field, numbers.map((number) => number.value).join(","));
    numbers[1]?.setAttribute("aria-label", `${field.label}: to`);
    if (field.kind === "seed") row.append(dieFor(numbers[0]));
    for (const number of numbers) {
      put(number, "input", () => {
        number.setCustomValidity(read() === null ? `from ${min} to ${max}` : "");
        return read();
      });
      number.addEventListener("change", () => {
        [valueOf(side, field)].flat().forEach((one, place) => (numbers[place].value = one));
        for (const other of numbers) other.setCustomValidity("");
      });
    }
    if (field.max) {
      const { min, max, step = 1, label } = field;
      const range = put(element("input", { type: "range", min, max, step, value, "aria-label": label }), "input", () => {
        numbers[0].value = range.value;
        return Number(range.value);
      });
      const follow = () => fill(Object.assign(range, { value: numbers[0].value }));
      row.addEventListener("input", follow);
      numbers[0].addEventListener("change", follow);
      fill(range);
    }
  }
  return row;
}

function dieFor(number) {
  const die = element("button", { type: "button", className: "quiet", id: "die", "aria-label": "Another seed" }, icon("die"));
  die.addEventListener("click", () => {
    number.value = crypto.getRandomValues(new Uint32Array(1))[0] % 100000;
    number.dispatchEvent(new Event("input", { bubbles: true }));
  });
  return die;
}

/** Colour a slider's line up to its handle. */
function fill(range) {
  range.style.setProperty("--done", `${(100 * (range.value - range.min)) / (range.max - range.min || 1)}%`);
}

// --- the server --------------------------------------------------------------------------------------------

/** What went wrong, in the server's own words. */
class Refusal extends Error {
  constructor(message, code = "away", status = 0, retry = null) {
    super(message);
    Object.assign(this, { code, status, retry });
  }
}

async function ask(path, body, signal) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(body && { "Content-Type": "application/json" }) };
  const request = { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal, cache: "no-store" };
  const answer = await fetch(path, request).catch((error) => {
    throw error.name === "AbortError" ? error : new Refusal("The server does not answer.");
  });
  if (answer.ok) return answer;
  const told = await answer.json().catch(() => null);
  const message = told?.error?.message ?? `The server answered ${answer.status}.`;
  throw new Refusal(message, told?.error?.code ?? "", answer.status, Number(answer.headers.get("Retry-After")) || null);
}

/** The events of a stream, as objects; it has to end with [DONE]. */
async function* events(answer) {
  const reader = answer.body.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const parts = (rest + decoder.decode(value, { stream: true })).split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
        const data = lines.map((line) => line.slice(5).trimStart()).join("\n");
        if (data === "[DONE]") return;
        if (data) yield JSON.parse(data);
      }
    }
  } catch (error) {
    throw error.name === "AbortError" ? error : new Refusal("The connection was lost before the answer ended.");
  } finally {
    reader.cancel().catch(() => {}); // Of a connection that is lost already.
  }
  throw new Refusal("The answer ended too early.");
}

/** The body of a request of one side; what is the model's own is left out. */
function requestOf(which, before, after, count) {
  const body = { model: modelOf(which)?.id, prompt: before, max_tokens: count, seed: valueOf("a", SEED) };
  if (after !== null) body.suffix = after;
  const colada = {};
  for (const field of FIELDS) {
    const value = chosen[field.shared ? "a" : which][field.name];
    if ([LENGTH, SEED, WATCH].includes(field) || value === undefined || !known(which, field)) continue;
    if (field.colada) colada[field.name] = value;
    else if (field.name !== "stop" || (value && after === null)) body[field.name] = value;
  }
  return Object.keys(colada).length ? { ...body, colada } : body;
}

/** The same request, streamed, and with its guesses if they are to be watched. */
function streamed(which, body, watch) {
  const asked = { ...body, stream: true, stream_options: { include_usage: true } };
  if (watch && facts(which).arch === "cola") asked.colada = { ...body.colada, guesses: true, latents: "pca" };
  return asked;
}

const bytes = (base64) => (base64 ? Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)) : null);

/**
 * One answer as it came, in frames: a guess after every solver step, and one for every finished block.
 * A frame is {time, block, step, noise, tokens, latents, before, text}; `step` is null when the block is finished,
 * `before` says how many characters were finished before it.
 */
class Run {
  frames = [];
  columns = []; // Of each block: {from, count}, its latents in the picture.
  rows = new Map(); // "block step" (or "block end") to its frame with latents.
  text = "";
  first = null; // Milliseconds to the first text,
  end = null; // and to the end.
  steps = 0;
  start = performance.now();

  constructor(which, before, after, count) {
    Object.assign(this, { which, before, after, count, body: requestOf(which, before, after, count) });
  }

  /** Take an event; return the finished text that it adds. */
  take(event) {
    if (event.error) throw new Refusal(event.error.message, event.error.code);
    const time = performance.now() - this.start;
    const { type, block, step, steps, a, tokens, latents } = event.colada ?? {};
    const choice = event.choices?.[0];
    const text = choice?.text ?? "";
    this.usage = event.usage ?? this.usage;
    this.finish = choice?.finish_reason ?? this.finish;
    const common = { time, tokens: tokens ?? null, latents: bytes(latents), before: this.text.length };
    if (type === "guess") {
      this.steps = Math.max(this.steps, steps);
      this.add({ ...common, block, step, noise: a, text: "" });
    } else if (text || type === "block") {
      this.first ??= time;
      const last = this.frames.at(-1);
      if (last?.step && last.block === block) common.latents ??= last.latents; // Those of the last step.
      this.add({ ...common, block: block ?? this.frames.length, step: null, noise: 0, text });
      this.text += text;
    }
    return text;
  }

  add(frame) {
    this.frames.push(frame);
    if (!frame.latents) return;
    const last = this.columns.at(-1) ?? { from: 0, count: 0 };
    this.columns[frame.block] ??= { from: last.from + last.count, count: frame.latents.length / 3 };
    this.rows.set(`${frame.block} ${frame.step ?? "end"}`, frame);
  }

  /** The block that a latent belongs to. */
  blockOf(column) {
    return this.columns.findIndex((one) => one && column >= one.from && column < one.from + one.count);
  }

  /** The token that a latent of a frame reads as: [id, text, probability]. */
  tokenOf(frame, latent) {
    return frame.tokens?.[Math.floor((latent * frame.tokens.length) / this.columns[frame.block].count)];
  }

  figures() {
    const finished = this.frames.filter((frame) => frame.step === null);
    const tokens = this.usage?.completion_tokens ?? finished.reduce((sum, frame) => sum + (frame.tokens?.length ?? 1), 0);
    return [
      this.first !== null && ["first text", seconds(this.first)],
      this.end && tokens && ["tokens/s", ((1000 * tokens) / this.end).toFixed(1)],
      tokens && [tokens === 1 ? "token" : "tokens", String(tokens)],
      this.steps && ["solver steps", String(this.frames.length - finished.length)],
    ].filter(Boolean);
  }
}

/** A moment's name: block and step, or the time of a text that came without. */
function moment(run, frame) {
  if (!frame.tokens) return seconds(frame.time);
  return `block ${frame.block + 1} · ${frame.step === null ? "finished" : `step ${frame.step} of ${run.steps}`}`;
}

const visible = (text) => text.replace(/^ /, "").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "␣";
const sure = (token) => (typeof token?.[2] === "number" ? `${Math.round(100 * token[2])}%` : "");

/** A latent at a moment, in words. */
function describe(run, frame, latent) {
  const token = run.tokenOf(frame, latent);
  const reading = token ? ` · “${visible(token[1])}”, ${sure(token)} sure` : "";
  return `latent ${run.columns[frame.block].from + latent + 1}${reading} · ${moment(run, frame)}`;
}

// --- how a run is shown: its text --------------------------------------------------------------------------

/** The text of a run: what is finished stays untouched, the block in focus is drawn anew. */
class Ink {
  before = element("span", { className: "around" });
  written = element("span");
  focus = element("span");
  after = element("span", { className: "around" });

  /** @param context how many characters of the prompt are shown, at most. */
  constructor(host, context = Infinity) {
    Object.assign(this, { host, context });
  }

  /** Show a text that no run is about. */
  plain(text) {
    this.host.replaceChildren(text);
  }

  /** Show a run's surroundings, and of itself what is written. */
  take(run) {
    const cut = run.before.length > this.context;
    this.run = run;
    this.before.textContent = cut ? `…${run.before.slice(-this.context).replace(/^\S*/, "")}` : run.before;
    this.after.textContent = run.after ?? "";
    this.finish();
    this.host.replaceChildren(this.before, this.written, this.focus, this.after);
  }

  /** Wait for a run's first block, in place of what it is to replace. */
  wait(lost = "") {
    const mark = element("span", { className: lost ? "lost" : "dots" }, lost.trimStart() || "···");
    this.focus.replaceChildren(lost ? lost.match(/^\s*/)[0] : " ", mark);
  }

  append(text) {
    if (text) this.written.append(text);
    this.focus.replaceChildren();
  }

  finish() {
    this.focus.replaceChildren();
    this.written.textContent = this.run.text;
  }

  /** Show the run as it was at one frame; -1 is before the first. */
  show(at) {
    const frame = this.run.frames[at];
    this.written.textContent = this.run.text.slice(0, frame?.before ?? 0);
    this.focus.replaceChildren();
    if (frame) this.draw(frame, this.run.frames[at - 1]);
  }

  /** Draw the block in focus: its tokens, sharp as noise and doubt leave them, a line as long as they are sure. */
  draw(frame, previous) {
    if (!frame.tokens) {
      const space = frame.text.match(/^\s*/)[0];
      return this.focus.replaceChildren(space, element("span", { className: "token plain" }, frame.text.slice(space.length)));
    }
    const fits = frame.tokens.length === this.focus.querySelectorAll(".token").length;
    const tokens = frame.tokens.map(() => element("span", { className: "token" }, "", element("b", {}, element("span"))));
    if (!fits) this.focus.replaceChildren(...tokens);
    frame.tokens.forEach(([id, text, p], place) => {
      const token = this.focus.children[place];
      const space = text.match(/^\s*/)[0]; // Has no line.
      if (token.textContent !== text) {
        token.firstChild.data = space;
        $("span", token).textContent = text.slice(space.length);
      }
      const changed = fits && token.dataset.id !== String(id);
      const before = previous?.block === frame.block ? previous.tokens?.[place]?.[0] : id;
      const now = performance.now();
      if (changed || before !== id) token.dataset.changed = now;
      else if (previous || now - token.dataset.changed > 300) delete token.dataset.changed;
      token.dataset.id = id;
      token.dataset.level = clamp(Math.ceil(5 * (p ?? 1)), 1, 5);
      const doubt = frame.step === null ? 0 : Math.max(0.85 * (frame.noise ?? 0), 1 - (p ?? 1));
      token.style.setProperty("--blur", `${(2.75 * doubt).toFixed(2)}px`);
    });
  }
}

// --- its latents -------------------------------------------------------------------------------------------

const isDark = () => theme === "dark" || (theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);

/** A latent's three directions as a colour: OKLab, where equal steps look equal, to sRGB. */
function colour(latents, at) {
  const [x, y, z] = [0, 1, 2].map((part) => (latents[3 * at + part] - 128) / 127);
  const reach = Math.hypot(x, y) || 1;
  const chroma = (0.13 * Math.tanh(1.6 * reach)) / reach;
  const [a, b, lightness] = [x * chroma, y * chroma, (isDark() ? 0.62 : 0.76) + 0.14 * Math.tanh(1.4 * z)];
  const l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3;
  const m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3;
  const s = (lightness - 0.0894841775 * a - 1.291485548 * b) ** 3;
  const linear = [
    4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
    -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
    -0.0041960863 * l - 0.7034186147 * m + 1.707614701 * s,
  ];
  const encoded = (value) => (value <= 0.0031308 ? 12.92 * value : 1.055 * value ** (1 / 2.4) - 0.055);
  return `rgb(${linear.map((value) => Math.round(255 * encoded(clamp(value, 0, 1)))).join(" ")})`;
}

/** A canvas at the screen's own resolution: its context, in CSS pixels. */
function sized(canvas, width, height) {
  canvas.width = Math.round(width * devicePixelRatio);
  canvas.height = Math.round(height * devicePixelRatio);
  canvas.style.setProperty("height", `${height}px`);
  const context = canvas.getContext("2d");
  context.scale(devicePixelRatio, devicePixelRatio);
  return context;
}

const LEGEND = "A column is a latent, a row a solver step: noise at the top, words at the bottom.";
const caption = (text = LEGEND) => ($("#caption").textContent = text);

/** The latents of a run as a weave: a column a latent, a row a solver step; in bands where one would be too wide. */
class Weave {
  canvas = element("canvas");
  cursor = element("i", { hidden: true });
  column = 0;

  constructor(host, label) {
    this.host = host;
    host.append(this.canvas, this.cursor);
    const range = { "aria-valuemin": 0, "aria-valuemax": 0, "aria-valuenow": 0 };
    const attributes = { role: "slider", tabindex: 0, "aria-label": label, ...range };
    for (const [name, value] of Object.entries(attributes)) host.setAttribute(name, value);
    new ResizeObserver(() => this.redraw()).observe(host);
    host.addEventListener("pointermove", (event) => this.point(event, event.buttons & 1));
    host.addEventListener("pointerdown", (event) => this.point(event, true));
    host.addEventListener("pointerleave", () => caption());
    host.addEventListener("keydown", (event) => this.press(event));
  }

  begin(run) {
    Object.assign(this, { run, layout: null });
    this.host.hidden = this.cursor.hidden = true;
  }

  /** Lay the columns out: as many in a band as fit with 9 pixels each; no block is torn apart. */
  plan() {
    const width = this.host.clientWidth;
    const { patch = 1, block = 1 } = facts(this.run.which);
    const [first, last] = [this.run.columns[0], this.run.columns.at(-1)];
    const total = Math.max(Math.ceil(this.run.count / patch), last.from + last.count);
    const size = Math.max(block, first.count);
    const shift = size - first.count; // The first block may begin with what was there before.
    const blocks = Math.ceil((total + shift) / size);
    const bands = Math.ceil(blocks / Math.max(1, Math.floor(width / 9 / size)));
    const across = Math.ceil(blocks / bands) * size;
    const rows = this.run.steps + 1;
    const row = clamp(Math.round(150 / rows), 3, 12);
    const cell = Math.min(width / (bands === 1 ? total : across), 30);
    return { width, total, size, shift, bands, across, rows, row, cell, band: rows * row + 14 };
  }

  place(column, row) {
    const { across, shift, cell, band, row: height, size } = this.layout;
    const at = column + shift;
    const number = Math.floor(at / across);
    const seam = (at + 1) % size ? 1 : Math.min(4, cell / 3); // Wider between blocks.
    return [((at % across) - (number ? 0 : shift)) * cell, number * band + row * height, cell - seam];
  }

  redraw() {
    if (!this.run?.columns.length || !this.host.clientWidth) return;
    this.layout = this.plan();
    const { width, total, bands, band, rows, row } = this.layout;
    this.context = sized(this.canvas, width, bands * band - 14);
    this.context.globalAlpha = isDark() ? 0.14 : 0.08; // What is not written yet.
    this.context.fillStyle = getComputedStyle(this.host).color;
    for (let column = 0; column < total; column++) {
      const [x, y, across] = this.place(column, 0);
      this.context.fillRect(x, y, across, rows * row);
    }
    this.context.globalAlpha = 1;
    for (const frame of this.run.rows.values()) this.paint(frame);
  }

  add(frame) {
    this.host.hidden = false;
    if (this.layout?.rows === this.run.steps + 1) this.paint(frame);
    else this.redraw();
  }

  paint(frame) {
    const { from, count } = this.run.columns[frame.block];
    const row = frame.step ?? this.layout.rows - 1;
    for (let latent = 0; latent < count; latent++) {
      const [x, y, across] = this.place(from + latent, row);
      const above = row === 1 ? this.layout.row : 0; // Noise itself is not told: as after the first step.
      this.context.fillStyle = colour(frame.latents, latent);
      this.context.fillRect(x, y - above, across, this.layout.row + above);
    }
  }

  /** Put the cursor around the block and step that are shown. */
  mark(frame) {
    const columns = frame && this.run.columns[frame.block];
    this.cursor.hidden = !columns || !this.layout;
    if (this.cursor.hidden) return;
    const { from, count } = columns;
    const [x, y] = this.place(from, frame.step ?? this.layout.rows - 1);
    const [right, , across] = this.place(from + count - 1, 0);
    const box = { left: x - 2, top: y - 2, width: right + across - x + 4, height: this.layout.row + 4 };
    for (const [name, value] of Object.entries(box)) this.cursor.style.setProperty(name, `${value}px`);
    this.host.setAttribute("aria-valuemax", this.run.frames.length - 1);
    this.host.setAttribute("aria-valuenow", this.run.frames.indexOf(frame));
    this.host.setAttribute("aria-valuetext", describe(this.run, frame, clamp(this.column - from, 0, count - 1)));
  }

  /** Tell of a latent, and if it is chosen show its moment. */
  look(column, step, choose) {
    const block = this.run.blockOf(column);
    const frame = this.run.rows.get(`${block} ${step}`) ?? this.run.rows.get(`${block} end`);
    this.column = column;
    if (frame && choose) replay.seek(this.run, frame);
    caption(frame && describe(this.run, frame, column - this.run.columns[block].from));
  }

  point(event, choose) {
    if (!this.layout) return;
    const { across, shift, cell, row, rows, band } = this.layout;
    const { left, top } = this.canvas.getBoundingClientRect();
    const number = Math.floor((event.clientY - top) / band);
    const step = Math.floor((event.clientY - top - number * band) / row);
    const beside = clamp(Math.floor((event.clientX - left) / cell), 0, across - 1);
    const column = number ? number * across - shift + beside : beside;
    this.look(column, step >= rows - 1 ? "end" : Math.max(1, step), choose);
  }

  /** Left and right: another latent; up and down: another step. */
  press(event) {
    const aside = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const along = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!aside && !along) return;
    event.preventDefault();
    if (along) return replay.move(along);
    const { from, count } = this.run.columns.at(-1);
    this.look(clamp(this.column + aside, 0, from + count - 1), replay.frameOf(this.run)?.step ?? "end", true);
  }
}

/** Draw the way of one block's latents from noise to word, in the first two directions. */
function drawPaths(run, frame) {
  const canvas = $("#paths");
  const size = canvas.parentElement.clientWidth;
  if (!size || !frame?.latents) return;
  const context = sized(canvas, size, size);
  const { color: muted, backgroundColor: paper } = getComputedStyle(canvas);
  const way = [...run.rows.values()].filter((one) => one.block === frame.block);
  const shown = way.indexOf(frame);
  const at = (one, latent) => [0, 1].map((part) => 16 + (one.latents[3 * latent + part] / 255) * (size - 32));
  const line = (points, style, width, alpha) => {
    Object.assign(context, { strokeStyle: style, lineWidth: width, globalAlpha: alpha, lineCap: "round" });
    context.beginPath();
    points.forEach(([x, y]) => context.lineTo(x, y));
    context.stroke();
    context.globalAlpha = 1;
  };
  line([[size / 2, 10], [size / 2, size - 10]], muted, 1, 0.25);
  line([[10, size / 2], [size - 10, size / 2]], muted, 1, 0.25);
  const labels = [];
  for (let latent = 0; latent < run.columns[frame.block].count; latent++) {
    const points = way.map((one) => at(one, latent));
    line(points, muted, 1, 0.4);
    for (let step = 1; step <= shown; step++) {
      line([points[step - 1], points[step]], colour(way[step].latents, latent), 2.5, 1);
    }
    context.fillStyle = colour(frame.latents, latent);
    context.beginPath();
    context.arc(...points[shown], 5, 0, 2 * Math.PI);
    context.fill();
    const token = run.tokenOf(frame, latent);
    if (token) labels.push([...points[shown], visible(token[1]).slice(0, 14)]);
  }
  const font = `12px ${getComputedStyle(canvas).fontFamily}`;
  Object.assign(context, { font, textBaseline: "middle", lineJoin: "round" });
  Object.assign(context, { fillStyle: muted, strokeStyle: paper, lineWidth: 3 });
  const placed = [];
  for (const [left, top, text] of labels.sort((one, other) => one[1] - other[1])) {
    const width = context.measureText(text).width;
    const x = left + 9 + width > size - 4 ? left - 9 - width : left + 9;
    const above = placed.filter((other) => x < other.x + other.width && other.x < x + width).at(-1);
    const y = clamp(Math.max(top, above ? above.y + 14 : 0), 8, size - 8);
    placed.push({ x, y, width });
    context.strokeText(text, x, y);
    context.fillText(text, x, y);
  }
}

/** The same block as a table: the alternative to both pictures. */
function drawTable(run, frame) {
  const table = $("#table");
  if (!$("#table-box").open || !frame?.latents) return;
  const { from, count } = run.columns[frame.block];
  const head = ["latent", "reads", "sure", "direction 1", "2", "3"].map((name) => element("th", { scope: "col" }, name));
  const rows = Array.from({ length: count }, (_, latent) => {
    const token = run.tokenOf(frame, latent);
    const numbers = [0, 1, 2].map((part) => ((frame.latents[3 * latent + part] - 128) / 127).toFixed(2));
    const cells = [token ? visible(token[1]) : "", sure(token), ...numbers].map((text) => element("td", {}, text));
    return element("tr", {}, element("th", { scope: "row" }, String(from + latent + 1)), ...cells);
  });
  table.caption.textContent = moment(run, frame);
  table.tHead.replaceChildren(element("tr", {}, ...head));
  table.tBodies[0].replaceChildren(...rows);
}

// --- replay: every step, from memory -----------------------------------------------------------------------

function view(ink, weave, label) {
  return { ink, weave: new Weave($(weave), `${label}. Left and right: another latent; up and down: another step`) };
}

const one = view(new Ink($("#ink")), "#weave", "Latents");
const sides = {
  a: view(new Ink($('[data-side="a"] .ink'), 60), '[data-side="a"] .weave', "Latents of A"),
  b: view(new Ink($('[data-side="b"] .ink'), 60), '[data-side="b"] .weave', "Latents of B"),
};

const replay = {
  views: [],
  moments: [], // All frames of the views, in order of time: {view, frame, at, clock}.
  cursor: null, // Which moment is shown; null is the end.
  ticket: 0, // Of the animation under way.

  follow(views) {
    this.pause();
    Object.assign(this, { views, moments: [], cursor: null });
    $("#replay").hidden = $("#latents").hidden = $("#table-box").hidden = true;
  },

  /** A frame has come. */
  add(view) {
    const { frames } = view.ink.run;
    const frame = frames.at(-1);
    this.moments.push({ view, frame, at: frames.length - 1 });
    if (!frame.latents) return;
    if (view === one) $("#latents").hidden = $("#table-box").hidden = false;
    view.weave.add(frame);
  },

  /** All runs are over. A single one is replayed step by step, two by their own time, slowed alike. */
  settle() {
    const several = this.views.length > 1;
    if (several) this.moments.sort((earlier, later) => earlier.frame.time - later.frame.time);
    const slower = clamp(this.moments.length * 40, 4000, 16000) / (this.moments.at(-1)?.frame.time || 1);
    this.moments.forEach((moment, place) => (moment.clock = several ? moment.frame.time * slower : place * 60));
    $("#replay").hidden = this.moments.length < 2;
    this.bar();
  },

  /** Show one moment, or with null (or one beyond the last) the end. */
  show(cursor) {
    if (!this.moments.length) return;
    this.cursor = cursor === null || cursor >= this.moments.length ? null : Math.max(0, cursor);
    const until = this.moments.slice(0, this.cursor === null ? undefined : this.cursor + 1);
    for (const view of this.views) {
      const { run } = view.ink;
      const last = until.findLast((moment) => moment.view === view);
      if (this.cursor !== null) view.ink.show(last?.at ?? -1);
      view.weave.mark(this.cursor === null ? null : last?.frame);
      if (view !== one) continue;
      drawBlock(run, last?.frame);
      hold(this.cursor !== null);
    }
    if (this.cursor === null && comparing) markDifferences();
    if (this.cursor === null && !comparing) mirror();
    this.bar();
  },

  frameOf(run) {
    const until = this.moments.slice(0, this.cursor === null ? undefined : this.cursor + 1);
    return until.findLast((moment) => moment.view.ink.run === run)?.frame;
  },

  seek(run, frame) {
    this.pause();
    if (!busy) this.show(this.moments.findIndex((moment) => moment.frame === frame));
  },

  move(by) {
    this.pause();
    if (!busy) this.show(Math.max(0, (this.cursor ?? this.moments.length) + by));
  },

  bar() {
    const range = Object.assign($("#scrubber"), { max: this.moments.length, value: this.cursor ?? this.moments.length });
    const now = this.moments[this.cursor];
    $("#moment").textContent = now ? moment(now.view.ink.run, now.frame) : "the end";
    range.setAttribute("aria-valuetext", $("#moment").textContent);
    fill(range);
  },

  play() {
    let place = this.cursor ?? -1;
    const begun = performance.now() - (this.moments[place]?.clock ?? 0);
    const tick = (now) => {
      let next = place;
      while (this.moments[next + 1]?.clock <= now - begun) next++;
      if (next !== place) this.show((place = next));
      if (place < this.moments.length - 1) this.ticket = requestAnimationFrame(tick);
      else (this.pause(), this.show(null));
    };
    this.ticket = requestAnimationFrame(tick);
    this.button("pause");
  },

  pause() {
    cancelAnimationFrame(this.ticket);
    this.ticket = 0;
    this.button("play");
  },

  button(name) {
    $("#play").replaceChildren(icon(name));
    $("#play").setAttribute("aria-label", name === "play" ? "Play" : "Pause");
  },
};

/** Draw what is beside the text: the block's paths and table. */
function drawBlock(run, frame) {
  const pictured = frame?.latents ? frame : run.frames.findLast((one) => one.latents);
  drawPaths(run, pictured);
  drawTable(run, pictured);
}

// --- the sheet: a text field that is worked, and its mirror that is seen -----------------------------------

const field = $("#text");
let busy = null; // The AbortController of what is under way.
let last = null; // The last action: {before, after, lost, run, result}.
const past = []; // To go back to: {text, last}.

/** Show what the field holds; what was written last is told apart. */
function mirror() {
  if (last && field.value === last.result) one.ink.take(last.run);
  else one.ink.plain(field.value);
  $("#openings").hidden = field.value !== "" || Boolean(busy);
}

/** Show a run in place of the field, at the height that there is; or no more. */
function hold(shown) {
  const ink = $("#ink");
  if (!shown) ink.style.removeProperty("min-height");
  else if (!$("#sheet").dataset.view) ink.style.setProperty("min-height", `${ink.offsetHeight}px`);
  if (shown) $("#sheet").dataset.view = "run";
  else delete $("#sheet").dataset.view;
  field.readOnly = shown || Boolean(busy);
}

/** The words that are selected, whole, with the space before them: [from, to], or null. */
function hole() {
  let { selectionStart: from, selectionEnd: to } = field;
  const text = field.value;
  const inWord = (place) => /[\p{L}\p{N}'’]{2}/u.test(text.slice(place - 1, place + 1));
  while (from < to && /\s/.test(text[from])) from++;
  while (to > from && /\s/.test(text[to - 1])) to--;
  if (from === to) return null;
  while (from > 0 && inWord(from)) from--;
  while (to < text.length && inWord(to)) to++;
  return [text[from - 1] === " " ? from - 1 : from, to];
}

let turn = 0;
/** The selection has changed: offer to rewrite it, in as many tokens as it has. */
async function selected() {
  const able = !busy && !comparing && !$("#sheet").dataset.view && facts("a").infill;
  const words = able ? hole() : null;
  const text = words ? field.value.slice(...words) : "";
  $("#hole").hidden = !words;
  const { before, run } = last?.after != null && field.value === last.result ? last : {};
  const filled = run && [before.length, before.length + run.text.length];
  $("#rewrite").hidden = Boolean(filled) && same(words, filled); // "Again" is for that.
  if ($("#selected").dataset.text === text) return;
  $("#selected").dataset.text = text;
  $("#selected").textContent = text.trim();
  const mine = ++turn;
  await new Promise((done) => setTimeout(done, 120)); // While it is still being drawn.
  if (!words || mine !== turn) return;
  try {
    const { count } = await (await ask("tokenize", { model: modelOf("a").id, prompt: text })).json();
    if (mine === turn) $("#hole-size").value = Math.max(1, count);
  } catch (error) {
    complain(error);
  }
}

/** Show the buttons that make sense now. */
function toggle() {
  $("#write").hidden = Boolean(busy);
  $("#stop").hidden = !busy;
  $("#after-run").hidden = Boolean(busy) || comparing || !last || field.value !== last.result;
  $("#keep").hidden = !last || last.after === null;
  $("#code").disabled = comparing ? !sides.a.ink.run : !last;
  $("#write").textContent = comparing ? "Write both" : "Write";
}

// --- doing -------------------------------------------------------------------------------------------------

/** Say what went wrong, and offer what can be done. */
function complain(error, again = null) {
  const notice = element("div", { className: "notice" }, element("p", {}, error.message));
  $("#alert").replaceChildren(notice);
  const offer = (label, action) => {
    const button = element("button", { type: "button" }, label);
    button.addEventListener("click", () => ($("#alert").replaceChildren(), action()));
    notice.append(button);
    return button;
  };
  if (error.status === 401) return notice.append(keyForm(again));
  if (!again) return;
  if (error.code === "too_many_watchers") offer("Write without watching", () => again({ watch: false }));
  else if (error.retry) {
    const button = offer("", again);
    const tick = (wait) => {
      button.disabled = wait > 0;
      button.textContent = wait > 0 ? `Again in ${wait} s` : "Again now";
      if (wait > 0 && button.isConnected) setTimeout(tick, 1000, wait - 1);
    };
    tick(error.retry);
  } else if (error.code === "away") offer("Again", again);
}

function keyForm(again) {
  const input = element("input", { type: "password", id: "key", autocomplete: "off", required: true });
  const label = element("label", { htmlFor: "key" }, "Key");
  const form = element("form", {}, label, input, element("button", { type: "submit" }, "Use it"));
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    key = input.value;
    if (await loadModels()) again?.();
  });
  return form;
}

/** Do something that Esc stops, with the buttons for it, and every failure told. */
async function act(task, again) {
  if (busy) return;
  replay.show(null);
  busy = new AbortController();
  $("#alert").replaceChildren();
  $("#spoken").replaceChildren();
  $("#openings").hidden = $("#hole").hidden = true;
  field.readOnly = true;
  const pressed = document.activeElement === $("#write") || document.activeElement === $("#again");
  toggle();
  if (pressed) $("#stop").focus();
  try {
    await task(busy.signal);
  } catch (error) {
    if (error.name !== "AbortError" && !(error instanceof Refusal)) throw error;
    if (error instanceof Refusal) complain(error, again);
  } finally {
    const stopping = document.activeElement === $("#stop");
    busy = null;
    hold(false);
    if (!comparing) mirror();
    toggle();
    if (stopping) $("#write").focus();
    replay.settle();
    selected();
    poll();
  }
}

/** Stream one answer into a view. */
async function stream(view, run, watch, signal) {
  let drawing = 0;
  let sentence = "";
  const draw = () => {
    drawing = 0;
    const frame = run.frames.at(-1);
    if (frame?.step != null) view.ink.draw(frame);
    if (view === one) drawBlock(run, frame);
    tell(view, run);
  };
  run.start = performance.now();
  draw();
  try {
    const answer = await ask("v1/completions", streamed(run.which, run.body, watch), signal);
    for await (const event of events(answer)) {
      const count = run.frames.length;
      const text = run.take(event);
      if (run.frames.length > count) {
        replay.add(view);
        if (run.frames.at(-1).step === null) view.ink.append(text);
        if (view === one && run.after === null) extend(text);
        drawing ||= requestAnimationFrame(draw);
      }
      sentence = speak(sentence + text, run.finish);
    }
  } finally {
    cancelAnimationFrame(drawing);
    run.end = performance.now() - run.start;
    view.ink.finish();
    if (view === one) drawBlock(run);
    tell(view, run);
  }
}

/** Append to the text field; what is selected in it stays selected. */
function extend(text) {
  field.setRangeText(text, field.value.length, field.value.length, "preserve");
}

/** Say whole sentences, politely, and return the rest; at the end say that too. */
function speak(text, finished) {
  const whole = finished ? text : (text.match(/^[^]*[.!?…。！？]["'”’)]*(?=\s)/)?.[0] ?? "");
  if (whole.trim()) $("#spoken").append(element("span", {}, `${whole.trim()} `));
  return text.slice(whole.length);
}

function tell(view, run) {
  const figures = run.figures();
  if (view === one) {
    $("#status").setAttribute("aria-live", run.end === null ? "off" : "polite"); // Said once, at the end.
    const parts = figures.map(([name, value]) => (name === "first text" ? `first text after ${value}` : `${value} ${name}`));
    $("#status").textContent = parts.join(" · ") || (run.end === null ? "waiting for a place…" : "");
  } else {
    const rows = figures.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
    $(`[data-side="${run.which}"] .figures`).replaceChildren(...rows);
  }
}

/** Go on where the text ends, or fill a hole in it; `instead` of the last answer or beside it. */
function write({ before = field.value, after = null, lost = "", count, watch, instead = false } = {}) {
  count ??= valueOf("a", LENGTH);
  watch ??= valueOf("a", WATCH);
  const action = { before, after, lost, count };
  return act(async (signal) => {
    const shown = { text: field.value, last };
    const run = new Run("a", before, after, count);
    if (after === null) field.value = before;
    last = { ...action, run, result: null };
    one.ink.take(run);
    one.ink.wait(lost);
    one.weave.begin(run);
    replay.follow([one]);
    if (after !== null) hold(true);
    try {
      await stream(one, run, watch, signal);
    } finally {
      if (run.text && (after === null || run.finish)) {
        if (!instead) past.push(shown);
        field.value = last.result = before + run.text + (after ?? "");
        if (after !== null) field.setSelectionRange(before.length, before.length + run.text.length);
      } else {
        field.value = shown.text; // A hole is filled whole or not at all.
        last = shown.last;
      }
    }
  }, (changes) => write({ ...action, watch, instead, ...changes }));
}

function rewrite() {
  const words = hole();
  if (!words || busy || $("#hole").hidden) return;
  const [from, to] = words;
  const text = field.value;
  const count = Number($("#hole-size").value) || 1;
  write({ before: text.slice(0, from), lost: text.slice(from, to), after: text.slice(to), count });
}

/** Both sides, one after the other, so that neither slows the other. */
function compare({ watch = valueOf("a", WATCH) } = {}) {
  return act(async (signal) => {
    const views = SIDES.map((which) => sides[which]);
    for (const which of SIDES) {
      const run = new Run(which, field.value, null, valueOf("a", LENGTH));
      sides[which].ink.take(run);
      sides[which].weave.begin(run);
      tell(sides[which], run);
    }
    replay.follow(views);
    $("#status").textContent = "One after the other, so that neither slows the other.";
    for (const view of views) {
      view.ink.wait();
      await stream(view, view.ink.run, watch, signal);
    }
    markDifferences();
  }, compare);
}

/** Mark the words of each side that are not in their longest common subsequence. */
function markDifferences() {
  const [left, right] = SIDES.map((which) => sides[which].ink.run.text.split(/(?<=\S)(?=\s)/));
  const best = Array.from({ length: left.length + 1 }, () => new Uint16Array(right.length + 1));
  for (let i = left.length - 1; i >= 0; i--) {
    for (let j = right.length - 1; j >= 0; j--) {
      best[i][j] = left[i] === right[j] ? best[i + 1][j + 1] + 1 : Math.max(best[i + 1][j], best[i][j + 1]);
    }
  }
  const pieces = { a: [], b: [] };
  const put = (which, word, alone) => {
    const space = word.match(/^\s*/)[0];
    const mark = pieces[which].at(-1);
    if (!alone) pieces[which].push(word);
    else if (mark instanceof Element) mark.append(word);
    else pieces[which].push(space, element("mark", {}, word.slice(space.length)));
  };
  let [i, j] = [0, 0];
  while (i < left.length || j < right.length) {
    if (i < left.length && j < right.length && left[i] === right[j]) (put("a", left[i++]), put("b", right[j++]));
    else if (j >= right.length || (i < left.length && best[i + 1][j] >= best[i][j + 1])) put("a", left[i++], true);
    else put("b", right[j++], true);
  }
  for (const which of SIDES) {
    sides[which].ink.finish();
    sides[which].ink.written.replaceChildren(...pieces[which]);
  }
}

// --- the same from elsewhere -------------------------------------------------------------------------------

/** A JSON value as Python spells it. */
function python(value) {
  if (Array.isArray(value)) return `[${value.map(python).join(", ")}]`;
  if (value === true || value === false) return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  return `{${Object.entries(value).map(([name, part]) => `${JSON.stringify(name)}: ${python(part)}`).join(", ")}}`;
}

const LANGUAGES = {
  curl(run, root, keyed) {
    return [
      `curl -s ${root}/completions`,
      "  -H 'Content-Type: application/json'",
      ...(keyed ? ['  -H "Authorization: Bearer $COLADA_API_KEY"'] : []),
      `  -d '${JSON.stringify(run.body).replaceAll("'", "'\\''")}'`,
    ].join(" \\\n");
  },
  python(run, root, keyed) {
    const { colada, ...body } = run.body;
    const fields = Object.entries(colada ? { ...body, extra_body: { colada } } : body);
    const secret = keyed ? 'os.environ["COLADA_API_KEY"]' : '"none"';
    return [
      ...(keyed ? ["import os", ""] : []),
      "from openai import OpenAI",
      "",
      `client = OpenAI(base_url=${JSON.stringify(root)}, api_key=${secret})`,
      "answer = client.completions.create(",
      ...fields.map(([name, value]) => `    ${name}=${python(value)},`),
      ")",
      "print(answer.choices[0].text)",
    ].join("\n");
  },
  json(run) {
    const { body: request, text, finish, usage, first, end, frames } = run;
    const finished = frames.filter((frame) => frame.step === null);
    const blocks = finished.map(({ time, text, tokens }) => ({ ms: Math.round(time), text, tokens }));
    const ms = { first: Math.round(first), all: Math.round(end) };
    return JSON.stringify({ request, text, finish, usage, ms, blocks }, null, 1);
  },
};

function showCode(language = "curl") {
  const runs = comparing ? SIDES.map((which) => sides[which].ink.run) : [last.run];
  const root = new URL("v1", document.baseURI).href;
  press($$("#languages button"), $(`[data-language="${language}"]`));
  $("#code-text").textContent = runs.map((run) => LANGUAGES[language](run, root, wantsKey || key)).join("\n\n");
  $("#code-copy").textContent = "Copy";
  if (!$("#code-dialog").open) $("#code-dialog").showModal();
}

async function copyCode() {
  try {
    await navigator.clipboard.writeText($("#code-text").textContent);
    $("#code-copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren($("#code-text")); // Where the browser does not let a page copy.
    $("#code-copy").textContent = "Selected: copy it with your keys";
  }
}

// --- models, health, colours -------------------------------------------------------------------------------

let wantsKey = false;
let polling = 0;

async function loadModels() {
  try {
    models = (await (await ask("v1/models")).json()).data;
    $("#alert").replaceChildren();
    for (const which of SIDES) {
      const { model } = chosen[which];
      if (!model || models.some((served) => served.id === model)) continue;
      complain(new Refusal(`No model “${model}” is served here, but ${models.map((served) => served.id).join(", ")}.`, ""));
      delete chosen[which].model;
    }
    drawFields();
    return true;
  } catch (error) {
    complain(error, loadModels);
    return false;
  }
}

/** Ask how the server is, now and every five seconds while the page is seen. */
async function poll() {
  clearTimeout(polling);
  let [state, text] = ["away", "no answer"];
  try {
    const answer = await fetch("ready", { cache: "no-store" });
    const { status, running, waiting, key: keyed } = await answer.json();
    wantsKey = Boolean(keyed);
    const load = [running && `${running} writing`, waiting && `${waiting} waiting`].filter(Boolean).join(", ");
    [state, text] = answer.ok ? ["ready", load || "ready"] : ["waiting", status];
    if (answer.ok && !models.length && !$("#key")) await loadModels();
  } catch (error) {
    if (!(error instanceof TypeError || error instanceof SyntaxError)) throw error; // No answer, or not the server's.
  }
  $("#health").dataset.state = state;
  $("#health-text").textContent = text;
  if (!document.hidden) polling = setTimeout(poll, 5000);
}

function applyTheme() {
  document.documentElement.dataset.theme = theme;
  $("#theme").replaceChildren(icon(theme));
  $("#theme").setAttribute("aria-label", `Colour scheme: ${theme === "auto" ? "as the system" : theme}`);
  for (const { weave } of [one, sides.a, sides.b]) weave.redraw();
  if (one.ink.run && replay.moments.length) drawBlock(one.ink.run, replay.frameOf(one.ink.run));
}

// --- hands -------------------------------------------------------------------------------------------------

function changeMode(two) {
  if (busy) return;
  comparing = two;
  if (!two) side = "a";
  last = null;
  $("#comparison").hidden = !two;
  $("#status").textContent = "";
  replay.follow([]);
  mirror();
  toggle();
  drawFields();
  selected();
}

function start() {
  recall();
  applyTheme();
  changeMode(comparing);
}

function set(text, from = text.length, to = from) {
  field.value = text;
  mirror();
  toggle();
  field.focus();
  field.setSelectionRange(from, to);
}

const on = (selector, event, action) => $(selector).addEventListener(event, action);

on("#text", "input", () => (mirror(), toggle(), selected()));
on("#sheet", "click", () => !busy && replay.cursor !== null && (replay.pause(), replay.show(null)));
on("#openings", "click", (event) => event.target.matches("button") && set(event.target.textContent));
on("#write", "click", () => (comparing ? compare() : write()));
on("#stop", "click", () => busy?.abort());
on("#rewrite", "click", rewrite);
on("#keep", "click", () => {
  last = null;
  set(field.value, field.selectionEnd);
});
on("#again", "click", () => {
  const { before, after, lost, count } = last;
  const size = Number($("#hole-size").value) || count;
  choose(SEED, valueOf("a", SEED) + 1);
  drawFields();
  write({ before, after, lost, count: after === null ? count : size, instead: true });
});
on("#undo", "click", () => {
  const { text, last: earlier } = past.pop();
  replay.follow([]);
  last = earlier;
  $("#status").textContent = "";
  set(text);
});
on("#mode-one", "click", () => changeMode(false));
on("#mode-two", "click", () => changeMode(true));
on("#sides", "click", (event) => {
  side = event.target.dataset.side ?? side;
  drawFields();
});
on("#reset", "click", () => {
  const { model } = chosen[side];
  chosen[side] = model ? { model } : {};
  drawFields();
});
on("#scrubber", "input", (event) => (replay.pause(), replay.show(Number(event.target.value))));
on("#play", "click", () => (replay.ticket ? replay.pause() : replay.play()));
on("#table-box", "toggle", () => !busy && replay.show(replay.cursor));
on("#code", "click", () => showCode());
on("#languages", "click", (event) => event.target.dataset.language && showCode(event.target.dataset.language));
on("#code-copy", "click", copyCode);
on("#help", "click", () => $("#help-dialog").showModal());
on("#theme", "click", () => {
  theme = THEMES[(THEMES.indexOf(theme) + 1) % 3];
  applyTheme();
  remember();
});
for (const button of $$("[data-close]")) button.addEventListener("click", () => button.closest("dialog").close());
document.addEventListener("selectionchange", () => document.activeElement === field && selected());
document.addEventListener("visibilitychange", () => !document.hidden && poll());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
addEventListener("hashchange", start);
document.addEventListener("keydown", (event) => {
  if ($("dialog[open]")) return;
  const typing = event.target.matches("textarea, select, input:not([type=range]):not([type=checkbox])");
  const replayed = !typing && !busy && !$("#replay").hidden;
  const actions = [
    [event.key === "Enter" && (event.ctrlKey || event.metaKey), () => (comparing ? compare() : write())],
    [event.altKey && event.code === "KeyR", rewrite],
    [event.key === "Escape" && busy, () => busy.abort()],
    [event.key === "Escape" && replay.cursor !== null, () => (replay.pause(), replay.show(null))],
    [event.key === "?" && !typing, () => $("#help-dialog").showModal()],
    [event.key === "[" && replayed, () => replay.move(-1)],
    [event.key === "]" && replayed, () => replay.move(1)],
    [event.key === "Home" && replayed, () => (replay.pause(), replay.show(0))],
    [event.key === "End" && replayed, () => (replay.pause(), replay.show(null))],
  ];
  const action = actions.find(([wanted]) => wanted)?.[1];
  if (!action) return;
  event.preventDefault();
  action();
});

if (matchMedia("(max-width: 60rem)").matches) $("#settings").open = false;
replay.pause();
start();
await poll();
