"use strict";
// Curves: the mean as a line, the range of each stretch behind it, one cursor for all charts.

const charts = { all: [], log: memory.get("log", false), smooth: memory.get("smooth", 0), step: null };
const PAD = { left: 46, right: 8, top: 8, bottom: 20 };

charts.redraw = () => charts.all.forEach(chart => chart.draw());
charts.point = step => { charts.step = step; charts.all.forEach(chart => chart.cursor()) };

// series: [{run, table: {step, mean, low?, high?}}]
function chart(name, series) {
  const read = h("span.read", { "aria-live": "polite" });
  const svg = h("svg", { tabindex: 0, role: "img", "aria-label": `${name} by step; arrow keys move the cursor` });
  const element = h("figure.card.chart", { style: "margin:0", "data-name": name },
    h("div.title", {}, h("b", {}, title(name)), read), svg);
  let scale = null;

  const self = { draw, cursor };
  charts.all.push(self);
  new ResizeObserver(draw).observe(svg);
  svg.addEventListener("pointermove", event => charts.point(scale && scale.step(event.offsetX)));
  svg.addEventListener("pointerleave", () => charts.point(null));
  svg.addEventListener("blur", () => charts.point(null));
  svg.addEventListener("keydown", event => {
    const steps = series[0].table.step, jump = event.shiftKey ? 10 : 1;
    const here = charts.step === null ? steps.length - 1 : nearest(steps, charts.step);
    const next = { ArrowLeft: here - jump, ArrowRight: here + jump, Home: 0, End: steps.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    charts.point(steps[Math.max(0, Math.min(steps.length - 1, next))]);
  });
  return element;

  function draw() {
    const width = svg.clientWidth, height = svg.clientHeight;
    if (!width) return;
    const lines = series.map(({ table }) => smoothed(table.mean));
    const positive = series.every(({ table }) => (table.low || table.mean).every(value => value > 0));
    const log = charts.log && positive, f = log ? Math.log10 : value => value;
    const values = series.flatMap(({ table }, i) => charts.smooth ? lines[i] : [...(table.low || lines[i]), ...(table.high || lines[i])]);
    const steps = series.flatMap(({ table }) => [table.step[0], table.step.at(-1)]);
    let [low, high] = [least(values), -least(values.map(value => -value))].map(f);
    if (high - low < 1e-9 * Math.max(Math.abs(low), 1e-9)) [low, high] = [low - around(low), high + around(low)];
    const first = Math.min(...steps), last = Math.max(...steps, first + 1);
    const x = step => PAD.left + (step - first) / (last - first) * (width - PAD.left - PAD.right);
    const y = value => height - PAD.bottom - (f(value) - low) / (high - low) * (height - PAD.top - PAD.bottom);
    scale = { x, y, step: place => first + (place - PAD.left) / (width - PAD.left - PAD.right) * (last - first), height, lines };

    const parts = [];
    const marks = ticks(low, high, log), names = labels(marks);
    marks.forEach((tick, i) => parts.push(h("line.grid", { x1: PAD.left, x2: width - PAD.right, y1: y(tick), y2: y(tick) }),
      h("text", { x: PAD.left - 5, y: y(tick) + 3.5, "text-anchor": "end" }, names[i])));
    for (const tick of ticks(first, last, false)) {
      const anchor = x(tick) > width - 26 ? "end" : "middle";
      parts.push(h("text", { x: x(tick), y: height - 5, "text-anchor": anchor }, short(tick)));
    }
    series.forEach(({ run, table }, i) => {
      const at = values => table.step.map((step, n) => `${x(step).toFixed(1)},${y(values[n]).toFixed(1)}`);
      if (table.low && !charts.smooth) {
        parts.push(h("path.band", { "--color": runColor(run), d: `M${at(table.high).join("L")}L${at(table.low).reverse().join("L")}Z` }));
      }
      parts.push(h(run < 6 ? "path.mean" : "path.mean.dashed", { "--color": runColor(run), d: "M" + at(lines[i]).join("L") }));
    });
    svg.replaceChildren(...parts);
    cursor();
  }

  function cursor() {
    svg.querySelectorAll(".cursor, circle").forEach(old => old.remove());
    if (!scale) return;
    const chosen = series.map(({ table }) => charts.step === null ? table.step.length - 1 : nearest(table.step, charts.step));
    const shown = series.map(({ table }, i) => number(Number(scale.lines[i][chosen[i]].toPrecision(4))));
    const step = series[0].table.step[chosen[0]];
    const parts = shown.flatMap((text, i) => [i ? " | " : null, series.length > 1 ? h("span.of", { "--color": runColor(series[i].run) }, text) : text]);
    read.replaceChildren(...parts.filter(Boolean), charts.step === null ? "" : ` at ${number(step)}`);
    if (charts.step === null) return;
    const place = scale.x(step);
    svg.append(h("line.cursor", { x1: place, x2: place, y1: PAD.top, y2: scale.height - PAD.bottom }));
    series.forEach(({ run, table }, i) => svg.append(h("circle", {
      r: 3, "--color": runColor(run), cx: scale.x(table.step[chosen[i]]), cy: scale.y(scale.lines[i][chosen[i]]) })));
  }
}

// Exponential moving average without the bias of its start.
function smoothed(values) {
  if (!charts.smooth) return values;
  let mean = 0, weight = 0;
  return values.map(value => {
    mean = charts.smooth * mean + (1 - charts.smooth) * value;
    weight = charts.smooth * weight + 1 - charts.smooth;
    return mean / weight;
  });
}

const least = values => values.reduce((a, b) => Math.min(a, b), Infinity);

function nearest(sorted, value) {
  let low = 0, high = sorted.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle; else high = middle;
  }
  return value - sorted[low] <= sorted[high] - value ? low : high;
}

