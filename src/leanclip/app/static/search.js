// Search: a grid that grows while scrolling; clicking a picture finds similar ones.
import { ask, byId, formOf, make, plural, receive, tooLarge } from "./shared.js";

const PART = 30;
let wanted = null; // { words, query } or { words, file }
let offset = 0;
let isEnd = true;
let isAsking = false;
let round = 0;

export function startSearch() {
  receive(byId("search-drop"), byId("search-file"), {
    take: ([file]) => {
      const wrong = tooLarge(file);
      if (wrong) byId("search-error").textContent = wrong;
      else begin({ words: `similar to ${file.name}`, file });
    },
    fail: (words) => (byId("search-error").textContent = words),
    isShown: () => !byId("search").hidden,
  });
  byId("search-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const text = byId("search-text").value.trim();
    const without = byId("search-without").value.trim();
    if (!text) {
      byId("search-error").textContent = "Enter what to search for.";
      return;
    }
    const words = `“${text}”${without ? `, excluding “${without}”` : ""}`;
    begin({ words, query: { q: text, ...(without && { without }) } });
  });
  byId("search-label").addEventListener("change", () => wanted && begin(wanted));
  byId("search-more").addEventListener("click", () => more(true));
  new IntersectionObserver((entries) => {
    if (entries.some((entry) => entry.isIntersecting)) more();
  }, { rootMargin: "300px" }).observe(byId("search-more"));
}

export function describeSearch(facts) {
  if (facts.state === "loading") return;
  const words = byId("search-status");
  if (!facts.index) {
    byId("search-form").hidden = true;
    words.textContent = "No index. Build one with: leanclip search build PHOTOS --model MODEL --out index, then start the page with: leanclip app --index index";
    return;
  }
  words.textContent = `${plural(facts.index.pictures, "image")} in the index.`;
  const options = facts.index.labels.map((label) => make("option", { value: label, textContent: label }));
  byId("search-label").append(...options);
  byId("search-labels").hidden = !options.length;
}

function begin(what) {
  wanted = what;
  offset = 0;
  isEnd = false;
  isAsking = false;
  round += 1;
  byId("search-grid").replaceChildren();
  byId("search-error").textContent = "";
  more();
}

async function more(isFocused) {
  if (isAsking || isEnd || !wanted) return;
  isAsking = true;
  const mine = round;
  const page = { offset, limit: PART, label: byId("search-label").value };
  if (!offset) byId("search-status").textContent = "Searching …";
  try {
    const found = wanted.file
      ? await ask("api/search", formOf({ image: wanted.file, ...page }))
      : await ask(`api/search?${new URLSearchParams({ ...wanted.query, ...page })}`);
    if (mine !== round) return;
    const tiles = found.hits.map(tile);
    byId("search-grid").append(...tiles);
    offset += found.hits.length;
    isEnd = found.is_end || !found.hits.length;
    byId("search-status").textContent = `${isEnd ? plural(offset, "image") : `${offset} or more images`}, most similar first: ${wanted.words}.`;
    if (isFocused) tiles[0]?.firstChild.focus();
  } catch (error) {
    if (mine !== round) return;
    isEnd = true;
    byId("search-status").textContent = "";
    byId("search-error").textContent = error.message;
  }
  isAsking = false;
  const button = byId("search-more");
  button.hidden = isEnd;
  // The button may still be in view, in which case the observer does not fire again.
  if (!isEnd && button.getBoundingClientRect().top < innerHeight + 300) more();
}

function tile(hit) {
  const name = hit.path.split("/").pop();
  const words = hit.caption ?? hit.label ?? name;
  const image = make("img", { src: `api/pictures/${hit.number}`, alt: words, loading: "lazy" });
  const about = make(
    "span",
    { className: "about" },
    make("b", { textContent: hit.score.toFixed(3) }),
    make("span", { textContent: shortened(hit.path) }),
  );
  const button = make("button", { type: "button", title: `${hit.path}\nClick for similar images` }, image, about);
  button.addEventListener("click", () => {
    begin({ words: `similar to ${name}`, query: { like: hit.number } });
    byId("search-status").focus();
    byId("search").scrollIntoView();
  });
  return make("li", {}, button);
}

// The end of a path; the full path is in the title.
function shortened(path) {
  const parts = path.split("/");
  return parts.length > 3 ? `…/${parts.slice(-2).join("/")}` : path;
}
