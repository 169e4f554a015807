"use strict";
// Elements by name: text is always put in as text, so nothing in a run's files can become markup.

const SVG = new Set(["svg", "path", "line", "text", "circle", "rect"]);

function h(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split(".");
  const element = SVG.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  if (classes.length) element.setAttribute("class", classes.join(" "));
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) element.style.setProperty(key, value);
    else if (typeof value === "boolean") element.toggleAttribute(key, value);
    else element.setAttribute(key, value);
  }
  element.append(...children.flat().filter(child => child !== null && child !== undefined));
  return element;
}

function number(value) {
  if (typeof value !== "number") return "–";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return value.toLocaleString("en");
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

// What the reader has set survives the reload of a running page. Pages from files may have no storage.
const memory = {
  get(key, otherwise) {
    try { return JSON.parse(sessionStorage.getItem("fastslots." + key)) ?? otherwise } catch { return otherwise }
  },
  set(key, value) {
    try { sessionStorage.setItem("fastslots." + key, JSON.stringify(value)) } catch { /* then it does not survive */ }
  },
};

const facts = JSON.parse(document.getElementById("facts").textContent);
const runColor = index => `var(--run${index % 6})`;
