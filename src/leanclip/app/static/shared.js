// Shared by the tabs.
const MAX_BYTES = Number(document.body.dataset.maxBytes); // per request
const TRIES = 100; // two seconds each, while the model loads
const OVERHEAD = 64 * 1024; // bytes for texts and multipart headers

export const byId = (id) => document.getElementById(id);
export const wait = (ms) => new Promise((done) => setTimeout(done, ms));
export const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;
export const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

// GET, or POST if a form is given. Returns JSON, or a Blob for pictures; throws an Error with a message.
// While the model loads (503), the request is repeated.
export async function ask(path, form) {
  let answer;
  for (let tries = 0; tries < TRIES; tries += 1) {
    try {
      answer = await fetch(path, { method: form ? "POST" : "GET", body: form });
    } catch {
      throw new Error("The server does not answer. Is leanclip app still running?");
    }
    if (answer.status !== 503) break;
    await wait(1000 * Number(answer.headers.get("retry-after") ?? 2));
  }
  if (answer.ok && answer.headers.get("content-type") === "image/jpeg") return answer.blob();
  if (answer.status === 401) location.assign("sign-in");
  let found;
  try {
    found = await answer.json();
  } catch {
    throw new Error(`The server's answer cannot be read (status ${answer.status}).`);
  }
  if (!answer.ok) throw new Error(sentence(found.error ?? `status ${answer.status}`));
  return found;
}

export const sentence = (words) => (/[.!?…]$/.test(words) ? words : `${words}.`);

export function formOf(fields) {
  const form = new FormData();
  for (const [name, values] of Object.entries(fields)) {
    for (const value of [values].flat()) form.append(name, value);
  }
  return form;
}

export function tooLarge(file) {
  if (file.size + OVERHEAD < MAX_BYTES) return null;
  return `${file.name} has ${(file.size / 2 ** 20).toFixed(1)} MB; the limit is ${MAX_BYTES / 2 ** 20} MB.`;
}

// An area to drop, paste or choose images; `take` gets the files of an image type.
export function receive(drop, input, { take, fail, isShown }) {
  const given = (files) => {
    const images = [...files].filter((file) => file.type.startsWith("image/"));
    const others = [...files].filter((file) => !file.type.startsWith("image/"));
    if (others.length) fail(`${others.map((file) => file.name).join(", ")}: not an image.`);
    if (images.length) take(images);
  };
  input.addEventListener("change", () => {
    given(input.files);
    input.value = ""; // so that the same file can be chosen again
  });
  drop.addEventListener("dragover", (event) => {
    event.preventDefault();
    drop.classList.add("over");
  });
  drop.addEventListener("dragleave", () => drop.classList.remove("over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    given(event.dataTransfer.files);
  });
  document.addEventListener("paste", (event) => {
    if (isShown() && event.clipboardData.files.length) given(event.clipboardData.files);
  });
}

export function thumbnail(file, remove) {
  const image = make("img", { src: URL.createObjectURL(file), alt: file.name });
  const button = make("button", { type: "button", textContent: "×", title: `Remove ${file.name}` });
  button.setAttribute("aria-label", `Remove ${file.name}`);
  button.addEventListener("click", remove);
  return make("li", {}, image, button);
}

export function download(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// A fraction from 0 to 1 -> a blue, and black or white text, whichever has more contrast.
export function shade(fraction) {
  const [from, to] = [[240, 246, 255], [18, 62, 132]];
  const mixed = from.map((value, i) => Math.round(value + (to[i] - value) * fraction));
  const [red, green, blue] = mixed.map((value) => ((value / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue; // as defined by WCAG
  return { back: `rgb(${mixed.join(" ")})`, ink: luminance < 0.179 ? "#ffffff" : "#000000" };
}
