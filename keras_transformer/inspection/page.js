"use strict";
const data = JSON.parse(document.getElementById("trace").textContent);
const $ = (id) => document.getElementById(id);
const arrays = data.arrays.map(decode);
const dark = matchMedia("(prefers-color-scheme: dark)");
const state = { tab: data.tabs[0].name, token: -1, layer: 0, head: 0 };

function decode({ text, kind }) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  if (kind === "f4") return new Float32Array(bytes.buffer);
  if (kind === "i4") return new Int32Array(bytes.buffer);
  if (kind === "u1") return bytes;
  return Float32Array.from(new Uint16Array(bytes.buffer), (h) => {
    const sign = h & 0x8000 ? -1 : 1, exponent = (h >> 10) & 31, part = h & 1023;
    if (exponent === 31) return part ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + part / 1024) : 2 ** -14 * (part / 1024));
  });
}

const format = (x) => {
  if (!Number.isFinite(x)) return x > 0 ? "∞" : x < 0 ? "−∞" : "NaN";
  const text = x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e4) ? x.toExponential(1) : String(+x.toFixed(4));
  return text.replace("-", "−");
};

function make(tag, parent, text, name) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  if (name) element.className = name;
  parent.append(element);
  return element;
}

const tab = () => data.tabs.find((x) => x.name === state.tab);
const layer = () => tab().layers[state.layer];
const tokens = (input, count) => (data.tokens[input] || []).concat(Array.from({ length: count }, (_, i) => String(i))).slice(0, count);
const color = (share) => {
  const strength = Math.sqrt(Math.max(0, Math.min(1, share)));
  return dark.matches
    ? `rgb(${28 + 200 * strength},${30 + 150 * strength},${38 + 40 * strength})`
    : `rgb(${250 - 225 * strength},${250 - 170 * strength},${252 - 90 * strength})`;
};

// One head's weights, a row for each query; the row of the chosen token is framed.
function drawHead(canvas, at, head, labels) {
  const { rows, columns, weights } = at;
  const ratio = devicePixelRatio || 1, margin = labels ? 74 : 0;
  const width = canvas.clientWidth, size = Math.max(1, (width - margin) / columns);
  const cell = labels ? Math.min(size, 44) : size;
  const height = Math.round(margin + (labels ? cell : Math.min(cell, width / rows)) * rows);
  canvas.style.height = height + "px";
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.scale(ratio, ratio);
  const down = (height - margin) / rows;
  for (let i = 0; i < rows; i++)
    for (let j = 0; j < columns; j++) {
      context.fillStyle = color(arrays[weights][(head * rows + i) * columns + j]);
      context.fillRect(margin + j * cell, margin + i * down, cell + 0.5, down + 0.5);
    }
  context.strokeStyle = dark.matches ? "#fff" : "#c2410c";
  context.lineWidth = labels ? 2 : 1;
  context.strokeRect(margin + 0.5, margin + state.token * down + 0.5, cell * columns - 1, Math.max(1, down - 1));
  if (!labels) return;
  context.fillStyle = getComputedStyle(document.body).color;
  context.font = "12px system-ui, sans-serif";
  const shown = (names, step) => names.map((name, i) => [name.length > 9 ? name.slice(0, 8) + "…" : name, i]).filter(([, i]) => step >= 9 || i % Math.ceil(9 / step) === 0);
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (const [name, i] of shown(tokens(at.query, rows), down)) context.fillText(name, margin - 6, margin + (i + 0.5) * down);
  context.textAlign = "left";
  for (const [name, j] of shown(tokens(at.key, columns), cell)) {
    context.save();
    context.translate(margin + (j + 0.5) * cell, margin - 6);
    context.rotate(-Math.PI / 3);
    context.fillText(name, 0, 0);
    context.restore();
  }
  canvas.place = (event) => {
    const box = canvas.getBoundingClientRect();
    const j = Math.floor((event.clientX - box.left - margin) / cell), i = Math.floor((event.clientY - box.top - margin) / down);
    return i >= 0 && j >= 0 && i < rows && j < columns ? [i, j] : null;
  };
}

