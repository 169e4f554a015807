"use strict";
// What `fastslots eval` has measured of the runs, and their scores of one kind beside each other.

const PROBES = [["r2_linear", "R², linear"], ["r2_mlp", "R², MLP"], ["accuracy_linear", "accuracy, linear"], ["accuracy_mlp", "accuracy, MLP"]];
const ANALYSES = [["interaction_order", "interaction order"], ["reencoding_error", "re-encoding error"], ["recombination_error", "recombination error"]];

// Each probe's score of each factor of an evaluation: [[factor, {r2_linear: ..., ...}]], the mean of all first.
function attributes(entry) {
  const found = {};
  for (const [probe] of PROBES) {
    for (const [name, value] of Object.entries(entry)) {
      const start = `attribute_${probe}`;
      if (name === start || name.startsWith(start + "_")) (found[name.slice(start.length + 1) || "mean"] ??= {})[probe] = value;
    }
  }
  return Object.entries(found).sort(([a], [b]) => (b === "mean") - (a === "mean"));
}

function meanStd(score) {
  if (!score) return "–";
  const digits = Math.abs(score.mean) < 10 ? 3 : Math.abs(score.mean) < 100 ? 2 : 1;
  return score.mean.toFixed(digits) + (score.std === null ? "" : ` ± ${score.std.toFixed(digits)}`);
}

const short10 = text => (text || "").slice(0, 10);
const latentName = latent => latent === "mean" ? "mean" : "a sample";

function measured() {
  const entries = runs.flatMap((run, i) => run.measured.map(entry => [i, entry]));
  if (!entries.length) return null;
  const names = [...new Set([...SCORES, ...ownScores()])].filter(name => entries.some(([, entry]) => typeof entry[name] === "number"));
  const datas = new Set(entries.map(([, entry]) => entry.data)), fingerprints = entries.some(([, entry]) => entry.fingerprint);
  const head = h("tr", {}, several ? h("th", {}, "run") : null, ["split", "latent", "weights", "images", ...names].map(name => h("th", {}, title(name))),
    datas.size > 1 ? h("th", {}, "data") : null, fingerprints ? h("th", {}, "fingerprint") : null);
  const body = entries.map(([i, entry]) => h("tr", {}, several ? h("td", {}, dot(i), " ", runs[i].name) : null,
    h("td", {}, entry.split + (entry.evaluated_on_training_images ? " (trained on)" : "")),
    [latentName(entry.latent), entry.weights, number(entry.images) + (entry.score_mode === "paper" ? ", as published" : ""), ...names.map(name => number(entry[name]))].map(text => h("td", {}, text)),
    datas.size > 1 ? h("td", {}, entry.data) : null, fingerprints ? h("td", { title: entry.fingerprint }, short10(entry.fingerprint)) : null));
  return section("measured", "Measured by fastslots eval", h("div.card.scroll", {}, h("table", {}, head, body)), probes(entries), analyses(entries));
}

const entryTitle = ([i, entry]) => `${several ? runs[i].name + ": " : ""}${entry.split}, ${number(entry.images)} images, z ${latentName(entry.latent)}, ${entry.weights} weights`;

function probes(entries) {
  const shown = entries.map(entry => [entry, attributes(entry[1])]).filter(([, rows]) => rows.length);
  if (!shown.length) return null;
  return h("div", {}, h("h3", { style: "margin-top:1rem" }, "Attributes of objects, predicted from their slots"), h("div.cards.wide", {}, shown.map(([entry, rows]) => {
    const columns = PROBES.filter(([probe]) => rows.some(([, values]) => probe in values));
    const cell = value => h("td", { "--part": Math.max(0, value || 0) }, value === undefined ? "" : number(value));
    return h("div.card.scroll", {}, h("p.soft", {}, entryTitle(entry)),
      h("table.confusion", {}, h("tr", {}, h("th", {}, "factor"), columns.map(([, title]) => h("th", {}, title))),
        rows.map(([name, values]) => h("tr", {}, h("td", { "--part": 0, style: "text-align:left" }, name), columns.map(([probe]) => cell(values[probe]))))),
      h("p.hint", {}, `${number(entry[1].attribute_objects)} objects, half of the images to fit and half to score. R² of numbers, accuracy of classes; 1 is perfect.`));
  })));
}

function analyses(entries) {
  const composed = [...new Set(entries.flatMap(([, entry]) => Object.keys(entry).filter(name => /^(un)?seen_/.test(name))))].map(name => [name, name.replace("_", ": ")]);
  const rows = [...ANALYSES, ...composed].filter(([name]) => entries.some(([, entry]) => typeof entry[name] === "number"));
  const shown = entries.filter(([, entry]) => rows.some(([name]) => name in entry));
  if (!rows.length) return null;
  return h("div", {}, h("h3", { style: "margin-top:1rem" }, "Analyses"), h("div.card.scroll", {}, h("table", {},
    h("tr", {}, h("th", {}, ""), shown.map(entry => h("th.wrap", {}, entryTitle(entry)))),
    rows.map(([name, title]) => h("tr", {}, h("td", {}, title), shown.map(([, entry]) => h("td", {}, number(entry[name]))))))));
}

// `fastslots compare`: the differing fields first, then the scores of one kind.
function comparison({ differing, scores, groups, kind, notes }) {
  document.querySelector("header").classList.add("compact");
  const fields = Object.keys(differing), names = Object.keys(scores).filter(name => !HIDDEN.has(name) && (!name.startsWith("attribute_") || name === "attribute_r2_linear"));
  const best = name => {
    const values = scores[name].filter(value => typeof value === "number");
    return NEITHER.has(name) || values.length < 2 ? NaN : LOWER_IS_BETTER.has(name) ? Math.min(...values) : Math.max(...values);
  };
  const differences = section("differences", "Where the runs differ", h("div.card.scroll", {}, fields.length
    ? h("table.config", {}, h("tr", {}, h("th", {}, ""), runs.map((run, i) => h("th", { style: "text-align:left" }, dot(i), " ", run.name))),
      fields.map(name => h("tr", {}, h("td", {}, name), differing[name].map(value => h("td", {}, fieldText(value))))))
    : h("p.soft", {}, "In no field of their configurations.")), notes.map(note => h("p.hint", {}, `Note: ${note}.`)));
  const seeds = groups.length ? h("div.card.scroll", { style: "margin-top:.8rem" }, h("table", {},
    h("tr", {}, [...Object.keys(groups[0].values), "runs", ...names].map(name => h("th", {}, title(name)))),
    groups.map(group => h("tr", {}, Object.values(group.values).map(value => h("td", {}, fieldText(value))), h("td", {}, number(group.runs.length)),
      names.map(name => h("td", {}, meanStd(group.scores[name]))))))) : null;
  const table = names.length ? section("compared", `Scores on ${kind}`, h("div.card.scroll", {}, h("table", {},
    h("tr", {}, h("th", {}, "run"), names.map(name => h("th", {}, title(name)))),
    runs.map((run, i) => h("tr", {}, h("td", {}, dot(i), " ", run.name),
      names.map(name => h(scores[name][i] === best(name) ? "td.best" : "td", {}, number(scores[name][i]))))))),
    seeds, seeds ? h("p.hint", {}, "Second table: means and standard deviations over runs that differ in their seed alone.") : null) : null;
  return [differences, table];
}
