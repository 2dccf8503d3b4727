"use strict";
const {columns, rows} = JSON.parse(document.getElementById("data").textContent);
const CHUNK = 100; // rows that are added at once
const RATINGS = ["look", "accept", "reject"];
const column = Object.fromEntries(columns.map((name, k) => [name, k]));
const get = (row, name) => row[column[name]];
const byId = id => document.getElementById(id);
// a pair without a result is told from a result that is judged a failure
const UNDONE = {failed: "no result", waiting: "waiting"};
const judged = row => UNDONE[get(row, "status")] ?? (get(row, "verdict") || "not judged");
const shownColumns = [
  ["picture", null], ["verdict", null], ["rating", null], ["name", null], ["similarity_after", 3], ["folding_fraction", 5],
  ["jacobian_min", 2], ["jacobian_max", 2], ["dice_after", 3], ["tre_mm_after", 2],
].filter(([name]) => !(name in column) || rows.some(row => get(row, name) !== null));
const titles = {
  similarity_after: "similarity", folding_fraction: "folding", jacobian_min: "Jacobian min", jacobian_max: "Jacobian max",
  dice_after: "Dice", tre_mm_after: "landmarks mm", name: "name and reasons",
};
const hints = {
  similarity_after: "correlation of fixed and warped image; 1 is best",
  folding_fraction: "voxels of the fixed image whose Jacobian determinant is 0 or less",
  jacobian_min: "smallest Jacobian determinant; 1 keeps the volume, 0 or less folds",
  jacobian_max: "largest Jacobian determinant; 1 keeps the volume",
  dice_after: "mean overlap of the labels after registration; 1 is best", tre_mm_after: "mean distance of landmarks after registration",
};
const fixed = (value, digits) => value && Math.abs(value) < 10 ** -digits ? value.toPrecision(1) : value.toFixed(digits); // 0 only for 0
const percent = value => value > 0 && value < 1e-5 ? "< 0.001 %" : (100 * value).toFixed(3) + " %";

// Ratings stay in this browser; where it has no storage, in this window. One made of an earlier result does not count.
const KEY = "ldr-cohort " + location.pathname;
let ratings = {};
try { ratings = JSON.parse(localStorage.getItem(KEY)) || {}; } catch { /* no storage */ }
const resultOf = row => ["status", "similarity_after", "jacobian_min", "jacobian_max"].map(name => get(row, name)).join(" ");
const ratingOf = row => {
  const rating = ratings[get(row, "name")];
  return rating?.result === resultOf(row) ? rating : undefined;
};
function rate(row, value) {
  const name = get(row, "name");
  if (ratingOf(row)?.rating === value) delete ratings[name];
  else ratings[name] = {rating: value, rater: byId("rater").value, time: new Date().toISOString(), result: resultOf(row)};
  try { localStorage.setItem(KEY, JSON.stringify(ratings)); } catch { /* no storage */ }
}

let sorted = {name: null, descending: false}; // null: worst first, the order in which rows came
let shown = rows;
let count = 0;

function cell(tr, text, className) {
  const td = tr.insertCell();
  td.textContent = text ?? "";
  if (className) td.className = className;
  return td;
}
const pictures = new IntersectionObserver(entries => {
  for (const {isIntersecting, target} of entries) {
    if (!isIntersecting) continue;
    pictures.unobserve(target);
    const stored = byId("t" + target.dataset.picture);
    if (stored) target.src = "data:image/jpeg;base64," + stored.textContent;
  }
}, {root: document.querySelector("main"), rootMargin: "400px"});

const rowOf = new WeakMap(); // of a tr
function addRow(row) {
  const tr = byId("body").insertRow();
  tr.tabIndex = 0;
  tr.dataset.name = get(row, "name");
  rowOf.set(tr, row);
  for (const [name, digits] of shownColumns) {
    if (name === "picture") {
      const td = cell(tr);
      if (get(row, "picture") === null) continue;
      const img = document.createElement("img");
      img.alt = "fixed and warped, three planes";
      img.dataset.picture = get(row, "picture");
      img.onclick = () => { tr.focus(); enlarge(byId("large").hidden); };
      td.append(img);
      pictures.observe(img);
    } else if (name === "name") {
      const folder = get(row, "folder");
      const td = cell(tr, folder ? "" : get(row, "name"), "name");
      if (folder) {
        const a = document.createElement("a");
        a.textContent = get(row, "name");
        a.href = folder.split("/").map(encodeURIComponent).join("/") + "/";
        td.append(a);
      }
      const text = get(row, "error") || get(row, "reasons");
      if (text) {
        const div = document.createElement("div");
        div.className = "reasons";
        div.textContent = text;
        div.title = text;
        div.onclick = () => div.classList.toggle("open");
        td.append(div);
      }
    } else if (name === "verdict") cell(tr, judged(row), get(row, "status") === "failed" ? "failed" : judged(row));
    else if (name === "rating") addButtons(cell(tr, "", "rating"), row);
    else {
      const value = get(row, name);
      cell(tr, value === null ? "" : digits === 5 ? percent(value) : fixed(value, digits), "number");
    }
  }
  tr.addEventListener("focusin", () => { current = tr; enlarge(!byId("large").hidden); });
}

