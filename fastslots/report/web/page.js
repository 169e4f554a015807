"use strict";
// The page of one run, or of several side by side.

const runs = facts.runs, main = document.querySelector("main");
const SCORES = ["j_ari", "jis", "fg_ari", "ari", "mbo", "miou", "recon", "kl", "interaction_normalized"];
const LOWER_IS_BETTER = new Set(["recon"]), NEITHER = new Set(["kl", "interaction_normalized"]);  // terms of the loss are no scores
const FIRST = ["loss", "recon", "kl", "interaction_normalized", "images_per_s", "memory_mb", "power_w", "energy_wh", "grad_norm"];
const HIDDEN = new Set(["interaction"]);  // the same curve as interaction_normalized, times H²
const TITLES = {
  j_ari: "J-ARI", jis: "JIS", fg_ari: "FG-ARI", ari: "ARI", mbo: "mBO", miou: "mIoU", kl: "KL", interaction: "R", interaction_normalized: "R/H²",
  attribute_r2_linear: "R², linear probe", attribute_r2_mlp: "R², MLP probe", images_per_s: "images/s", memory_mb: "memory, MB", power_w: "power, W",
  energy_wh: "energy, Wh", grad_norm: "gradient norm", lr: "learning rate",
};
const RELOAD_S = 20, STALE_S = 1800;

const dot = run => h("span.dot", { "--color": runColor(run) });
const section = (id, title, ...parts) => h("section", { id }, h("h2", {}, title), ...parts);
const several = runs.length > 1;
const title = name => TITLES[name] || name;

document.querySelectorAll("header .run").forEach((box, i) => {
  const run = runs[i], last = run.evaluations.at(-1) || {};
  box.style.setProperty("--color", runColor(i));
  const figures = facts.compare ? [] : [["J-ARI", last.j_ari], ["JIS", last.jis], ["FG-ARI", last.fg_ari], ["recon", last.recon]].filter(([, value]) => value !== undefined);
  const speed = run.training.images_per_s;
  if (speed && !facts.compare) figures.push(["images/s", Math.round(middle(speed.mean))]);
  for (const [name, unit] of [["memory_mb", "MB"], ["energy_wh", "Wh"]]) {
    if (run.training[name] && !facts.compare) figures.push([unit, Math.round(run.training[name].mean.at(-1))]);
  }
  box.append(
    h("div.soft", {}, `step ${number(run.step)} of ${number(run.steps)}${run.stopped ? ": stopped, a loss was not finite" : ""}`),
    h("progress", { max: run.steps || 1, value: run.step, "aria-label": "steps done" }),
    h("div.figures", { hidden: !figures.length }, figures.map(([name, value]) => h("span.soft", {}, h("b", {}, number(value)), name))),
    ...(facts.compare ? [] : [h("p.soft", {}, run.data), ...run.warnings.map(warning => h("p.soft", {}, `Warning: ${warning}.`))]));
});

main.append(...[navigation(), ...(facts.compare ? comparison(facts.compare) : []), facts.compare ? null : scores(), measured(), curves("training", "Training", FIRST), curves("scores", "Held-out images", SCORES, histograms),
  explorers(), grids(), configuration()].filter(Boolean));
document.querySelectorAll("nav a").forEach(link => { link.hidden = !document.querySelector(link.getAttribute("href")) });
watch();

function middle(values) { return [...values].sort((a, b) => a - b)[values.length >> 1] }

function navigation() {
  const links = [["differences", "Differences"], ["compared", "Scores"], ["scores-table", "Scores"], ["measured", "Measured"], ["training", "Training"], ["scores", "Held-out"], ["explorer", "Explorer"], ["grids", "Slots"], ["config", "Configuration"]];
  const smooth = h("input", { type: "range", min: 0, max: 0.98, step: 0.02, "aria-label": "smoothing", style: "width:7rem",
    oninput: event => { charts.smooth = Number(event.target.value); memory.set("smooth", charts.smooth); charts.redraw() } });
  smooth.value = charts.smooth;
  const log = h("input", { type: "checkbox", id: "log", checked: charts.log,
    onchange: event => { charts.log = event.target.checked; memory.set("log", charts.log); charts.redraw() } });
  return h("nav", {}, links.map(([id, text]) => h("a", { href: "#" + id }, text)),
    h("label.push", {}, "smooth", smooth), h("label", {}, log, "log scale"), h("span", { id: "live" }));
}