function drawTabs() {
  $("tabs").replaceChildren();
  for (const { name } of data.tabs) {
    const button = make("button", $("tabs"), name);
    button.setAttribute("aria-pressed", name === state.tab);
    button.onclick = () => choose({ tab: name, layer: 0, head: 0, token: -1 });
  }
}

function drawTokens() {
  $("tokens").replaceChildren();
  const { query, rows } = layer();
  tokens(query, rows).forEach((name, i) => {
    const button = make("button", $("tokens"), name || " ");
    button.title = `position ${i}`;
    button.setAttribute("aria-pressed", i === state.token);
    button.onclick = () => choose({ token: i });
  });
}

function drawGrid() {
  const { layers } = tab();
  if ($("grid").dataset.tab !== state.tab) {
    $("grid").replaceChildren();
    $("grid").dataset.tab = state.tab;
    layers.forEach((at, i) => {
      const row = make("div", $("grid"), undefined, "row");
      make("span", row, at.label, "label").title = at.path;
      for (let head = 0; head < at.heads; head++) {
        const canvas = make("canvas", row);
        canvas.tabIndex = -1;
        canvas.title = `${at.path}, head ${head}`;
        canvas.onclick = () => choose({ layer: i, head });
      }
    });
  }
  layers.forEach((at, i) => {
    [...$("grid").children[i].querySelectorAll("canvas")].forEach((canvas, head) => {
      canvas.className = i === state.layer && head === state.head ? "chosen" : "";
      drawHead(canvas, at, head, false);
    });
  });
}

function drawLarge() {
  const at = layer(), canvas = $("large");
  $("title").textContent = `${at.path}, head ${state.head}`;
  drawHead(canvas, at, state.head, true);
  canvas.onmousemove = (event) => {
    const place = canvas.place(event);
    if (!place) return;
    const [i, j] = place, weight = arrays[at.weights][(state.head * at.rows + i) * at.columns + j];
    $("value").textContent = `“${tokens(at.query, at.rows)[i]}” → “${tokens(at.key, at.columns)[j]}”: ${format(weight)}`;
  };
  canvas.onclick = (event) => {
    const place = canvas.place(event);
    if (place) choose({ token: place[0] });
  };
  const row = Array.from({ length: at.columns }, (_, j) => arrays[at.weights][(state.head * at.rows + state.token) * at.columns + j]);
  const best = row.map((x, j) => [x, j]).sort((a, b) => b[0] - a[0]).slice(0, 3);
  const told = best.filter(([x]) => x > 0).map(([x, j]) => `“${tokens(at.key, at.columns)[j]}” ${format(x)}`);
  $("value").textContent = `“${tokens(at.query, at.rows)[state.token]}” attends to ${told.join(", ") || "nothing"}`;
}

function drawImage() {
  const picture = data.image && data.image.input === layer().key ? data.image : null;
  $("picture").hidden = !picture;
  if (!picture) return;
  const { width, height, channels, pixels, down, across, front } = picture, canvas = $("picture");
  canvas.width = canvas.clientWidth;
  canvas.height = (canvas.clientWidth * height) / width;
  const context = canvas.getContext("2d"), small = new OffscreenCanvas(width, height), image = new ImageData(width, height);
  for (let i = 0; i < width * height; i++)
    for (let c = 0; c < 4; c++) image.data[4 * i + c] = c === 3 ? 255 : arrays[pixels][channels * i + (channels === 3 ? c : 0)];
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, 0, 0, canvas.width, canvas.height);
  const at = layer(), w = canvas.width / across, h = canvas.height / down;
  const row = (j) => arrays[at.weights][(state.head * at.rows + state.token) * at.columns + j];
  let largest = 1e-9;
  for (let j = front; j < at.columns; j++) largest = Math.max(largest, row(j));
  for (let j = front; j < at.columns; j++) {
    const x = ((j - front) % across) * w, y = Math.floor((j - front) / across) * h;
    context.fillStyle = `rgba(0,0,0,${0.65 * (1 - row(j) / largest)})`;
    context.fillRect(x, y, w, h);
    context.strokeStyle = j === state.token ? "#f97316" : "rgba(128,128,128,.5)";
    context.lineWidth = j === state.token ? 3 : 1;
    context.strokeRect(x + 0.5, y + 0.5, w - 1, h - 1);
  }
  canvas.onclick = (event) => {
    const box = canvas.getBoundingClientRect();
    choose({ token: front + Math.floor((event.clientY - box.top) / h) * across + Math.floor((event.clientX - box.left) / w) });
  };
}