let current = null; // the row that keys are for
function step(down) {
  const next = current?.isConnected ? (down ? current.nextElementSibling : current.previousElementSibling) : byId("body").rows[0];
  next?.focus();
}
function enlarge(on) {
  const stored = current && byId("t" + get(rowOf.get(current), "picture"));
  const [img, caption] = byId("large").children;
  byId("large").hidden = !on || !current;
  const {style} = document.querySelector("main");
  style.paddingBottom = style.scrollPaddingBottom = "0";
  if (byId("large").hidden) return;
  img.hidden = !stored;
  if (stored) img.src = "data:image/jpeg;base64," + stored.textContent;
  caption.textContent = current.dataset.name + (stored ? "" : ": no picture");
  style.paddingBottom = style.scrollPaddingBottom = byId("large").offsetHeight + "px"; // the row stays in sight
  current.scrollIntoView({block: "nearest"});
}
byId("large").onclick = () => enlarge(false);
document.onkeydown = event => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
  const key = event.key.toLowerCase(), value = RATINGS.find(rating => rating[0] === key);
  if (key === "arrowdown" || key === "arrowup") step(key === "arrowdown");
  else if (key === "e") enlarge(byId("large").hidden);
  else if (key === "escape") enlarge(false);
  else if (value && current?.isConnected) {
    rate(rowOf.get(current), value);
    press(current, rowOf.get(current));
    step(true);
    tell();
  } else return;
  event.preventDefault();
};
function addButtons(td, row) {
  for (const value of RATINGS) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = value;
    button.onclick = () => { rate(row, value); press(td.parentNode, row); tell(); };
    td.append(button);
  }
  press(td.parentNode, row);
}
function press(tr, row) {
  const rating = ratingOf(row)?.rating;
  for (const button of tr.querySelectorAll("td.rating button"))
    button.setAttribute("aria-pressed", button.textContent === rating);
}
function addChunk() {
  for (const row of shown.slice(count, count + CHUNK)) addRow(row);
  count = Math.min(count + CHUNK, shown.length);
}
function tell() {
  const rated = rows.filter(ratingOf).length;
  byId("shown").textContent = `${shown.length} of ${rows.length} shown, ${rated} rated`;
}
function compare(a, b) {
  const [x, y] = [a, b].map(row => sorted.name === "verdict" ? judged(row) :
    sorted.name === "rating" ? ratingOf(row)?.rating ?? null : get(row, sorted.name));
  if (x === null || y === null) return (x === null) - (y === null); // what is not known comes last
  const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y), undefined, {numeric: true});
  return sorted.descending ? -order : order;
}
function refresh() {
  const text = byId("search").value.toLowerCase(), verdict = byId("verdict").value, rated = byId("rated").value;
  shown = rows.filter(row => {
    const rating = ratingOf(row)?.rating;
    return (!verdict || judged(row) === verdict)
      && (!rated || (rated === "none" ? !rating : rating === rated))
      && (!text || [get(row, "name"), get(row, "reasons"), get(row, "error")].some(t => t?.toLowerCase().includes(text)));
  });
  if (sorted.name) shown = [...shown].sort(compare);
  for (const th of byId("head").children)
    th.ariaSort = th.dataset.name === sorted.name ? (sorted.descending ? "descending" : "ascending") : "none";
  byId("body").replaceChildren();
  document.querySelector("main").scrollTop = 0;
  count = 0;
  addChunk();
  tell();
}
for (const [name] of shownColumns) {
  const th = document.createElement("th"), button = document.createElement("button");
  th.scope = "col";
  th.title = hints[name] ?? "";
  if (name in hints) th.className = "number";
  th.dataset.name = name;
  button.type = "button";
  button.textContent = titles[name] ?? name;
  button.disabled = name === "picture";
  button.onclick = () => {
    if (sorted.name !== name) sorted = {name, descending: false};
    else if (!sorted.descending) sorted = {name, descending: true};
    else sorted = {name: null, descending: false};
    refresh();
  };
  th.append(button);
  byId("head").append(th);
}
for (const name of [...new Set(rows.map(judged))].sort()) byId("verdict").add(new Option(name, name));
byId("search").oninput = byId("verdict").onchange = byId("rated").onchange = refresh;
byId("export").onclick = () => {
  const quote = text => `"${String(text ?? "").replace(/"/g, '""')}"`;
  const lines = ["name,rating,rater,time,verdict"];
  for (const row of rows) {
    const rating = ratingOf(row);
    if (rating) lines.push([get(row, "name"), rating.rating, rating.rater, rating.time, judged(row)].map(quote).join(","));
  }
  const a = document.createElement("a");
  a.href = URL.createObjectURL(new Blob([lines.join("\r\n") + "\r\n"], {type: "text/csv"}));
  a.download = "ratings.csv";
  a.click();
  URL.revokeObjectURL(a.href);
};
new IntersectionObserver(entries => {
  if (entries[0].isIntersecting && count < shown.length) addChunk();
}, {root: document.querySelector("main"), rootMargin: "800px"}).observe(byId("end"));
refresh();
byId("body").rows[0]?.focus();
