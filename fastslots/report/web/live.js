"use strict";
// Live decoding: every change of a slider asks the server for pictures; one request at a time, the newest wins.

const K = facts.slots, D = facts.low.length;
const COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#969696", "#785ef0", "#648f28", "#fe6100", "#00c8c8"];
const state = { z: [], own: [], shown: Array(K).fill(true), slot: 0 };
let busy = false, again = false;

const picture = label => h("img", { alt: label, style: "width:100%;aspect-ratio:1;image-rendering:pixelated;border-radius:5px;background:#000" });
const figure = (image, caption) => h("figure", {}, image, h("figcaption", {}, caption));
const views = { input: picture("input"), recon: picture("decoded"), byMap: picture("slots by map") };
const message = h("p.soft", { role: "status" }), slotRow = h("div"), sliders = h("div.sliders"), images = h("div.choices");

document.querySelector("header").append(h("div.run", {}, h("h1", {}, facts.name), h("p.soft", {}, `${K} slots of ${D} latents, decoded by this machine as you move them`)));
document.querySelector("main").append(h("section", {}, h("div.card.explorer", { style: "margin-top:1rem" },
  h("fieldset", {}, h("legend", {}, "Image"), images),
  h("div.row", {}, h("label", {}, "your own", h("input", { type: "file", accept: "image/*", id: "file", onchange: upload })), message),
  h("div.views.few", {}, figure(views.input, "input"), figure(views.recon, "decoded"), figure(views.byMap, "slots by map")),
  h("div", { style: "height:.8rem" }), slotRow,
  h("div.row", {}, h("button", { id: "reset", onclick: () => { state.z[state.slot] = [...state.own[state.slot]]; draw() } }, "reset this slot"),
    h("button", { id: "random", onclick: () => { state.z[state.slot] = facts.low.map((low, d) => low + Math.random() * (facts.high[d] - low)); draw() } }, "draw it at random")),
  sliders)));

facts.images.forEach((entry, i) => addImage(entry, String(i + 1), i === 0));
if (!facts.images.length) message.textContent = "The run's images are not at hand: give one of your own.";

function addImage(entry, label, chosen) {
  const radio = h("input", { type: "radio", name: "image", "aria-label": `image ${label}`, checked: chosen, onchange: () => choose(entry) });
  images.append(h("label", {}, radio, h("img", { src: entry.input, alt: "", width: 56, height: 56, style: "image-rendering:pixelated;border-radius:5px" }), h("span.name", {}, label)));
  if (chosen) { radio.checked = true; choose(entry) }
}

function choose(entry) {
  state.own = entry.z;
  state.z = entry.z.map(row => [...row]);
  state.shown.fill(true);
  views.input.src = entry.input;
  draw();
}

async function upload(event) {
  const file = event.target.files[0];
  if (!file) return;
  if (file.size > facts.largest) { message.textContent = `At most ${facts.largest >> 20} MB.`; return }
  const result = await ask("encode", file);
  if (result) addImage(result, file.name, true);
}

async function ask(path, body) {
  try {
    const answer = await fetch(path, { method: "POST", body }), result = await answer.json();
    message.textContent = result.error || "";
    return result.error ? null : result;
  } catch {
    message.textContent = "The server does not answer: has `fastslots explore` ended?";
    return null;
  }
}

// Sliders and slots follow the state; then the pictures are asked for.
function draw() {
  if (!state.z.length) return;
  const row = state.z[state.slot];
  sliders.replaceChildren(...row.map((value, d) => {
    const shown = h("span.value", {}, value.toFixed(2));
    const slider = h("input", { type: "range", step: "any", id: `z${d}`, min: Math.min(facts.low[d], value), max: Math.max(facts.high[d], value),
      "aria-label": `latent ${d}`, oninput: event => { row[d] = Number(event.target.value); shown.textContent = row[d].toFixed(2); decode() } });
    slider.value = value;
    return h("label", {}, `z${d}`, slider, shown);
  }));
  decode();
}

async function decode() {
  if (busy) { again = true; return }
  busy = true;
  do {
    again = false;
    const result = await ask("decode", JSON.stringify({ z: state.z, shown: state.shown }));
    if (result) show(result);
  } while (again);
  busy = false;
}

function show(result) {
  views.recon.src = result.recon;
  views.byMap.src = result.byMap || result.recon;
  if (!slotRow.firstChild) {
    slotRow.append(h("fieldset", {}, h("legend", {}, "Slot, and whether it is shown"), h("div.choices", {}, Array.from({ length: K }, (_, k) => h("div", {},
      h("label", {}, h("input", { type: "radio", name: "slot", "aria-label": `slot ${k + 1}`, checked: k === state.slot, onchange: () => { state.slot = k; draw() } }),
        h("img", { alt: "", id: `map${k}`, width: 56, height: 56, style: "image-rendering:pixelated;border-radius:5px;background:#000" }),
        h("span.name", {}, h("span.dot", { "--color": COLORS[k % COLORS.length] }), String(k + 1))),
      h("span", { style: "display:block;text-align:center" }, h("input", { type: "checkbox", id: `shown${k}`, style: "position:static;opacity:1", "aria-label": `show slot ${k + 1}`, checked: true,
        onchange: event => { state.shown[k] = event.target.checked; decode() } })))))));
  }
  result.maps.forEach((map, k) => { document.getElementById(`map${k}`).src = map || result.recon; document.getElementById(`shown${k}`).checked = state.shown[k] });
}
