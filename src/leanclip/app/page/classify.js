// Classify: bars of probabilities, and for the label that is chosen where the model looked.
import { ask, byId, formOf, linesOf, make, receive, sentence, thumbnail, tooLarge } from "./shared.js";

const OWN = "own";
const SENTENCES = {
  default: { name: "a photo of a {}.", templates: ["a photo of a {}."] }, // or as the server says
  word: { name: "the label alone: {}", templates: ["{}"] },
  several: {
    name: "the mean of five sentences",
    templates: ["a photo of a {}.", "a picture of the {}.", "a drawing of a {}.", "a close-up of a {}.", "many {}."],
  },
  calibrated: { name: "those of the calibration", templates: [] },
  [OWN]: { name: "your own …", templates: [] },
};
const KEPT = "leanclip-label-sets"; // in this browser

let file = null;
let sets = []; // of the server
let chosen = { labels: [], templates: [] }; // of the bars
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
  offerSentences();
  return { shown: () => {}, about };
}

function about(facts) {
  if (facts.templates.length) {
    SENTENCES.default = { name: facts.templates.join(" / "), templates: facts.templates };
  }
  if (JSON.stringify(facts.label_sets) !== JSON.stringify(sets)) {
    sets = facts.label_sets;
    offerSets();
  }
  const calibrated = sets.find((set) => set.templates);
  if (calibrated) SENTENCES.calibrated.templates = calibrated.templates;
  offerSentences();
}

function kept() {
  try {
    return JSON.parse(localStorage.getItem(KEPT)) ?? {};
  } catch {
    return {};
  }
}

function offerSets(selected = "") {
  const select = byId("classify-set");
  const options = [make("option", { value: "", textContent: "your own words" })];
  for (const set of sets) {
    options.push(make("option", { value: `server:${set.name}`, textContent: `${set.name} (${set.labels.length})` }));
  }
  for (const [name, labels] of Object.entries(kept())) {
    options.push(make("option", { value: `kept:${name}`, textContent: `${name} (${labels.length}, saved here)` }));
  }
  select.replaceChildren(...options);
  select.value = selected;
  byId("classify-delete").hidden = !selected.startsWith("kept:");
}

function offerSentences() {
  const select = byId("classify-template");
  const before = select.value || "default";
  const names = Object.keys(SENTENCES).filter(
    (name) => name !== "calibrated" || SENTENCES.calibrated.templates.length,
  );
  select.replaceChildren(
    ...names.map((name) => make("option", { value: name, textContent: SENTENCES[name].name })),
  );
  select.value = before;
}

function useSet() {
  const value = byId("classify-set").value;
  byId("classify-delete").hidden = !value.startsWith("kept:");
  const name = value.slice(value.indexOf(":") + 1);
  if (value.startsWith("kept:")) byId("classify-labels").value = (kept()[name] ?? []).join("\n");
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
    byId("classify-error").textContent = "Type two labels or more, one a line.";
    return;
  }
  const name = labels.slice(0, 3).join(", ") + (labels.length > 3 ? " …" : "");
  localStorage.setItem(KEPT, JSON.stringify({ ...kept(), [name]: labels }));
  offerSets(`kept:${name}`);
  byId("classify-status").textContent = `Saved in this browser: ${name}`;
}

function deleteSet() {
  const name = byId("classify-set").value.slice("kept:".length);
  const rest = kept();
  delete rest[name];
  localStorage.setItem(KEPT, JSON.stringify(rest));
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
  return name === OWN ? linesOf(byId("classify-templates").value) : SENTENCES[name].templates;
}

async function classify() {
  const error = byId("classify-error");
  const labels = linesOf(byId("classify-labels").value);
  error.textContent = "";
  if (!file) {
    error.textContent = "Choose an image.";
    return;
  }
  const asked = { image: file, labels, templates: templates(), top: 10 };
  if (!asked.templates.length) {
    error.textContent = "Write a sentence with {} for the label.";
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
  const best = found.guesses[0];
  byId("classify-status").textContent = found.none_of_these
    ? `${found.image}: none of these.`
    : `${found.image}: ${best.label}, ${percent(best.probability)}.`;
  byId("classify-heading").textContent = found.none_of_these ? "None of these; the nearest" : "Probabilities";
  byId("classify-note").textContent = found.calibrated
    ? "Calibrated: of images like those that it was calibrated on, these probabilities come true as often as they say."
    : "Shares among these labels alone: something has to be the first, even where none fits.";
  const bars = found.guesses.map((guess) => {
    const fill = make("span");
    fill.style.width = `${100 * guess.probability}%`;
    const words = make(
      "span",
      { className: "words" },
      make("span", { textContent: guess.label }),
      make("span", { textContent: percent(guess.probability) }),
    );
    const button = make("button", { type: "button", title: "Where did it look for this?" }, words, make("span", { className: "track" }, fill));
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", () => look(guess.label, button));
    return make("li", {}, button);
  });
  byId("classify-bars").replaceChildren(...bars);
  byId("classify-result").hidden = false;
  look(best.label, bars[0].firstChild);
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
    const what = label === null ? "whatever the words" : `for “${label}”`;
    image.alt = `Heat map of where the model looked ${what}`;
    byId("classify-caption").textContent = `Where the model looked ${what}: yellow is the most. It sees the square in the middle of an image.`;
    byId("classify-heat").hidden = false;
  } catch (problem) {
    byId("classify-error").textContent = sentence(problem.message);
  }
}

const percent = (share) => `${(100 * share).toFixed(1)}%`;
