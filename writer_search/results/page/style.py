"""How the page looks, and the one script in it."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f1f1f; --soft: #5c5c5c; --line: #d8d8d8;
  --shade: #f4f4f4; --accent: #a83f00; --dot: #6b7785; --wrong: 168, 63, 0;
  --more: rgba(0, 0, 0, .3); }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181a; --ink: #e6e6e6; --soft: #a9adb2; --line: #3a3d41; --shade: #212427;
    --accent: #ff9b57; --dot: #8d99a6; --wrong: 255, 155, 87;
    --more: rgba(255, 255, 255, .3); }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1160px; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .3em 0; }
h2 { font-size: 1.2rem; margin: 2.2em 0 .6em; padding-bottom: .2em;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6em 0 .5em; }
p { margin: .5em 0; max-width: 75ch; }
a { color: var(--accent); }
.value { color: var(--accent); white-space: nowrap; }
.soft { color: var(--soft); font-size: .9rem; }
.state { font-weight: 600; }
.wide, .chart { overflow-x: auto; max-width: 100%; background:
  linear-gradient(to right, var(--paper) 30%, transparent) 0 / 3em 100% no-repeat local,
  linear-gradient(to left, var(--paper) 30%, transparent) 100% / 3em 100% no-repeat local,
  linear-gradient(to right, var(--more), transparent) 0 / .9em 100% no-repeat scroll,
  linear-gradient(to left, var(--more), transparent) 100% / .9em 100% no-repeat scroll; }
.wide { width: fit-content; }
.wide:focus-visible, button:focus-visible { outline: 2px solid var(--accent); }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
.wide { border: 1px solid var(--line); }
.wide table { overflow-wrap: normal; white-space: nowrap; }
.wide td.text { white-space: normal; min-width: 18em; }
.wide td bdi { display: inline-block; vertical-align: top; width: max-content; max-width: 20em;
  white-space: normal; overflow-wrap: break-word; }
thead th { background: var(--shade); }
td.number, th.number { text-align: right; }
tr.best td { background: var(--shade); font-weight: 600; }
tr.best td:first-child { box-shadow: inset 3px 0 var(--accent); }
button { font: inherit; color: inherit; background: none; border: 0; padding: 0; cursor: pointer;
  text-align: inherit; }
thead button { font-weight: 600; }
thead th[aria-sort=ascending] button::after { content: " ▲"; }
thead th[aria-sort=descending] button::after { content: " ▼"; }
.pick bdi { text-decoration: underline var(--accent); text-underline-offset: .2em; }
.facts th { font-weight: 600; min-width: 10.5em; }
.fixed { color: var(--soft); font-size: .85em; font-weight: 400; }
@media (min-width: 700px) { .facts th { white-space: nowrap; } }
pre { background: var(--shade); padding: .7em; white-space: pre-wrap; font-size: .85rem; }
code { font-size: .9em; }
details { margin: .8em 0; }
summary { cursor: pointer; font-weight: 600; }
.bar { display: inline-block; width: 6em; height: .7em; background: var(--shade);
  vertical-align: baseline; margin-left: .5em; }
.bar i { display: block; height: 100%; background: var(--dot); }
.filter { position: sticky; top: 0; z-index: 1; background: var(--paper); padding: .3em 0; }
.filter[hidden] { display: none; }
.filter button { border: 1px solid var(--line); padding: .1em .7em; border-radius: .3em; }
.lines { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 32rem), 1fr));
  gap: 1rem 1.5rem; padding: 0; margin: .8em 0; list-style: none; }
.lines li { border-top: 1px solid var(--line); padding-top: .5em; min-width: 0; }
.lines li[hidden] { display: none; }
.lines p { margin: .2em 0; font-size: .92rem; }
.strip { display: block; max-width: 100%; height: auto; background: #fff; margin: .2em 0; }
@media (prefers-color-scheme: dark) { .strip { filter: brightness(.88); } }
.chart { margin: .8em 0; }
.chart svg { display: block; width: 100%; min-width: 520px; max-width: 760px; height: auto; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: .8rem; }
.panels .chart { margin: 0; }
.panels svg { min-width: 240px; max-width: 400px; }
figure { margin: 1em 0; }
figcaption { font-size: .9rem; color: var(--soft); max-width: 75ch; }
.confusion td { text-align: right; padding: .15em .4em; min-width: 2.2em; border: 0; }
.confusion th { border: 0; padding: .15em .5em; font-weight: 400; }
.confusion th[scope=row] { position: sticky; left: 0; background: var(--paper); max-width: 16em;
  overflow: hidden; text-overflow: ellipsis; }
.confusion td.right { color: var(--soft); }
@media (max-width: 500px) {
  .facts th { min-width: 7em; }
  th, td { padding: .25em .45em; }
  .bar { display: none; }
  .wide td bdi { max-width: 10em; }
  pre { font-size: .7rem; }
  .chart { border: 1px solid var(--line); }
}
"""

