// Runs: a list, and the curves of one, asked for again while it trains.
import { ask, byId, make, wait } from "./shared.js";

const SVG = "http://www.w3.org/2000/svg";
const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [400, 220, 52, 10, 10, 24];
let isShown = false;
let isRunning = false; // the loop
let chosen = null; // a run's name
let drawn = ""; // what the curves were drawn from

export function startRuns() {
  return (isIt) => {
    isShown = isIt;
    if (isIt) watch();
  };
}

async function watch() {
  if (isRunning) return;
  isRunning = true;
  while (isShown) {
    let pause = 10_000;
    if (!document.hidden) {
      try {
        const { runs } = await ask("api/runs");
        byId("runs-error").textContent = "";
        list(runs);
        const run = runs.find((one) => one.name === chosen);
        if (run) await show(run);
        if (runs.some((one) => one.state === "running")) pause = 2000;
      } catch (error) {
        byId("runs-error").textContent = error.message;
      }
    }
    for (let waited = 0; waited < pause && isShown; waited += 250) await wait(250);
  }
  isRunning = false;
}

function list(runs) {
  const words = runs.length === 1 ? "1 run." : `${runs.length} runs.`;
  if (byId("runs-status").textContent !== words) byId("runs-status").textContent = words;
  const known = byId("runs-list").children;
  runs.forEach((run, i) => {
    let button = known[i]?.firstChild;
    if (!button) {
      button = make("button", { type: "button" }, make("span"), make("small"));
      button.addEventListener("click", () => choose(button.dataset.name));
      byId("runs-list").append(make("li", {}, button));
    }
    button.dataset.name = run.name; // the same buttons, so that the focus stays
    button.firstChild.textContent = run.name;
    button.lastChild.textContent = facts(run);
    button.setAttribute("aria-current", String(run.name === chosen));
  });
  while (known.length > runs.length) known[runs.length].remove();
}

function facts(run) {
  const of = run.steps ? ` of ${run.steps.toLocaleString("en")}` : "";
  const step = run.step === null ? "" : `, step ${run.step.toLocaleString("en")}${of}`;
  const words = run.state === "silent" ? "no word for two minutes" : run.state;
  return `${words}${step}`;
}

async function choose(name) {
  chosen = name;
  drawn = "";
  for (const item of byId("runs-list").children) {
    item.firstChild.setAttribute("aria-current", String(item.firstChild.dataset.name === name));
  }
  try {
    await show();
    byId("runs-name").focus();
  } catch (error) {
    byId("runs-error").textContent = error.message;
  }
}

async function show() {
  const name = chosen;
  const found = await ask(`api/curves?${new URLSearchParams({ run: name })}`);
  if (name !== chosen) return;
  const { run, curves } = found;
  const last = curves.find((curve) => curve.name === "train/loss")?.steps.at(-1);
  byId("runs-one").hidden = false;
  byId("runs-name").textContent = run.name;
  const when = new Date(1000 * run.changed).toLocaleString();
  const step = last === undefined ? "" : `; curves to step ${last.toLocaleString("en")}`;
  byId("runs-facts").textContent = `${facts(run)}${step}; last written ${when}`;
  const links = byId("runs-links");
  if (run.has_report) {
    const href = `runs/report?${new URLSearchParams({ run: name })}`;
    if (links.firstChild?.getAttribute?.("href") !== href) {
      links.replaceChildren(make("a", { href, target: "_blank", rel: "noopener", textContent: "The evaluation's report" }));
    }
  } else {
    links.textContent = "There is no evaluation report yet.";
  }
  const now = JSON.stringify(curves.map((curve) => [curve.name, curve.steps.length, curve.steps.at(-1)]));
  if (now === drawn) return;
  drawn = now;
  byId("runs-curves").replaceChildren(...curves.map(figure));
  if (!curves.length) byId("runs-curves").textContent = "There are no figures yet.";
}

function figure(curve) {
  const last = short(curve.values.at(-1));
  const caption = make("figcaption", { textContent: `${curve.label}: ${last}` });
  return make("figure", {}, caption, drawing(curve, last));
}

function drawing(curve, last) {
  const { steps, values } = curve;
  const [low, high] = bounds(values);
  const [first, end] = [Math.min(0, steps[0]), Math.max(steps.at(-1), 1)];
  const x = (step) => LEFT + ((step - first) / (end - first)) * (WIDTH - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const svg = element("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, class: "curve", role: "img" });
  svg.setAttribute("aria-label", `${curve.label} by step: ${short(values[0])} at step ${steps[0]}, ${last} at step ${steps.at(-1)}`);
  svg.append(element("path", { class: "frame", d: `M${LEFT} ${TOP}V${HEIGHT - BOTTOM}H${WIDTH - RIGHT}` }));
  for (const value of [low, (low + high) / 2, high]) {
    svg.append(words(short(value), { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }));
  }
  svg.append(words(String(first), { x: LEFT, y: HEIGHT - 8, "text-anchor": "middle" }));
  svg.append(words(`step ${end.toLocaleString("en")}`, { x: WIDTH - RIGHT, y: HEIGHT - 8, "text-anchor": "end" }));
  const points = steps.map((step, i) => `${x(step).toFixed(1)},${y(values[i]).toFixed(1)}`);
  svg.append(element("polyline", { class: "line", points: points.join(" ") }));
  const marked = steps.length <= 40 ? points : points.slice(-1);
  for (const point of marked) {
    const [cx, cy] = point.split(",");
    svg.append(element("circle", { class: "dot", cx, cy, r: 2.5 }));
  }
  return svg;
}

function bounds(values) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  if (low === high) return [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  return [low, high];
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function words(text, attributes) {
  const made = element("text", attributes);
  made.textContent = text;
  return made;
}

function short(value) {
  const size = Math.abs(value);
  if (size !== 0 && (size < 0.001 || size >= 100_000)) return value.toExponential(1);
  return String(Number(value.toPrecision(3)));
}