function scores() {
  if (!runs.some(run => run.evaluations.length)) return null;
  const own = ownScores();
  const names = [...SCORES, ...own].filter(name => runs.some(run => run.evaluations.some(line => name in line)));
  const rows = several ? runs.map((run, i) => [i, run.evaluations.at(-1) || {}]) : runs[0].evaluations.map(line => [0, line]);
  const best = Object.fromEntries(names.map(name => {
    const values = rows.map(([, line]) => line[name]).filter(value => typeof value === "number");
    return [name, LOWER_IS_BETTER.has(name) ? Math.min(...values) : Math.max(...values)];
  }));
  const head = h("tr", {}, several ? h("th", {}, "run") : null, ["step", ...names, "images", "seconds"].map(name => h("th", {}, title(name))));
  const body = rows.map(([i, line]) => h("tr", {}, several ? h("td", {}, dot(i), " ", runs[i].name) : null, h("td", {}, number(line.step)),
    names.map(name => h(line[name] === best[name] && rows.length > 1 && !NEITHER.has(name) && !own.has(name) ? "td.best" : "td", {}, number(line[name]))),
    h("td", {}, number(line.images)), h("td", {}, number(line.seconds))));
  const hidden = runs[0].count - runs[0].evaluations.length;
  const latents = [...new Set(rows.map(([, line]) => line.latent).filter(Boolean))].map(latent => latent === "mean" ? "the posterior mean" : "a sample");
  return section("scores-table", "Scores on held-out images", h("div.card.scroll", {}, h("table", {}, head, body)),
    h("p.hint", {}, `z is ${latents.join(" or ")}. Bold: the best of a score.` + (!several && hidden > 0 ? ` The ${number(hidden)} evaluations before these are in the curves.` : "")));
}

// Metrics of one's own.
function ownScores() {
  const known = [...SCORES, ...HIDDEN];
  return new Set(runs.flatMap(run => Object.keys(run.scores)).filter(name => !known.includes(name)));
}

function fieldText(value) {
  return value === undefined || value === null ? "–" : Array.isArray(value) ? value.join(", ") : value === "" ? "(none)" : String(value);
}

function curves(kind, title, order, more = () => null) {
  const names = [...new Set(runs.flatMap(run => Object.keys(run[kind])))].filter(name => !HIDDEN.has(name));
  names.sort((a, b) => rank(order, a) - rank(order, b));
  const drawn = names.map(name => [name, runs.map((run, i) => ({ run: i, table: run[kind][name] })).filter(({ table }) => table && table.step.length > 1)])
    .filter(([, series]) => series.length);
  if (!drawn.length) return more() && section(kind, title, more());
  const bands = kind === "training" && runs.some(run => Object.values(run.training).some(table => table.low));
  return section(kind, title, h("div.cards", {}, drawn.map(([name, series]) => chart(name, series))),
    bands ? h("p.hint", {}, "Lines are means of stretches of steps; the band behind them runs from the least to the largest value of each stretch.") : null,
    kind === "training" ? cost() : null, more());
}

// How memory and energy were counted, or why energy was not.
function cost() {
  const known = runs.filter(run => run.machine.energy);
  const said = run => `emory is ${run.machine.memory_mb}; energy is ${run.machine.energy}`, alike = new Set(known.map(said)).size < 2;
  const each = known.map(run => (alike ? "M" : `${run.name}: m`) + said(run));
  return known.length ? h("p.hint", {}, [...new Set(each)].join(". ") + ".") : null;
}

function rank(order, name) { return order.includes(name) ? order.indexOf(name) : order.length }

function histograms() {
  const scored = runs.map((run, i) => ({ run: i, scores: run.of_images }));
  const drawn = [["j_ari", "J-ARI"], ["fg_ari", "FG-ARI"]].map(([name, title]) => [title, scored.filter(({ scores }) => scores[name]).map(({ run, scores }) => ({ run, values: scores[name] }))])
    .filter(([, series]) => series.length);
  const steps = [...new Set(scored.map(({ scores }) => scores.step).filter(Boolean))].map(number).join(" and ");
  return drawn.length ? h("div", {}, h("div.cards", { style: "margin-top:.8rem" }, drawn.map(([title, series]) => histogram(title, series))),
    h("p.hint", {}, `The images of the evaluation at step ${steps} by their scores; scores below 0 are counted as 0.`)) : null;
}