# The charts' own, so that each may also stand in a file by itself.
CHART_STYLE = """
.c text { font: 12px system-ui, sans-serif; fill: var(--ink, #1f1f1f); }
.c .t { fill: var(--soft, #5c5c5c); }
.c .g { stroke: var(--line, #d8d8d8); fill: none; }
.c .d { fill: var(--dot, #6b7785); }
.c .l { stroke: var(--dot, #6b7785); fill: none; }
.c .f { stroke-opacity: .35; }
.c .x { stroke: var(--soft, #5c5c5c); fill: none; }
.c .a { fill: var(--accent, #a83f00); }
.c .b { stroke: var(--accent, #a83f00); fill: none; }
.c .s { fill: var(--accent, #a83f00); opacity: .14; }
.c .n { stroke: var(--accent, #a83f00); fill: none; stroke-dasharray: 5 4; }
"""

# Sorts tables, filters lines by writer, and loads the page anew while the search runs. What a
# reader has chosen (place, order, filter, what is unfolded) is kept over that.
SCRIPT = """
"use strict";
const place = "page " + location.pathname;
let kept = {};
try { kept = JSON.parse(sessionStorage.getItem(place)) || {}; } catch (error) { kept = {}; }
kept.sort = kept.sort || {};
history.scrollRestoration = "manual";

function sort(table, column, down) {
  const heads = table.tHead.rows[0].cells, body = table.tBodies[0];
  for (const head of heads) head.removeAttribute("aria-sort");
  heads[column].setAttribute("aria-sort", down ? "descending" : "ascending");
  const key = (row) => row.cells[column].dataset.key ?? row.cells[column].textContent;
  body.append(...[...body.rows].sort((a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const difference = x - y;
    return (down ? -1 : 1) * (isNaN(difference) ? x.localeCompare(y) : difference);
  }));
}
for (const table of document.querySelectorAll("table.sortable")) {
  const name = table.dataset.keep, heads = [...table.tHead.rows[0].cells];
  for (const [column, head] of heads.entries())
    head.firstChild.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      sort(table, column, down);
      kept.sort[name] = [head.textContent, down];  // columns come and go
    });
  const [title, down] = kept.sort[name] ?? [];
  const column = heads.findIndex((head) => head.textContent === title);
  if (column >= 0) sort(table, column, down);
}

const bar = document.querySelector(".filter");
function filter(writer) {
  kept.writer = writer;
  let shown = 0;
  for (const line of document.querySelectorAll("[data-writers]")) {
    const there = writer === null || JSON.parse(line.dataset.writers).includes(writer);
    line.hidden = !there;
    shown += there;
  }
  if (writer !== null)
    for (const fold of document.querySelectorAll("#lines details")) fold.open = true;
  if (bar) {
    bar.hidden = writer === null;
    bar.querySelector("bdi").textContent = writer ?? "";
    bar.querySelector("span").textContent = shown;
  }
}
for (const button of document.querySelectorAll("button.pick"))
  button.addEventListener("click", () => {
    filter(button.dataset.writer);
    if (!button.closest(".lines")) document.getElementById("lines").scrollIntoView();
  });
if (bar) bar.querySelector("button").addEventListener("click", () => filter(null));
filter(kept.writer ?? null);

const folds = [...document.querySelectorAll("details[data-keep]")];
for (const fold of folds) if ((kept.open || []).includes(fold.dataset.keep)) fold.open = true;
if (kept.top) scrollTo(0, kept.top);
addEventListener("pagehide", () => {
  kept.top = scrollY;
  kept.open = folds.filter((fold) => fold.open).map((fold) => fold.dataset.keep);
  try { sessionStorage.setItem(place, JSON.stringify(kept)); } catch (error) { /* not kept */ }
});

const state = document.querySelector("[data-written]");
if (state) {
  const minutes = () => (Date.now() / 1000 - state.dataset.written) / 60;
  const late = document.getElementById("late");
  const warn = () => {
    if (!late) return;
    late.hidden = minutes() <= 10;
    late.querySelector("span").textContent = Math.round(minutes());
  };
  const look = () => {
    warn();
    const busy = document.hidden || String(getSelection()) !== "";
    if (!busy) location.reload();
  };
  // An old page, maybe one that was sent: looking seldom is enough.
  setInterval(look, 1000 * (minutes() > 60 ? 300 : state.dataset.every));
  warn();
}
"""
