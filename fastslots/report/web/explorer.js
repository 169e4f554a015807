"use strict";
// The slot explorer. Every picture is a tile of its image's sheet; the order of tiles is that of explorer.py.

const SLOT_COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#969696", "#785ef0", "#648f28", "#fe6100", "#00c8c8"];
const FIXED = 5, PER_SLOT = 3;
const slotColor = k => SLOT_COLORS[k % SLOT_COLORS.length];

function tileOf(data, image) {
  const K = data.slots, V = data.values[0].length, partners = data.images[image].partners;
  const swaps = FIXED + PER_SLOT * K, walks = swaps + partners.length * K * K;
  return {
    input: 0, truth: 1, recon: 2, byMap: 3, byJacobian: 4,
    map: k => FIXED + PER_SLOT * k, jacobian: k => FIXED + PER_SLOT * k + 1, without: k => FIXED + PER_SLOT * k + 2,
    swap: (partner, k, j) => swaps + (partners.indexOf(partner) * K + k) * K + j,
    walk: (k, latent, value) => walks + (k * data.latents.length + latent) * V + value,
  };
}

function canvas(side, label) { return h("canvas", { width: side, height: side, role: "img", "aria-label": label }) }

// Radio buttons that look like pictures: arrow keys, names and focus come with them.
function choices(name, legend, entries, chosen, choose) {
  return h("fieldset", {}, h("legend", {}, legend), h("div.choices", {}, entries.map(({ value, picture, label, color }) =>
    h("label", {}, h("input", { type: "radio", name, value, checked: value === chosen, "aria-label": label, onchange: () => choose(value) }),
      picture, h("span.name", {}, color ? h("span.dot", { "--color": color }) : null, label)))));
}

