// The tabs and the model's name.
import { startCompare } from "./compare.js";
import { describeClassify, startClassify } from "./classify.js";
import { describeSearch, startSearch } from "./search.js";
import { ask, byId, wait } from "./shared.js";

const names = ["compare", "classify", "search"];

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
  startCompare();
  startClassify();
  startSearch();
  show(wanted());
  while (true) {
    try {
      about = await ask("api/about");
      byId("model").textContent = modelWords(about);
      describeClassify(about);
      describeSearch(about);
      if (about.state !== "loading") return;
    } catch (error) {
      byId("model").textContent = error.message;
    }
    await wait(1000);
  }
}

start();