// Round numbers inside [low, high]; on a logarithmic axis (low, high are exponents) powers of ten, and 2 and 5 if few.
function ticks(low, high, log, wanted = 4) {
  if (log) {
    const found = [];
    for (let power = Math.floor(low); power <= high; power++) {
      for (const factor of high - low > 2 ? [1] : [1, 2, 5]) found.push(factor * 10 ** power);
    }
    const inside = found.filter(value => Math.log10(value) >= low && Math.log10(value) <= high);
    if (inside.length) return inside.filter((_, i) => i % Math.ceil(inside.length / 4) === 0);
    return [10 ** low, 10 ** high];
  }
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high + step * 1e-9; value += step) found.push(Number(value.toPrecision(12)));
  return found;
}

// With as many digits as tell them apart.
function labels(values) {
  for (const digits of [3, 4, 5, 6]) {
    const texts = values.map(value => short(value, digits));
    if (new Set(texts).size === texts.length || digits === 6) return texts;
  }
}

function short(value, digits = 3) {
  const size = Math.abs(value);
  for (const [unit, sign] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (size >= unit) return Number((value / unit).toPrecision(digits)) + sign;
  }
  return size && size < 1e-3 ? value.toExponential(digits - 3) : String(Number(value.toPrecision(digits)));
}

// Half the height of a chart whose values are all the same.
const around = value => Math.abs(value) / 10 || 0.5;

// How many images have which score: [{run, values}], values in [-0.5, 1]; scores below 0 count as 0.
function histogram(name, series) {
  const BINS = 10, width = 300, height = 110, svg = h("svg", { viewBox: `0 0 ${width} ${height + 18}`, role: "img", style: "height:auto" });
  const bar = width / BINS / series.length;
  series.forEach(({ run, values }, s) => {
    const counts = Array(BINS).fill(0);
    values.forEach(value => counts[Math.max(0, Math.min(BINS - 1, Math.floor(value * BINS)))]++);
    const most = Math.max(...counts);
    counts.forEach((count, i) => svg.append(h("rect", {
      "--color": runColor(run), x: i * width / BINS + s * bar + 1, width: bar - 2,
      y: height - count / most * (height - 14), height: count / most * (height - 14) })));
    if (series.length === 1) counts.forEach((count, i) => count && svg.append(h("text", {
      x: (i + 0.5) * width / BINS, y: height - count / most * (height - 14) - 3, "text-anchor": "middle" }, String(count))));
  });
  [0, 0.5, 1].forEach(tick => svg.append(h("text", {
    x: tick * width, y: height + 14, "text-anchor": ["start", "middle", "end"][tick * 2] }, String(tick))));
  const total = series.map(({ values }) => number(values.reduce((a, b) => a + b, 0) / values.length)).join("  |  ");
  svg.setAttribute("aria-label", `${name} of images, mean ${total}`);
  return h("figure.card.chart", { style: "margin:0" },
    h("div.title", {}, h("b", {}, `${name}, images by score`), h("span.read", {}, `mean ${total} of ${series[0].values.length}`)), svg);
}
