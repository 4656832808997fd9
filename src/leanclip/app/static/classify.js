// Classify: bars of probabilities, and a heat map for the selected label.
import { ask, byId, formOf, linesOf, make, receive, sentence, thumbnail, tooLarge } from "./shared.js";

const OWN = "own";
const TEMPLATES = {
  default: { name: "a photo of a {}.", templates: ["a photo of a {}."] }, // replaced by the server's default
  word: { name: "the label alone: {}", templates: ["{}"] },
  several: {
    name: "ensemble of five templates",
    templates: ["a photo of a {}.", "a picture of the {}.", "a drawing of a {}.", "a close-up of a {}.", "many {}."],
  },
  calibrated: { name: "templates of the calibration", templates: [] },
  [OWN]: { name: "your own …", templates: [] },
};
const STORAGE = "leanclip-label-sets"; // in this browser

let file = null;
let sets = []; // label sets of the server
let chosen = { labels: [], templates: [] }; // what the bars show
let lastMap = 0;

export function startClassify() {
  receive(byId("classify-drop"), byId("classify-file"), {
    take: (files) => take(files[0]),
    fail: (words) => (byId("classify-error").textContent = words),
    isShown: () => !byId("classify").hidden,
  });
  byId("classify-form").addEventListener("submit", (event) => {
    event.preventDefault();
    classify();
  });
  byId("classify-set").addEventListener("change", useSet);
  byId("classify-save").addEventListener("click", saveSet);
  byId("classify-delete").addEventListener("click", deleteSet);
  byId("classify-whole").addEventListener("click", () => look(null));
  byId("classify-template").addEventListener("change", () => {
    byId("classify-own").hidden = byId("classify-template").value !== OWN;
  });
  offerSets();
  offerTemplates();
}

export function describeClassify(facts) {
  if (facts.templates.length) {
    TEMPLATES.default = { name: facts.templates.join(" / "), templates: facts.templates };
  }
  if (JSON.stringify(facts.label_sets) !== JSON.stringify(sets)) {
    sets = facts.label_sets;
    offerSets();
  }
  const calibrated = sets.find((set) => set.templates);
  if (calibrated) TEMPLATES.calibrated.templates = calibrated.templates;
  offerTemplates();
}

function saved() {
  try {
    return JSON.parse(localStorage.getItem(STORAGE)) ?? {};
  } catch {
    return {};
  }
}

function offerSets(selected = "") {
  const select = byId("classify-set");
  const options = [make("option", { value: "", textContent: "your own labels" })];
  for (const set of sets) {
    options.push(make("option", { value: `server:${set.name}`, textContent: `${set.name} (${set.labels.length})` }));
  }
  for (const [name, labels] of Object.entries(saved())) {
    options.push(make("option", { value: `saved:${name}`, textContent: `${name} (${labels.length}, saved here)` }));
  }
  select.replaceChildren(...options);
  select.value = selected;
  byId("classify-delete").hidden = !selected.startsWith("saved:");
}

function offerTemplates() {
  const select = byId("classify-template");
  const before = select.value || "default";
  const names = Object.keys(TEMPLATES).filter(
    (name) => name !== "calibrated" || TEMPLATES.calibrated.templates.length,
  );
  select.replaceChildren(
    ...names.map((name) => make("option", { value: name, textContent: TEMPLATES[name].name })),
  );
  select.value = before;
}

function useSet() {
  const value = byId("classify-set").value;
  byId("classify-delete").hidden = !value.startsWith("saved:");
  const name = value.slice(value.indexOf(":") + 1);
  if (value.startsWith("saved:")) byId("classify-labels").value = (saved()[name] ?? []).join("\n");
  if (value.startsWith("server:")) {
    const set = sets.find((one) => one.name === name);
    byId("classify-labels").value = set.labels.join("\n");
    if (set.templates) byId("classify-template").value = "calibrated";
    byId("classify-own").hidden = true;
  }
}

