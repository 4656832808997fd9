// The tabs, and the name of the model.
import { startCompare } from "./compare.js";
import { startClassify } from "./classify.js";
import { startSearch } from "./search.js";
import { ask, byId, wait } from "./shared.js";

const names = ["compare", "classify", "search"];
const shown = {}; // callbacks, called when a tab is shown or hidden

function show(name, focus) {
  for (const other of names) {
    const tab = byId(`tab-${other}`);
    const isIt = other === name;
    tab.setAttribute("aria-selected", String(isIt));
    tab.tabIndex = isIt ? 0 : -1;
    byId(other).hidden = !isIt;
    if (isIt && focus) tab.focus();
  }
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  for (const other of names) shown[other]?.(other === name);
}

function startTabs() {
  for (const name of names) byId(`tab-${name}`).addEventListener("click", () => show(name));
  document.querySelector("[role=tablist]").addEventListener("keydown", (event) => {
    const at = names.findIndex((name) => byId(`tab-${name}`) === document.activeElement);
    const moves = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: names.length - 1 };
    if (at < 0 || !(event.key in moves)) return;
    event.preventDefault();
    show(names[(moves[event.key] + names.length) % names.length], true);
  });
  addEventListener("hashchange", () => show(wanted()));
}

function wanted() {
  const name = location.hash.slice(1);
  return names.includes(name) ? name : "compare";
}

function modelWords(about) {
  if (about.state === "loading") return "loading the model …";
  if (!about.model) return "the model could not be loaded";
  return `${about.model.name}, ${about.model.resolution} pixels`;
}

async function start() {
  let about = { state: "loading", label_sets: [], templates: [] };
  startTabs();
  shown.compare = startCompare();
  const classify = startClassify();
  shown.classify = classify.shown;
  const search = startSearch();
  shown.search = search.shown;
  show(wanted());
  while (true) {
    try {
      about = await ask("api/about");
      byId("model").textContent = modelWords(about);
      classify.about(about);
      search.about(about);
      if (about.state !== "loading") return;
    } catch (error) {
      byId("model").textContent = error.message;
    }
    await wait(1000);
  }
}

start();
