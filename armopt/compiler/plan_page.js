"use strict";

const lines = [...document.querySelectorAll("tr[data-reads]")];
const buttons = [...document.querySelectorAll("button[data-kernel]")];
const field = document.querySelector("input");
const count = document.querySelector("output");
const chosen = new Set();

/** Shows the lines that hold every word and have one of the kernels that were chosen. */
function filter() {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
  for (const line of lines) {
    const text = line.textContent.toLowerCase();
    const fits = words.every((word) => text.includes(word));
    line.hidden = !fits || (chosen.size > 0 && !chosen.has(line.dataset.kernel));
  }
  const shown = lines.filter((line) => !line.hidden).length;
  document.body.classList.toggle("filtered", shown < lines.length);
  count.textContent = shown < lines.length ? `${shown} of ${lines.length} lines` : "";
}

function choose(kernel) {
  if (!chosen.delete(kernel)) chosen.add(kernel);
  for (const button of buttons) button.setAttribute("aria-pressed", chosen.has(button.dataset.kernel));
  filter();
}

/** Marks what the line at an event reads, and what reads it. */
function mark(event) {
  const here = event.target.closest("tr[data-reads]");
  for (const line of document.querySelectorAll(".read, .reader")) line.classList.remove("read", "reader");
  if (!here) return;
  const sources = here.dataset.reads.split(" ");
  for (const line of here.parentElement.rows) {
    line.classList.toggle("read", sources.includes(line.dataset.node));
    line.classList.toggle("reader", line.dataset.reads.split(" ").includes(here.dataset.node));
  }
}

field.addEventListener("input", filter);
for (const button of buttons) button.addEventListener("click", () => choose(button.dataset.kernel));
document.addEventListener("mouseover", mark);
document.addEventListener("focusin", mark);
document.querySelector(".filter").hidden = false;
filter();