// The numbers of a step at a position: a list of rows, one for each head.
function numbersOf(step, position) {
  if (step.array === null) return null;
  const all = arrays[step.array], shape = step.shape;
  if (step.axis === null) return shape.length === 1 ? [all] : null;
  if (step.axis === 0) {
    const size = shape.slice(1).reduce((a, b) => a * b, 1);
    return position < shape[0] ? [all.subarray(position * size, (position + 1) * size)] : null;
  }
  const [heads, rows, size] = shape;
  if (position >= rows) return null;
  return Array.from({ length: heads }, (_, h) => all.subarray((h * rows + position) * size, (h * rows + position + 1) * size));
}

// The formula of a step's first number, with the numbers put in.
function example(step, position) {
  const found = numbersOf(step, position), sources = step.sources.map((i) => (i === null ? null : data.steps[i]));
  if (!found) return null;
  const heads = found.length, head = heads > 1 ? Math.min(state.head, heads - 1) : 0, result = found[head];
  const at = (source, where = position) => {
    const rows = source && numbersOf(source, where);
    return rows && (rows.length > 1 ? rows[Math.floor((head * rows.length) / heads)] : rows[0]);
  };
  const few = (terms, sign = " + ") => terms.slice(0, 4).join(sign) + (terms.length > 4 ? `${sign}… (${terms.length} terms)` : "");
  const [a, b] = [at(sources[0]), sources[1] && at(sources[1])];
  if (step.column !== null && a) {
    const column = arrays[step.column], base = step.start === null ? "" : ` + ${format(step.start)}`;
    return `${few(Array.from(column, (w, i) => `${format(a[i])} · ${format(w)}`))}${base} = ${format(found[0][0])}`;
  }
  const key = sources[1] && step.name === "scores" ? argmax(result) : 0;
  const seen = step.name === "scores" && at(sources[1], key);
  if (seen) return `with “${tokens(sources[1].of, key + 1)[key]}”: ${few(Array.from(a, (x, i) => `${format(x)} · ${format(seen[i])}`))} = ${format(result[key])}`;
  if (step.kind === "scaled" && a) return `${format(a[0])} · ${format(step.factor)} = ${format(result[0])}`;
  if (step.kind === "softmax" && a) {
    const best = argmax(result);
    return `exp(${format(a[best])}) / (${few(Array.from(a, (x) => `exp(${format(x)})`))}) = ${format(result[best])}`;
  }
  if (step.name === "attended" && a && sources[1].array !== null) {
    const terms = Array.from(a, (w, j) => `${format(w)} · ${format(at(sources[1], j)[0])}`);
    return `${few(terms)} = ${format(result[0])}`;
  }
  if (step.kind === "sum" && a && b) return `${format(a[0])} + ${format(b[0])} = ${format(result[0])}`;
  if ((step.kind === "layer_norm" || step.kind === "rms_norm") && a) {
    const mean = a.reduce((x, y) => x + y, 0) / a.length, square = a.reduce((x, y) => x + y * y, 0) / a.length;
    return step.kind === "rms_norm" ? `${format(a[0])} / √${format(square)}, then the gain: ${format(result[0])}`
      : `(${format(a[0])} − ${format(mean)}) / √${format(square - mean * mean)}, then gain and shift: ${format(result[0])}`;
  }
  return a ? `${format(a[0])} → ${format(result[0])}` : null;
}

