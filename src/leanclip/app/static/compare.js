// Compare: one request per image, so that an unreadable one does not affect the others.
import { ask, byId, download, formOf, linesOf, make, plural, receive, shade, thumbnail, tooLarge } from "./shared.js";

const items = []; // { file, url, column: numbers or null, error }
let texts = []; // of the table
let round = 0;
let notTaken = []; // messages about files that are too large

export function startCompare() {
  receive(byId("compare-drop"), byId("compare-files"), {
    take: add,
    fail: (words) => (byId("compare-error").textContent = words),
    isShown: () => !byId("compare").hidden,
  });
  byId("compare-form").addEventListener("submit", (event) => {
    event.preventDefault();
    notTaken = [];
    compare();
  });
  byId("compare-csv").addEventListener("click", () => {
    download(new Blob([csv()], { type: "text/csv" }), "similarity.csv");
  });
  byId("compare-png").addEventListener("click", async () => {
    const canvas = await drawn();
    canvas.toBlob((blob) => download(blob, "similarity.png"), "image/png");
  });
}

function add(files) {
  notTaken = files.map(tooLarge).filter(Boolean);
  byId("compare-error").textContent = notTaken.join(" ");
  for (const file of files.filter((file) => !tooLarge(file))) {
    const item = { file, url: URL.createObjectURL(file), column: null, error: null };
    items.push(item);
    const row = thumbnail(file, () => {
      items.splice(items.indexOf(item), 1);
      row.remove();
      byId("compare-files").focus();
      show();
    });
    byId("compare-images").append(row);
  }
  if (items.length) compare();
}

async function compare() {
  const mine = ++round;
  const asked = linesOf(byId("compare-texts").value);
  const error = byId("compare-error");
  if (!items.length || !asked.length) {
    error.textContent = items.length ? "Enter at least one text, one per line." : "Add at least one image.";
    return;
  }
  byId("compare-status").textContent = "Comparing …";
  const columns = await Promise.all(
    items.map(async (item) => {
      try {
        const found = await ask("api/compare", formOf({ images: item.file, texts: asked }));
        return { column: found.similarity.map((row) => row[0]), error: null };
      } catch (problem) {
        return { column: null, error: problem.message };
      }
    }),
  );
  if (mine !== round) return; // superseded by a later request
  columns.forEach((found, i) => items[i] && Object.assign(items[i], found));
  texts = asked;
  const problems = [...new Set(items.map((item) => item.error).filter(Boolean))];
  error.textContent = [...notTaken, ...problems].join(" ");
  const count = items.filter((item) => item.column).length;
  byId("compare-status").textContent = `${count} of ${plural(items.length, "image")} compared with ${plural(texts.length, "text")}.`;
  show();
}

const good = () => items.filter((item) => item.column?.length === texts.length);

function range() {
  const values = good().flatMap((item) => item.column);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  return (value) => (high > low ? (value - low) / (high - low) : 0.5);
}

function show() {
  const shown = good();
  byId("compare-result").hidden = !shown.length;
  const table = byId("compare-table");
  table.replaceChildren();
  if (!shown.length) return;
  const place = range();
  const head = make("tr", {}, make("th", { scope: "col", textContent: "text" }));
  for (const item of shown) {
    const image = make("img", { src: item.url, alt: "" });
    head.append(make("th", { scope: "col", title: item.file.name }, image, make("span", { textContent: item.file.name })));
  }
  table.append(make("thead", {}, head));
  const body = make("tbody");
  texts.forEach((text, row) => {
    const line = make("tr", {}, make("th", { scope: "row", textContent: text }));
    for (const item of shown) {
      const value = item.column[row];
      const cell = make("td", { textContent: value.toFixed(3) });
      const { back, ink } = shade(place(value));
      cell.style.backgroundColor = back;
      cell.style.color = ink;
      if (value === Math.max(...item.column)) cell.classList.add("best");
      line.append(cell);
    }
    body.append(line);
  });
  table.append(body);
}

function csv() {
  // Spreadsheets would run a cell that starts like a formula; a quote before it prevents that.
  const quoted = (text) => `"${text.replace(/^[=+@\t-]/, "'$&").replaceAll('"', '""')}"`;
  const shown = good();
  const lines = [["text", ...shown.map((item) => item.file.name)].map(quoted).join(",")];
  texts.forEach((text, row) => {
    lines.push([quoted(text), ...shown.map((item) => item.column[row])].join(","));
  });
  return `${lines.join("\r\n")}\r\n`;
}

async function drawn() {
  const shown = good();
  const place = range();
  const [left, top, wide, high] = [260, 150, 120, 44];
  const canvas = make("canvas", { width: left + wide * shown.length + 10, height: top + high * texts.length + 10 });
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#ffffff";
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.textBaseline = "middle";
  pen.font = "15px system-ui, sans-serif";
  for (const [column, item] of shown.entries()) {
    const image = await createImageBitmap(item.file).catch(() => null);
    const x = left + column * wide;
    if (image) {
      const side = Math.min(image.width, image.height);
      const [sx, sy] = [(image.width - side) / 2, (image.height - side) / 2];
      pen.drawImage(image, sx, sy, side, side, x + 5, 10, wide - 10, wide - 10);
    }
    pen.fillStyle = "#0d1520";
    pen.textAlign = "center";
    pen.fillText(short(pen, item.file.name, wide - 8), x + wide / 2, top - 12);
    texts.forEach((_, row) => {
      const { back, ink } = shade(place(item.column[row]));
      pen.fillStyle = back;
      pen.fillRect(x + 1, top + row * high + 1, wide - 2, high - 2);
      pen.fillStyle = ink;
      pen.fillText(item.column[row].toFixed(3), x + wide / 2, top + row * high + high / 2);
    });
  }
  pen.textAlign = "right";
  pen.fillStyle = "#0d1520";
  texts.forEach((text, row) => pen.fillText(short(pen, text, left - 20), left - 10, top + row * high + high / 2));
  return canvas;
}

function short(pen, text, width) {
  if (pen.measureText(text).width <= width) return text;
  let cut = text;
  while (cut && pen.measureText(`${cut}…`).width > width) cut = cut.slice(0, -1);
  return `${cut}…`;
}
