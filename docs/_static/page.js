// What pages do beyond being read: a button on each block of code copies it, and cells of tables know
// their column's name, for screens that show a row as a list (pymilter.css).
"use strict";

const WORDS = { idle: "Copy", done: "Copied", failed: "Press Ctrl+C" };
const MANY = 5; // columns: more are figures, and stand side by side
const SHOWN = 2000; // milliseconds that the outcome is shown

function textOf(block) {
  const lines = block.textContent.split("\n");
  if (!lines.some((line) => line.startsWith(">>> "))) {
    return block.textContent;
  }
  return lines
    .filter((line) => /^(>>>|\.\.\.)( |$)/.test(line))
    .map((line) => line.slice(4))
    .join("\n");
}

function select(block) {
  const range = document.createRange();
  range.selectNodeContents(block);
  const selection = window.getSelection();
  selection.removeAllRanges();
  selection.addRange(range);
}

async function copy(button, block) {
  let outcome = WORDS.done;
  try {
    await navigator.clipboard.writeText(textOf(block));
  } catch (error) {
    // Pages that are opened as files, or over http, may not write to the clipboard.
    select(block);
    outcome = document.execCommand("copy") ? WORDS.done : WORDS.failed;
  }
  button.textContent = outcome;
  setTimeout(() => {
    button.textContent = WORDS.idle;
  }, SHOWN);
}

function labelCells(table) {
  const names = [...table.querySelectorAll("thead th")].map((cell) => cell.textContent.trim());
  table.classList.add(names.length > MANY ? "figures" : "list");
  for (const row of table.querySelectorAll("tbody tr")) {
    [...row.children].forEach((cell, place) => {
      cell.dataset.label = names[place] ?? "";
      cell.classList.toggle("empty", cell.textContent.trim() === "");
    });
  }
}

document.addEventListener("DOMContentLoaded", () => {
  for (const table of document.querySelectorAll("table.docutils:has(td:nth-child(3))")) {
    labelCells(table);
  }
  for (const block of document.querySelectorAll("div.highlight pre")) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "copy";
    button.textContent = WORDS.idle;
    button.setAttribute("aria-live", "polite");
    button.addEventListener("click", () => copy(button, block));
    block.parentElement.append(button);
  }
});