const argmax = (list) => list.reduce((best, x, i) => (x > list[best] ? i : best), 0);

function drawWalk() {
  const open = new Set([...$("walk").querySelectorAll("details[open]")].map((x) => x.dataset.path)), of = layer().query;
  $("walk").replaceChildren();
  let place = null;
  for (const step of data.steps) {
    if (step.of !== of) continue;
    const parent = step.path.slice(0, step.path.lastIndexOf("/"));
    if (parent !== place) make("h3", $("walk"), (place = parent));
    const details = make("details", $("walk"));
    details.dataset.path = step.path;
    const summary = make("summary", details), rows = numbersOf(step, state.token);
    make("b", summary, step.name);
    make("span", summary, `[${step.shape.join(", ")}]`, "shape");
    const shown = rows && (rows.length > 1 ? rows[Math.min(state.head, rows.length - 1)] : rows[0]);
    make("code", summary, shown ? Array.from(shown.slice(0, 6), format).join("  ") + (shown.length > 6 ? " …" : "") : step.left ? "left out" : "");
    const fill = () => {
      if (details.childElementCount > 1 || !details.open) return;
      if (step.formula) make("p", details, step.formula, "formula");
      const told = example(step, state.token);
      if (told) make("p", details, told, "example");
      for (const [i, row] of (rows || []).entries()) make("pre", details, (rows.length > 1 ? `head ${i}  ` : "") + Array.from(row, format).join("  "));
    };
    details.ontoggle = fill;
    details.open = open.has(step.path);
    fill();
  }
}

function drawAnswers() {
  $("answers").replaceChildren();
  const list = data.answers && (data.answers.of === layer().query || data.answers.of === null) ? data.answers.rows[Math.min(state.token, data.answers.rows.length - 1)] : null;
  $("next").hidden = !list;
  for (const [name, share] of list || []) {
    const bar = make("div", $("answers"), undefined, "bar");
    make("span", bar, name);
    const fill = make("i", make("span", bar, undefined, "track"));
    fill.style.width = `${100 * share}%`;
    make("span", bar, format(share));
  }
}

function draw() {
  const at = layer();
  state.token = (state.token + at.rows) % at.rows;
  state.head = Math.min(state.head, at.heads - 1);
  for (const part of [drawTabs, drawTokens, drawGrid, drawLarge, drawImage, drawAnswers, drawWalk]) part();
}

function choose(changes) {
  Object.assign(state, changes);
  draw();
  try {
    history.replaceState(null, "", "#" + new URLSearchParams(state));
  } catch { /* A page inside a notebook has no address of its own. */ }
}

function fromHash() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (data.tabs.some((x) => x.name === wanted.get("tab"))) state.tab = wanted.get("tab");
  const number = (name, count, otherwise) => {
    const value = parseInt(wanted.get(name), 10);
    return value >= 0 && value < count ? value : otherwise;
  };
  state.layer = number("layer", tab().layers.length, 0);
  state.head = number("head", layer().heads, 0);
  state.token = number("token", layer().rows, layer().rows - 1);
}

const KEYS = {
  ArrowLeft: () => ({ token: (state.token + layer().rows - 1) % layer().rows }),
  ArrowRight: () => ({ token: (state.token + 1) % layer().rows }),
  ArrowUp: (event) => (event.shiftKey ? { head: (state.head + layer().heads - 1) % layer().heads } : { layer: Math.max(0, state.layer - 1) }),
  ArrowDown: (event) => (event.shiftKey ? { head: (state.head + 1) % layer().heads } : { layer: Math.min(tab().layers.length - 1, state.layer + 1) }),
};
addEventListener("keydown", (event) => {
  if (!KEYS[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  choose(KEYS[event.key](event));
});
addEventListener("resize", draw);
addEventListener("hashchange", () => { fromHash(); draw(); });
dark.addEventListener("change", draw);
document.title = $("heading").textContent = data.title;
for (const line of data.notes) make("li", $("notes"), line);
fromHash();
draw();
