// Everything that comes from a run is put into the page as text, never as HTML.
"use strict";

const COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"];
const LOSSES = "loss (training, and validation as dots)";
const SECONDS = 4;  // between two looks
const FIRST = 3;    // runs that are chosen at the beginning
const WITH_LOSS = [LOSSES, "train/loss", "val/loss"], PAIRS = "val/bigram_loss";
const READ = "the page reads TensorBoard's event files and csv/version_N/metrics.csv in a run's folder, no other logger's";
const chosen = new Map();  // name of a run: its colour
const view = {tag: LOSSES, of: "", runs: null};  // runs: null: nobody has chosen yet
let listed = [], curves = new Map(), looks = 0, seen = false, points = [], pointer = null;

const by = id => document.getElementById(id);

function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function drawing(name, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

async function ask(path, parameters = []) {
  const answer = await fetch(`${path}?${new URLSearchParams(parameters)}`);
  if (!answer.ok) throw new Error(`${path}: ${answer.status}`);
  return answer.json();
}

function age(seconds) {
  for (const [unit, size] of [["d", 86400], ["h", 3600], ["m", 60]]) if (seconds >= size) return `${Math.floor(seconds / size)}${unit}`;
  return `${Math.floor(seconds)}s`;
}

function short(value) {
  if (value === null) return "–";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function choose(name, wanted) {
  if (!wanted) { chosen.delete(name); return; }
  const free = COLOURS.find(colour => ![...chosen.values()].includes(colour));
  if (free && !chosen.has(name)) chosen.set(name, free);
}

// What is looked at stands behind the # of the address, so that it can be kept and passed on.
function readView() {
  const given = new URLSearchParams(location.hash.slice(1));
  view.tag = given.get("tag") ?? LOSSES;
  view.of = given.get("of") ?? "";
  view.runs = given.has("run") ? given.getAll("run") : null;
  by("log").checked = given.has("log");
  by("filter").value = given.get("only") ?? "";
  chosen.clear();
}

function writeView() {
  const given = (view.runs && !view.runs.length ? [""] : view.runs ?? []).map(name => ["run", name]);
  if (view.tag !== LOSSES) given.push(["tag", view.tag]);
  if (by("log").checked) given.push(["log", "1"]);
  if (by("filter").value) given.push(["only", by("filter").value]);
  if (view.of) given.push(["of", view.of]);
  history.replaceState(null, "", `#${new URLSearchParams(given)}`);
}

function showRuns() {
  const wanted = by("filter").value.toLowerCase();
  const rows = listed.filter(run => `${run.name} ${run.status}`.toLowerCase().includes(wanted)).map(run => {
    const row = element("tr");
    const box = element("input", "", {type: "checkbox", "aria-label": run.name});
    box.checked = chosen.has(run.name);
    if (!box.checked && chosen.size === COLOURS.length) {
      box.disabled = true;
      box.title = `${COLOURS.length} at most`;
    }
    box.addEventListener("change", () => {
      choose(run.name, box.checked);
      view.runs = [...chosen.keys()];
      writeView();
      look();
    });
    const first = element("td");
    first.append(box);
    const swatch = element("span", "", {class: "swatch"});
    swatch.style.background = chosen.get(run.name) ?? "transparent";
    first.append(swatch);
    const step = run.step === null ? "–" : run.max_steps ? `${run.step}/${run.max_steps}` : String(run.step);
    row.append(first, element("td", run.name), element("td", run.status.replace("_", " "), {class: run.status}),
      element("td", step, {class: "number"}), element("td", short(run.val_loss), {class: "number"}),
      element("td", age(run.seconds), {class: "number"}), element("td", run.reason));
    return row;
  });
  by("runs").tBodies[0].replaceChildren(...rows);
}

// Where nothing has changed, the list stays as it is: it may be open.
function showOptions(list, texts, value) {
  if (texts.join("\n") !== [...list.options].map(option => option.value).join("\n")) {
    list.replaceChildren(...texts.map(text => element("option", text, {value: text})));
  }
  list.value = value;
}

function showTags() {
  const written = [...curves.values()].flatMap(found => found.tags);
  const tags = [...new Set(view.tag === LOSSES ? written : [...written, view.tag])].sort(
    (a, b) => a.localeCompare(b, "en", {numeric: true}));
  showOptions(by("tag"), [LOSSES, ...tags], view.tag);
}

function showProblems() {
  const found = [...curves], said = found.map(([, answer]) => answer.error).filter(Boolean);
  const drawn = answer => Object.keys(answer.curves).some(tag => tag !== PAIRS || view.tag === PAIRS);
  const without = found.filter(([, answer]) => !answer.error && !answer.tags.length).map(([name]) => name);
  const lacking = found.filter(([, answer]) => answer.tags.length && !drawn(answer)).map(([name]) => name);
  if (without.length) said.push(`no curves of ${without.join(", ")}: ${READ}`);
  if (lacking.length) said.push(`not written by ${lacking.join(", ")}`);
  by("problems").textContent = said.join("; ");
}

function range(values) {
  const low = Math.min(...values), high = Math.max(...values), size = Math.max(Math.abs(low), Math.abs(high));
  const room = high - low > 1e-9 * size ? 0 : 0.1 * size || 0.5;
  return [low - room, high + room];
}

// Multiples of 1, 2 or 5 x 10^n: about as many as asked for.
function roundTicks(low, high, wanted, least = 0) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const size = Math.max(least, power * [1, 2, 5, 10].find(factor => factor * power >= 0.999 * rough));
  const first = Math.ceil(low / size - 1e-6), last = Math.floor(high / size + 1e-6);
  return Array.from({length: last - first + 1}, (_, i) => Number(((first + i) * size).toPrecision(12)));
}

// Of an axis from 10^low to 10^high: decades, or where it has fewer than two, numbers in between.
function logarithmicTicks(low, high, wanted) {
  const all = Array.from({length: Math.floor(high) - Math.floor(low) + 1}, (_, i) => Math.floor(low) + i);
  const within = exponent => exponent >= low - 1e-6 && exponent <= high + 1e-6;
  const decades = all.filter(within), stride = Math.ceil(decades.length / (2 * wanted));
  if (decades.length > 1) return decades.filter(exponent => exponent % stride === 0).map(exponent => Number(`1e${exponent}`));
  const between = all.flatMap(exponent => [1, 2, 5].map(factor => Number(`${factor}e${exponent}`)));
  const some = between.filter(value => within(Math.log10(value)));
  return some.length > 2 ? some : roundTicks(10 ** low, 10 ** high, wanted);
}

function tickText(value) {
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential().replace("+", "") : String(value);
}

function label(svg, text, attributes) {
  const made = drawing("text", attributes);
  made.textContent = text;
  svg.append(made);
}

function showChart() {
  const width = Math.max(by("charts").clientWidth, 240), height = 340, bottom = 44, top = 24, right = 16;
  const logarithmic = by("log").checked, known = value => value !== null && (!logarithmic || value > 0);
  const at = value => logarithmic ? Math.log10(value) : value;
  const lines = [], levels = new Map();  // of counted pairs: the runs that have it
  for (const [name, colour] of chosen) {
    for (const [tag, [steps, values]] of Object.entries(curves.get(name)?.curves ?? {})) {
      const level = values.findLast(known);
      if (tag !== PAIRS || view.tag === PAIRS) {
        lines.push({colour, name, tag, dots: view.tag === LOSSES && tag === "val/loss",
          points: steps.map((step, i) => [step, values[i]])});
      } else if (level !== undefined) {
        levels.set(level, [...levels.get(level) ?? [], name]);
      }
    }
  }
  const shown = lines.flatMap(line => line.points.filter(point => known(point[1])));
  const svg = drawing("svg", {width, height, role: "img", "aria-label": view.tag});
  by("charts").replaceChildren(svg);
  points = [];
  if (!shown.length) { showNearest(); return; }
  const [x0, x1] = range(shown.map(point => point[0]));
  const [y0, y1] = range([...shown.map(point => point[1]), ...levels.keys()].map(at));
  const ticks = logarithmic ? logarithmicTicks(y0, y1, 5) : roundTicks(y0, y1, 5);
  const left = 20 + 7 * Math.max(...ticks.map(value => tickText(value).length));
  const x = step => left + (step - x0) / (x1 - x0) * (width - left - right);
  const y = value => height - bottom - (at(value) - y0) / (y1 - y0) * (height - top - bottom);
  for (const value of ticks) {
    svg.append(drawing("line", {x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid"}));
    label(svg, tickText(value), {x: left - 8, y: y(value) + 4, "text-anchor": "end", class: "value"});
  }
  for (const step of roundTicks(x0, x1, Math.max(2, (width - left - right) / 80), 1)) {
    svg.append(drawing("line", {x1: x(step), x2: x(step), y1: height - bottom, y2: height - bottom + 4, class: "tick"}));
    label(svg, step.toLocaleString("en"), {x: x(step), y: height - bottom + 18, "text-anchor": "middle", class: "step"});
  }
  label(svg, "step", {x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle"});
  label(svg, view.tag + (logarithmic ? ", logarithmic" : ""), {x: left, y: 14});
  for (const [level, names] of levels) {
    const colour = levels.size > 1 ? chosen.get(names[0]) : "#555";
    svg.append(drawing("line", {x1: left, x2: width - right, y1: y(level), y2: y(level), stroke: colour, class: "level"}));
  }
  for (const line of lines) {
    let path = "";
    line.points.forEach(([step, value], i) => {
      if (!known(value)) return;
      const [before, after] = [i - 1, i + 1].map(j => j in line.points && known(line.points[j][1]));
      path += `${before ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
      points.push({x: x(step), y: y(value), text: `step ${step.toLocaleString("en")}: ${short(value)} (${line.name}, ${line.tag})`});
      if (line.dots || !before && !after) svg.append(drawing("circle", {cx: x(step), cy: y(value), r: 3.5, fill: line.colour}));
    });
    if (!line.dots) svg.append(drawing("path", {d: path, stroke: line.colour}));
  }
  for (const level of levels.keys()) label(svg, `counted pairs ${short(level)}`, {x: left + 4, y: y(level) - 4, class: "level"});
  showNearest();
}

function showNearest() {
  const far = point => Math.hypot(point.x - pointer[0], point.y - pointer[1]);
  const nearest = pointer && points.length ? points.reduce((a, b) => far(b) < far(a) ? b : a) : null;
  by("nearest").textContent = nearest?.text ?? "";
  by("charts").querySelector(".nearest")?.remove();
  if (nearest) by("charts").firstChild.append(drawing("circle", {cx: nearest.x, cy: nearest.y, r: 5, class: "nearest"}));
}

function showDifferences(found) {
  const table = by("differences"), names = [...chosen.keys()];
  const head = element("tr");
  head.append(element("th", "setting"), ...names.map(name => element("th", name)));
  table.tHead.replaceChildren(...(found.rows.length ? [head] : []));
  const rows = found.rows.map(cells => {
    const row = element("tr");
    row.append(...cells.map(cell => element("td", cell)));
    return row;
  });
  if (found.left_out) rows.push(element("tr", `and ${found.left_out} more`));
  if (!rows.length) rows.push(element("tr", names.length > 1 ? "None." : "Choose two runs or more."));
  table.tBodies[0].replaceChildren(...rows);
}

function showPictures() {
  const names = [...chosen.keys()].filter(name => Object.keys(curves.get(name)?.pictures ?? {}).length);
  const run = names.includes(view.of) ? view.of : names[0] ?? "";
  showOptions(by("of"), names, run);
  by("no-pictures").textContent = names.length ? "" : "None: pictures of depth are in TensorBoard's event files.";
  const figures = Object.entries(curves.get(run)?.pictures ?? {}).map(([tag, step]) => {
    const source = `picture?${new URLSearchParams([["run", run], ["tag", tag], ["step", step]])}`;
    const there = [...by("pictures").children].find(figure => figure.querySelector("img").getAttribute("src") === source);
    if (there) return there;
    const figure = element("figure");
    figure.append(element("figcaption", `${tag}, step ${step}`), element("img", "", {src: source, alt: tag}));
    return figure;
  });
  by("pictures").replaceChildren(...figures);
}

// One that is overtaken, as somebody has chosen something else meanwhile, shows nothing.
async function look() {
  const mine = ++looks;
  try {
    const found = await ask("runs");
    if (mine !== looks) return;
    listed = found.runs;
    document.title = by("folder").textContent = found.folder;
    by("left-out").textContent = found.left_out ? `and ${found.left_out} older ones` : "";
    const all = listed.map(run => run.name);
    for (const name of [...chosen.keys()]) if (!all.includes(name)) chosen.delete(name);
    if (view.runs || !chosen.size) (view.runs?.filter(name => all.includes(name)) ?? all.slice(0, FIRST)).forEach(name => choose(name, true));
    showRuns();
    const tags = view.tag === LOSSES ? ["train/loss", "val/loss"] : [view.tag];
    const asked = (WITH_LOSS.includes(view.tag) ? [...tags, PAIRS] : tags).map(name => ["tag", name]);
    const names = [...chosen.keys()];
    const answers = await Promise.all(names.map(name => ask("curves", [["run", name], ...asked])));
    const differences = names.length > 1 ? await ask("differences", names.map(name => ["run", name])) : {rows: [], left_out: 0};
    if (mine !== looks) return;
    curves = new Map(names.map((name, i) => [name, answers[i]]));
    showProblems();
    showTags();
    showChart();
    showPictures();
    showDifferences(differences);
    by("state").textContent = `seen ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    if (mine === looks) by("state").textContent = `no answer: ${error.message}`;
  }
}

by("filter").addEventListener("input", () => { writeView(); showRuns(); });
by("tag").addEventListener("change", () => { view.tag = by("tag").value; writeView(); look(); });
by("log").addEventListener("change", () => { writeView(); showChart(); });
by("of").addEventListener("change", () => { view.of = by("of").value; writeView(); showPictures(); });
by("charts").addEventListener("pointermove", event => {
  const edge = by("charts").getBoundingClientRect();
  pointer = [event.clientX - edge.left, event.clientY - edge.top];
  showNearest();
});
by("charts").addEventListener("pointerleave", () => { pointer = null; showNearest(); });
addEventListener("resize", showChart);
addEventListener("hashchange", () => { readView(); look(); });
readView();
(async () => {
  for (;;) {
    if (!document.hidden || !seen) await look();
    seen = true;
    await new Promise(resolve => setTimeout(resolve, SECONDS * 1000));
  }
})();
