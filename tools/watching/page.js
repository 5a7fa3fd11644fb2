// Everything that comes from a run is put into the page as text, never as HTML.
"use strict";

const COLOURS = ["#1f77b4", "#d62728", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"];
const LOSSES = "loss (training, and validation as dots)";
const SECONDS = 4;  // between two looks
const FIRST = 3;    // runs that are chosen at the beginning
const chosen = new Map();  // name of a run: its colour
let listed = [], curves = new Map(), looked = false;

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
  if (free) chosen.set(name, free);
}

function showRuns() {
  const wanted = by("filter").value.toLowerCase();
  const rows = listed.filter(run => `${run.name} ${run.status}`.toLowerCase().includes(wanted)).map(run => {
    const row = element("tr");
    const box = element("input", "", {type: "checkbox", "aria-label": run.name});
    box.checked = chosen.has(run.name);
    box.addEventListener("change", () => { choose(run.name, box.checked); look(); });
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

function showTags() {
  const tags = [...new Set([...curves.values()].flatMap(found => found.tags))].sort(
    (a, b) => a.localeCompare(b, "en", {numeric: true}));
  const before = by("tag").value || LOSSES;
  by("tag").replaceChildren(...[LOSSES, ...tags].map(tag => element("option", tag, {value: tag})));
  by("tag").value = tags.includes(before) ? before : LOSSES;
}

function range(values) {
  let low = Math.min(...values), high = Math.max(...values);
  if (!(high > low)) { low -= 0.5; high += 0.5; }
  return [low, high];
}

function showChart() {
  const width = 1200, height = 340, left = 60, bottom = 24, top = 10, right = 10;
  const logarithmic = by("log").checked, losses = by("tag").value === LOSSES;
  const lines = [];
  for (const [name, colour] of chosen) {
    for (const [tag, [steps, values]] of Object.entries(curves.get(name)?.curves ?? {})) {
      const points = steps.map((step, i) => [step, values[i]])
        .map(([step, value]) => [step, value === null || (logarithmic && value <= 0) ? null : logarithmic ? Math.log10(value) : value]);
      lines.push({colour, points, dots: losses && tag === "val/loss", title: `${name}: ${tag}`});
    }
  }
  const known = lines.flatMap(line => line.points.filter(point => point[1] !== null));
  const svg = drawing("svg", {viewBox: `0 0 ${width} ${height}`, role: "img", preserveAspectRatio: "none"});
  by("charts").replaceChildren(svg);
  if (!known.length) return;
  const [x0, x1] = range(known.map(point => point[0])), [y0, y1] = range(known.map(point => point[1]));
  const x = step => left + (step - x0) / (x1 - x0) * (width - left - right);
  const y = value => height - bottom - (value - y0) / (y1 - y0) * (height - top - bottom);
  for (let i = 0; i <= 4; i++) {
    const value = y0 + (y1 - y0) * i / 4, step = Math.round(x0 + (x1 - x0) * i / 4);
    svg.append(drawing("line", {x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid"}));
    const number = drawing("text", {x: left - 6, y: y(value) + 4, "text-anchor": "end"});
    number.textContent = short(logarithmic ? 10 ** value : value);
    const below = drawing("text", {x: x(step), y: height - 6, "text-anchor": i === 4 ? "end" : i ? "middle" : "start"});
    below.textContent = String(step);
    svg.append(number, below);
  }
  for (const line of lines) {
    let path = "", drawn = false;
    for (const [step, value] of line.points) {
      if (value === null) { drawn = false; continue; }
      path += `${drawn ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`;
      drawn = true;
      if (line.dots) svg.append(drawing("circle", {cx: x(step), cy: y(value), r: 4, fill: line.colour}));
    }
    const made = drawing("path", {d: line.dots ? "" : path, stroke: line.colour});
    const title = drawing("title", {});
    title.textContent = line.title;
    made.append(title);
    svg.append(made);
  }
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
  const before = by("of").value;
  by("of").replaceChildren(...names.map(name => element("option", name, {value: name})));
  by("of").value = names.includes(before) ? before : names[0] ?? "";
  const run = by("of").value;
  const figures = Object.entries(curves.get(run)?.pictures ?? {}).map(([tag, step]) => {
    const source = `picture?${new URLSearchParams([["run", run], ["tag", tag], ["step", step]])}`;
    const there = [...by("pictures").children].find(figure => figure.firstChild.getAttribute("src") === source);
    if (there) return there;
    const figure = element("figure");
    figure.append(element("img", "", {src: source, alt: tag}), element("figcaption", `${tag}, step ${step + 1}`));
    return figure;
  });
  by("pictures").replaceChildren(...figures);
}

async function look() {
  try {
    const found = await ask("runs");
    listed = found.runs;
    document.title = by("folder").textContent = found.folder;
    by("left-out").textContent = found.left_out ? `and ${found.left_out} older ones` : "";
    for (const name of [...chosen.keys()]) if (!listed.some(run => run.name === name)) chosen.delete(name);
    if (!looked) listed.slice(0, FIRST).forEach(run => choose(run.name, true));
    looked = true;
    showRuns();
    const tag = by("tag").value || LOSSES;
    const asked = (tag === LOSSES ? ["train/loss", "val/loss"] : [tag]).map(name => ["tag", name]);
    const names = [...chosen.keys()];
    const answers = await Promise.all(names.map(name => ask("curves", [["run", name], ...asked])));
    curves = new Map(names.map((name, i) => [name, answers[i]]));
    by("problems").textContent = answers.map(answer => answer.error).filter(Boolean).join("; ");
    showTags();
    showChart();
    showPictures();
    showDifferences(names.length > 1 ? await ask("differences", names.map(name => ["run", name])) : {rows: [], left_out: 0});
    by("state").textContent = `seen ${new Date().toLocaleTimeString()}`;
  } catch (error) {
    by("state").textContent = `no answer: ${error.message}`;
  }
}

by("filter").addEventListener("input", showRuns);
by("tag").addEventListener("change", look);
by("log").addEventListener("change", showChart);
by("of").addEventListener("change", showPictures);
(async () => {
  for (;;) {
    if (!document.hidden || !looked) await look();
    await new Promise(resolve => setTimeout(resolve, SECONDS * 1000));
  }
})();