function saveSet() {
  const labels = linesOf(byId("classify-labels").value);
  if (labels.length < 2) {
    byId("classify-error").textContent = "Enter at least two labels, one per line.";
    return;
  }
  const name = labels.slice(0, 3).join(", ") + (labels.length > 3 ? " …" : "");
  localStorage.setItem(STORAGE, JSON.stringify({ ...saved(), [name]: labels }));
  offerSets(`saved:${name}`);
  byId("classify-status").textContent = `Saved in this browser: ${name}`;
}

function deleteSet() {
  const name = byId("classify-set").value.slice("saved:".length);
  const rest = saved();
  delete rest[name];
  localStorage.setItem(STORAGE, JSON.stringify(rest));
  offerSets();
  byId("classify-set").focus();
  byId("classify-status").textContent = `Deleted: ${name}`;
}

function take(given) {
  const wrong = tooLarge(given);
  byId("classify-error").textContent = wrong ?? "";
  if (wrong) return;
  file = given;
  const row = thumbnail(file, () => {
    file = null;
    byId("classify-image").replaceChildren();
    byId("classify-result").hidden = true;
    byId("classify-file").focus();
  });
  byId("classify-image").replaceChildren(row);
  classify();
}

function templates() {
  const name = byId("classify-template").value;
  return name === OWN ? linesOf(byId("classify-templates").value) : TEMPLATES[name].templates;
}

async function classify() {
  const error = byId("classify-error");
  const labels = linesOf(byId("classify-labels").value);
  error.textContent = "";
  if (!file) {
    error.textContent = "Add an image.";
    return;
  }
  const asked = { image: file, labels, templates: templates(), top: 10 };
  if (!asked.templates.length) {
    error.textContent = "Enter a template with {} for the label.";
    return;
  }
  byId("classify-status").textContent = "Classifying …";
  try {
    const found = await ask("api/classify", formOf(asked));
    chosen = asked;
    show(found);
  } catch (problem) {
    byId("classify-result").hidden = true;
    byId("classify-status").textContent = "";
    error.textContent = problem.message;
  }
}

function show(found) {
  const first = found.predictions[0];
  byId("classify-status").textContent = found.none_of_these
    ? `${found.image}: none of these.`
    : `${found.image}: ${first.label}, ${percent(first.probability)}.`;
  byId("classify-heading").textContent = found.none_of_these ? "None of these; the closest labels" : "Probabilities";
  byId("classify-note").textContent = found.calibrated
    ? "Calibrated: on images like those of the calibration, these probabilities match how often the label is right."
    : found.probabilities === "sigmoid"
      ? "Each label has a probability of its own, which does not depend on the others; all may be low."
      : "Probabilities are relative to these labels; one always wins, even if none fits.";
  const bars = found.predictions.map((prediction) => {
    const fill = make("span");
    fill.style.width = `${100 * prediction.probability}%`;
    const words = make(
      "span",
      { className: "words" },
      make("span", { textContent: prediction.label }),
      make("span", { textContent: percent(prediction.probability) }),
    );
    const button = make("button", { type: "button", title: "Show the heat map for this label" }, words, make("span", { className: "track" }, fill));
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => look(prediction.label, button));
    return make("li", {}, button);
  });
  byId("classify-bars").replaceChildren(...bars);
  byId("classify-result").hidden = false;
  look(first.label, bars[0].firstChild);
}

async function look(label, button) {
  const mine = ++lastMap;
  for (const other of byId("classify-bars").querySelectorAll("button")) {
    other.setAttribute("aria-pressed", String(other === button));
  }
  byId("classify-whole").setAttribute("aria-pressed", String(label === null));
  const texts = label === null ? [] : chosen.templates.map((template) => template.replaceAll("{}", label));
  try {
    const picture = await ask("api/attention", formOf({ image: chosen.image, texts }));
    if (mine !== lastMap) return;
    const image = byId("classify-map");
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(picture);
    const what = label === null ? "without a text (attention rollout)" : `for “${label}”`;
    image.alt = `Heat map ${what}`;
    byId("classify-caption").textContent = `Heat map ${what}; yellow is the most. The model sees only the centre crop.`;
    byId("classify-heat").hidden = false;
  } catch (problem) {
    byId("classify-error").textContent = sentence(problem.message);
  }
}

const percent = (fraction) => `${(100 * fraction).toFixed(1)}%`;
