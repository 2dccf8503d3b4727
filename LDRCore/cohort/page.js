"use strict";
const {columns, rows} = JSON.parse(document.getElementById("data").textContent);
const CHUNK = 100; // rows that are added at once
const RATINGS = ["look", "accept", "reject"];
const column = Object.fromEntries(columns.map((name, k) => [name, k]));
const get = (row, name) => row[column[name]];
const byId = id => document.getElementById(id);
const judged = row => get(row, "status") === "done" ? get(row, "verdict") || "not judged" : get(row, "status");
const shownColumns = [
  ["picture", null], ["name", null], ["verdict", null], ["similarity_after", 3], ["folding_fraction", 5],
  ["jacobian_min", 2], ["jacobian_max", 2], ["dice_after", 3], ["tre_mm_after", 2], ["reasons", null], ["rating", null],
].filter(([name]) => !(name in column) || rows.some(row => get(row, name) !== null));
const titles = {
  similarity_after: "similarity", folding_fraction: "folding", jacobian_min: "Jacobian min", jacobian_max: "Jacobian max",
  dice_after: "Dice", tre_mm_after: "landmarks mm",
};

// ratings stay in this browser; where it has no storage, in this window
const KEY = "ldr-cohort " + location.pathname;
let ratings = {};
try { ratings = JSON.parse(localStorage.getItem(KEY)) || {}; } catch { /* no storage */ }
function rate(row, value) {
  const name = get(row, "name");
  if (ratings[name]?.rating === value) delete ratings[name];
  else ratings[name] = {rating: value, rater: byId("rater").value, time: new Date().toISOString()};
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
}, {rootMargin: "400px"});

function addRow(row) {
  const tr = byId("body").insertRow();
  tr.tabIndex = 0;
  tr.dataset.name = get(row, "name");
  for (const [name, digits] of shownColumns) {
    if (name === "picture") {
      const td = cell(tr);
      if (get(row, "picture") === null) continue;
      const img = document.createElement("img");
      img.alt = "fixed and warped, three planes";
      img.dataset.picture = get(row, "picture");
      img.onclick = () => img.classList.toggle("large");
      td.append(img);
      pictures.observe(img);
    } else if (name === "name") {
      const folder = get(row, "folder");
      const td = cell(tr, folder ? "" : get(row, "name"), "text");
      if (folder) {
        const a = document.createElement("a");
        a.textContent = get(row, "name");
        a.href = folder.split("/").map(encodeURIComponent).join("/") + "/";
        td.append(a);
      }
    } else if (name === "verdict") cell(tr, judged(row), judged(row));
    else if (name === "reasons") cell(tr, get(row, "error") || get(row, "reasons"), "text");
    else if (name === "rating") addButtons(cell(tr, "", "rating"), row);
    else {
      const value = get(row, name);
      cell(tr, value === null ? "" : digits === 5 ? (100 * value).toFixed(3) + " %" : value.toFixed(digits), "number");
    }
  }
  tr.onkeydown = event => {
    const value = RATINGS.find(r => r[0] === event.key);
    if (!value || event.ctrlKey || event.metaKey || event.altKey) return;
    rate(row, value);
    press(tr, row);
    tr.nextElementSibling?.focus();
    tell();
  };
}
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
  const rating = ratings[get(row, "name")]?.rating;
  for (const button of tr.querySelectorAll("td.rating button"))
    button.setAttribute("aria-pressed", button.textContent === rating);
}
function addChunk() {
  for (const row of shown.slice(count, count + CHUNK)) addRow(row);
  count = Math.min(count + CHUNK, shown.length);
}
function tell() {
  const rated = rows.filter(row => ratings[get(row, "name")]).length;
  byId("shown").textContent = `${shown.length} of ${rows.length} shown, ${rated} rated`;
}
function compare(a, b) {
  const [x, y] = [a, b].map(row => sorted.name === "verdict" ? judged(row) :
    sorted.name === "rating" ? ratings[get(row, "name")]?.rating ?? null : get(row, sorted.name));
  if (x === null || y === null) return (x === null) - (y === null); // what is not known comes last
  const order = typeof x === "number" ? x - y : String(x).localeCompare(String(y), undefined, {numeric: true});
  return sorted.descending ? -order : order;
}
function refresh() {
  const text = byId("search").value.toLowerCase(), verdict = byId("verdict").value, rated = byId("rated").value;
  shown = rows.filter(row => {
    const rating = ratings[get(row, "name")]?.rating;
    return (!verdict || judged(row) === verdict)
      && (!rated || (rated === "none" ? !rating : rating === rated))
      && (!text || [get(row, "name"), get(row, "reasons"), get(row, "error")].some(t => t?.toLowerCase().includes(text)));
  });
  if (sorted.name) shown = [...shown].sort(compare);
  for (const th of byId("head").children)
    th.ariaSort = th.dataset.name === sorted.name ? (sorted.descending ? "descending" : "ascending") : "none";
  byId("body").replaceChildren();
  count = 0;
  addChunk();
  tell();
}
for (const [name] of shownColumns) {
  const th = document.createElement("th"), button = document.createElement("button");
  th.scope = "col";
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
    const rating = ratings[get(row, "name")];
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
}, {rootMargin: "800px"}).observe(byId("end"));
refresh();