function explorer(data, key) {
  const K = data.slots, maps = data.maps !== false, state = { image: 0, slot: 0, partner: null, other: 0, latent: 0, value: null, ...memory.get("explorer" + key, {}) };
  const sheets = data.images.map(({ sheet }) => Object.assign(new Image(), { src: sheet }));
  const pictures = {};
  const figure = (name, caption) => h("figure", {}, pictures[name] = canvas(data.side, caption), h("figcaption", {}, caption));
  const paint = (target, image, tile) => {
    const x = tile % data.columns * data.side, y = Math.floor(tile / data.columns) * data.side;
    target.getContext("2d").drawImage(sheets[image], x, y, data.side, data.side, 0, 0, data.side, data.side);
  };
  const set = change => { Object.assign(state, change); update() };
  const root = h("div.card.explorer", { "data-explorer": key });
  const slotRow = h("div"), swapPanel = h("div"), walkPanel = h("div"), tablePanel = h("div");

  const thumbs = data.images.map((_, i) => canvas(data.side, `image ${i + 1}`));
  root.append(
    choices(`image${key}`, "Image", data.images.map((_, i) => ({ value: i, picture: thumbs[i], label: String(i + 1) })), state.image,
      image => set({ image, partner: null, value: null })),
    h("div.top", {}, h("div", {},
      h("div.views", {}, figure("input", "input"), data.masks ? figure("truth", "true objects") : null, figure("recon", "reconstruction"),
        maps ? figure("byMap", "slots by map") : null, figure("byJacobian", "slots by Jacobian")),
      h("div", { style: "height:.8rem" }), slotRow,
      h("div.views.few", {}, maps ? figure("map", "its slot map") : null, figure("jacobian", "its share of the Jacobian"), figure("without", "the image without it"))),
      tablePanel),
    h("div.panels", {}, swapPanel, walkPanel));
  Promise.all(sheets.map(sheet => sheet.decode())).then(() => {
    thumbs.forEach((thumb, i) => paint(thumb, i, 0));
    update();
    root.dataset.ready = "yes";
  });
  root.addEventListener("keydown", event => {  // number keys choose a slot from anywhere in the explorer
    const slot = Number(event.key) - 1;
    if (event.target.tagName !== "SELECT" && Number.isInteger(slot) && slot >= 0 && slot < K) set({ slot, value: null });
  });
  return root;

  function update() {
    state.image = Math.min(state.image, data.images.length - 1);
    state.slot = Math.min(state.slot, K - 1);
    const { image, slot } = state, entry = data.images[image], tile = tileOf(data, image);
    if (!entry.partners.includes(state.partner)) state.partner = entry.partners[0] ?? null;
    memory.set("explorer" + key, state);
    for (const name of ["input", "truth", "recon", "byMap", "byJacobian"]) if (pictures[name]) paint(pictures[name], image, tile[name]);
    for (const name of ["map", "jacobian", "without"]) if (pictures[name]) paint(pictures[name], image, tile[name](slot));
    keepFocus(() => {
      slotRow.replaceChildren(slots(`slot${key}`, "Slot (keys 1 to 9)", image, slot, slot => set({ slot, value: null })));
      swapPanel.replaceChildren(...swap(image, slot));
      walkPanel.replaceChildren(...walk(image, slot, entry, tile));
      tablePanel.replaceChildren(...confusion(entry));
    });
  }

  // The rows are made anew on each change; the focus stays where the keyboard has it.
  function keepFocus(change) {
    const { id, name, value } = document.activeElement || {};
    const inside = root.contains(document.activeElement);
    change();
    const again = !inside ? null : id ? document.getElementById(id) : name ? root.querySelector(`[name="${name}"][value="${value}"]`) : null;
    if (again && again !== document.activeElement) again.focus();
  }

  function slots(name, legend, image, chosen, choose) {
    const tile = tileOf(data, image);
    return choices(name, legend, Array.from({ length: K }, (_, k) => {
      const picture = canvas(data.side, `slot ${k + 1}`);
      paint(picture, image, tile.jacobian(k));
      return { value: k, picture, label: String(k + 1), color: slotColor(k) };
    }), chosen, choose);
  }

  function swap(image, slot) {
    const heading = h("h3", {}, "Swap with another image");
    if (state.partner === null) return [heading, h("p.soft", {}, "There is no second image to swap with.")];
    const partner = state.partner, other = state.other = Math.min(state.other, K - 1);
    const here = canvas(data.side, "this image with the other's slot"), there = canvas(data.side, "the other image with this slot");
    here.id = `swap${key}`;
    paint(here, image, tileOf(data, image).swap(partner, slot, other));
    paint(there, partner, tileOf(data, partner).swap(image, other, slot));
    const select = h("select", { id: `partner${key}`, "aria-label": "partner image", onchange: event => set({ partner: Number(event.target.value) }) },
      data.images[image].partners.map(i => h("option", { value: i, selected: i === partner }, `image ${i + 1}`)));
    return [heading, h("div.row", {}, h("label", {}, `slot ${slot + 1} for a slot of`, select)),
      slots(`other${key}`, `Slot of image ${partner + 1}`, partner, other, other => set({ other })),
      h("div.views.few", {}, h("figure", {}, here, h("figcaption", {}, `image ${image + 1} with slot ${other + 1} of image ${partner + 1}`)),
        h("figure", {}, there, h("figcaption", {}, `image ${partner + 1} with slot ${slot + 1} of image ${image + 1}`)))];
  }

  function walk(image, slot, entry, tile) {
    const latent = state.latent = Math.min(state.latent, data.latents.length - 1), values = data.values[latent];
    const own = entry.z[slot][latent];
    const value = state.value ?? nearest(values, own);
    const picture = canvas(data.side, "the image with this latent changed");
    picture.id = `walk${key}`;
    paint(picture, image, tile.walk(slot, latent, value));
    const select = h("select", { id: `latent${key}`, "aria-label": "latent", onchange: event => set({ latent: Number(event.target.value), value: null }) },
      data.latents.map((d, i) => h("option", { value: i, selected: i === latent }, `latent ${d}`)));
    const slider = h("input", { id: `value${key}`, type: "range", min: 0, max: values.length - 1, step: 1, "aria-label": "value of the latent",
      oninput: event => set({ value: Number(event.target.value) }) });
    slider.value = value;
    return [h("h3", {}, "Walk one latent"), h("div.row", {}, select, `of slot ${slot + 1}`), h("div.row", {}, slider, h("span", {}, number(values[value]))),
      h("div.views.few", {}, h("figure", {}, picture, h("figcaption", {}, `the slot's own value is ${number(own)}`)))];
  }

  function confusion(entry) {
    if (!entry.confusion) return [];
    const head = h("tr", {}, h("th", {}, "by slot"), Array.from({ length: K }, (_, k) => h("th", {}, h("span.dot", { "--color": slotColor(k) }), ` ${k + 1}`)));
    const rows = entry.objects.map((name, i) => h("tr", {}, h("td", { "--part": 0, style: "text-align:left" }, name === 0 ? "background" : `object ${name}`),
      entry.confusion[i].map(part => h("td", { "--part": part }, (100 * part).toFixed(0) + " %"))));
    return [h("h3", {}, "Whose pixels are whose"), h("div.scroll", {}, h("table.confusion", {}, head, rows)),
      h("p.hint", {}, `Part of each object's pixels where the slot has the largest share of the Jacobian. J-ARI of this image: ${number(entry.j_ari)}.`)];
  }
}