function explorers() {
  const shown = runs.map((run, i) => [run, i]).filter(([run]) => run.explorer.images);
  if (!shown.length) return null;
  const e = shown[0][0].explorer, step = ([run]) => run.explorer.weights ? `, ${run.explorer.weights} weights` : "";
  return section("explorer", "Slot explorer", h("div.explorers" + (several ? ".several" : ""), {},
    shown.map(([run, i]) => h("div", {}, several ? h("h3", {}, dot(i), " ", run.name + step([run])) : null, explorer(run.explorer, i)))),
    h("p.hint", {}, `Decoded beforehand${step(shown[0])}: ${e.images.length} held-out images at ${e.side} x ${e.side}, the ${e.latents.length} latents that carry most at ${e.values[0].length} values each. ` +
      "For any latent, and for your own image, run: fastslots explore RUN"));
}

function grids() {
  const shown = runs.map((run, i) => [run, i]).filter(([run]) => run.grids.length);
  if (!shown.length) return null;
  return section("grids", "Slots over training", h("div.explorers" + (several ? ".several" : ""), {}, shown.map(([run, i]) => {
    const image = h("img", { alt: "input, reconstruction, slots by colour, slot maps, Jacobians; a row an image" }), caption = h("span");
    const show = n => {
      const grid = run.grids[n];
      image.src = grid.uri; image.width = grid.width; image.height = grid.height;
      caption.textContent = `step ${number(grid.step)}`;
    };
    const slider = h("input", { type: "range", min: 0, max: run.grids.length - 1, "aria-label": "evaluation", oninput: event => show(Number(event.target.value)) });
    slider.value = run.grids.length - 1;
    show(run.grids.length - 1);
    return h("div.card.pictures", {}, several ? h("h3", {}, dot(i), " ", run.name) : null,
      run.grids.length > 1 ? h("div.row", { style: "max-width:26rem" }, slider, caption) : h("div.row", {}, caption), h("div.scroll", {}, image));
  })), h("p.hint", {}, "Columns: input, reconstruction, slots by colour (map, then Jacobian), each slot's map, each slot's share of the Jacobian."));
}

function configuration() {
  const text = fieldText;
  const table = (all, only) => {
    const names = [...new Set(all.flatMap(Object.keys))].filter(name => !only || new Set(all.map(values => text(values[name]))).size > 1);
    if (!several) return h("dl.fields", {}, names.map(name => h("div", {}, h("dt", {}, name), h("dd", {}, text(all[0][name])))));
    return h("div.scroll", {}, h("table.config", {}, h("tr", {}, h("th", {}, ""), runs.map((run, i) => h("th", { style: "text-align:left" }, dot(i), " ", run.name))),
      names.length ? names.map(name => h("tr", {}, h("td", {}, name), all.map(values => h("td", {}, text(values[name]))))) : h("tr", {}, h("td", {}, "no difference"))));
  };
  const configs = runs.map(run => run.config);
  const data = runs.map(run => ({ data: run.data, fingerprint: run.fingerprint, machine: run.machine.machine, ...run.versions, "page written": new Date(run.written * 1000).toLocaleString() }));
  return section("config", "Configuration, data and versions",
    several && !facts.compare ? h("div.card", {}, h("h3", {}, "Where the runs differ"), table(configs, true)) : null,
    h("div.card", { style: "margin-top:.8rem" }, h("details", { open: !several }, h("summary", {}, "All fields"), table(configs))),
    h("div.card", { style: "margin-top:.8rem" }, h("details", { open: true }, h("summary", {}, "Data and versions"), table(data)),
      h("p.hint", {}, `Versions are those of the program that ${[...new Set(runs.map(run => run.versions_of))].join(" or ")}.`)));
}

// While a run goes on its page is written anew at each evaluation, and reads itself anew when nobody is using it.
function watch() {
  const running = runs.some(run => run.step < run.steps && !run.stopped);
  const age = Date.now() / 1000 - Math.max(...runs.map(run => run.written));
  const live = document.getElementById("live");
  if (!running) return;
  if (age > STALE_S) { live.textContent = "no news for " + Math.round(age / 60) + " minutes"; return }
  let used = 0;
  const box = h("input", { type: "checkbox", checked: memory.get("live", true), onchange: event => memory.set("live", event.target.checked) });
  live.append(h("label", { title: `reads the page anew every ${RELOAD_S} s` }, box, "live"));
  for (const event of ["pointerdown", "keydown", "input"]) addEventListener(event, () => { used = Date.now() });
  addEventListener("beforeunload", () => memory.set("scroll", scrollY));
  scrollTo(0, memory.get("scroll", 0));
  setInterval(() => { if (box.checked && Date.now() - used > RELOAD_S * 1000) location.reload() }, RELOAD_S * 1000);
}
