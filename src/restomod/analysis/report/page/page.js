"use strict";
// Elements of the page. All content of a run is set as text, so that the browser does not parse it as HTML.

const view = { runs: [], chosen: 0, axis: "step", scale: "log", sampleStep: null, failures: 0 };
let page = JSON.parse(document.getElementById("data").textContent);
let made = [];
const plots = new Map(); // elements are reused, so that zoom and hidden curves remain

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(9).filter((child) => child !== null && child !== undefined));
  return node;
}

function table(head, rows, options = {}) {
  const numeric = options.numeric || [], remark = options.remark;
  const kind = (i) => (numeric.includes(i) ? "num" : i === remark ? "remark" : "text");
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": options.label || "table" }, el("table", { class: options.class },
    head ? el("thead", {}, el("tr", {}, head.map((name, i) => el("th", { scope: "col", class: numeric.includes(i) ? "num" : null }, name)))) : null,
    el("tbody", {}, rows.map((row, r) => el("tr", { class: options.rowClass ? options.rowClass(r) : null },
      row.map((cell, i) => (options.headed && i === 0 ? el("th", { scope: "row" }, cell) : el("td", { class: kind(i) }, cell))))))));
}

function choice(label, options, current, choose) {
  return el("label", {}, label, el("span", { class: "choice", role: "group", "aria-label": label }, Object.entries(options).map(([value, text]) =>
    el("button", { type: "button", "data-value": value, "aria-pressed": String(value === current), onclick: () => choose(value) }, text))));
}

function header(run) {
  const live = page.live && view.failures > 2;
  return [
    el("h1", {}, run ? run.name : page.title),
    el("div", { class: "state", role: "status" }, el("span", { class: "dot " + (run && !live ? run.state : "") }),
      el("span", { id: "state" }, live ? "the server does not respond; this is the last known state"
        : run ? (run.state === "waiting" ? "waiting" : run.state) + (run.remark ? ", " + run.remark : "") : page.waiting)),
  ];
}

function selector() {
  if (view.runs.length < 2) return null;
  return el("div", { class: "bar" }, el("label", {}, "Run", el("select", { id: "run", onchange: (event) => {
    view.chosen = Number(event.target.value); view.sampleStep = null; render(); document.getElementById("run").focus();
  } }, view.runs.map((run, i) => el("option", { value: i, selected: i === view.chosen }, run.name)))));
}

function figures(run) {
  return el("div", { class: "figures" }, run.figures.map(([name, value, remark]) => el("div", { class: "figure" },
    el("div", { class: "name" }, name), el("div", { class: "value" }, value), el("div", { class: "remark" }, remark))));
}

function comparison() {
  if (view.runs.length < 2) return [];
  const names = [...new Set(view.runs.flatMap((run) => run.figures.map((figure) => figure[0])))];
  const of = (run, name) => (run.figures.find((figure) => figure[0] === name) || ["", "–"])[1];
  return [el("h2", {}, "Comparison"), table(["Run", ...names], view.runs.map((run) => [run.name, ...names.map((name) => of(run, name))]),
    { numeric: names.map((_, i) => i + 1), rowClass: (r) => (r === view.chosen ? "chosen" : null), label: "comparison of runs" })];
}

function chartBox(chart) {
  const id = "plot-" + chart.id;
  const plot = plots.get(id) || el("div", { class: "plot", id, role: "img", "aria-label": chart.title });
  plots.set(id, plot);
  made.push([plot, chart]);
  return el("div", { class: "chart" + (chart.wide ? " wide" : "") }, el("h3", {}, chart.title),
    chart.unit ? el("p", { class: "soft small" }, chart.unit) : null, plot);
}

function training(run) {
  const charts = allCharts(view);
  if (!charts.length) return [];
  const redraw = () => { const y = scrollY; render(); scrollTo(0, y); };
  return [el("h2", {}, "Training"),
    el("div", { class: "bar" },
      choice("x-axis", { step: "Steps", tokens: "Tokens", hours: "Hours" }, view.axis, (axis) => { view.axis = axis; redraw(); }),
      choice("Loss", { log: "Log", linear: "Linear", late: "Second half" }, view.scale, (scale) => { view.scale = scale; redraw(); })),
    el("div", { class: "charts" }, charts.map(chartBox)), events(run)];
}

function events(run) {
  if (!run.events.length) return null;
  return el("details", { open: run.events.length < 6 }, el("summary", {}, run.events.length + (run.events.length === 1 ? " event" : " events")),
    table(["Step", "Event"], run.events.map(([step, text]) => [step === null ? "–" : step.toLocaleString("en"), text]), { numeric: [0], label: "events" }));
}

function evaluations(run) {
  if (!run.evaluations.length) return [el("h2", {}, "Evaluation"), el("p", { class: "soft" }, "No results yet. To evaluate this run: restomod eval " + run.folder)];
  return [el("h2", {}, "Evaluation"), run.evaluations.map((found) => [el("h3", {}, TASKS[found.task] || found.task), table(["Model", ...found.columns, ""], found.rows, {
    numeric: found.columns.map((_, i) => i + 1), remark: found.columns.length + 1, rowClass: (r) => (r < found.own ? "own" : null), label: found.task })])];
}

function passage(found) {
  const shade = (loss) => "background: rgba(var(--accent-rgb), " + Math.min(0.62, Math.max(0, loss / 16)).toFixed(3) + ")";
  return [el("p", { class: "soft small" }, found.loss.toFixed(2) + " nats per token"),
    el("div", { class: "passage mono", dir: "auto" }, found.before ? el("span", { class: "before" }, found.before) : null,
      found.tokens.map(([text, loss]) => {
        const span = el("span", { title: loss.toFixed(2) + " nats, probability " + Math.exp(-loss).toPrecision(2) }, text);
        span.style.cssText = shade(loss);
        return span;
      }))];
}

function errorAnalysis(run) {
  const found = run.error_analysis, title = el("h2", {}, "Error analysis");
  if (found.reason) return [title, el("p", { class: "soft" }, "Not available: " + found.reason + ".")];
  const most = Math.max(...found.kinds.map((kind) => kind.loss));
  const meter = (loss) => el("span", { class: "share", style: "width:" + (100 * loss / most).toFixed(1) + "%" });
  const percent = (share) => (100 * share).toFixed(1) + " %";
  return [title,
    el("p", { class: "soft" }, "Step " + found.step.toLocaleString("en") + ", on " + found.tokens.toLocaleString("en") + " validation tokens: " + found.loss.toFixed(4) + " nats per token." + (found.remark ? " " + found.remark : "")),
    el("h3", {}, "Loss by kind of token"),
    table(["Kind", "", "Loss", "Share of tokens", "Share of loss", ""], found.kinds.map((kind) => [kind.name, meter(kind.loss), kind.loss.toFixed(3), percent(kind.share), percent(kind.of_loss), kind.meaning]),
      { numeric: [2, 3, 4], remark: 5, label: "loss by kind of token", class: "kinds" }),
    el("div", { class: "charts" }, chartBox({ ...positionChart(run), wide: true })),
    found.sources.length > 1 ? [el("h3", {}, "Loss by source"), table(["Source", "Loss", "Tokens"], found.sources.map((source) => [source.name, source.loss.toFixed(4), source.tokens.toLocaleString("en")]), { numeric: [1, 2], label: "loss by source" })] : [],
    [["best", "Best predicted passages"], ["worst", "Worst predicted passages"]].map(([key, name]) => el("details", { open: key === "worst", class: "passages" }, el("summary", {}, name),
      el("p", { class: "soft small legend" }, "low loss", el("span", { class: "ramp" }), "high loss; hover over a token for its value"), found[key].map(passage)))];
}

function samples(run) {
  const steps = [...new Set(run.samples.map((sample) => sample.step))];
  if (!steps.length) return [];
  const shown = el("div", {});
  const label = el("output", { class: "mark" });
  const show = (at) => {
    view.sampleStep = at === steps.length - 1 ? null : steps[at];
    label.textContent = "step " + steps[at].toLocaleString("en");
    shown.replaceChildren(...run.samples.filter((sample) => sample.step === steps[at]).map((sample) => el("div", { class: "sample mono", dir: "auto" },
      el("span", { class: "prompt" }, sample.prompt), sample.text)));
  };
  const found = steps.indexOf(view.sampleStep);
  const at = found < 0 ? steps.length - 1 : found;
  const slider = el("input", { type: "range", id: "sample", min: 0, max: steps.length - 1, value: at, "aria-label": "step of the samples", oninput: (event) => show(Number(event.target.value)) });
  show(at);
  return [el("h2", {}, "Samples"), el("div", { class: "bar" }, el("label", {}, steps.length > 1 ? slider : null, label)), shown];
}

function details(run) {
  const pairs = (rows, remark) => table(null, rows, { class: "pairs", headed: true, remark });
  return [
    el("h2", {}, "Configuration"),
    el("p", { class: "soft" }, run.changed.length ? "Differences from the preset " + run.preset + ":" : "No difference from the preset " + run.preset + "."),
    run.changed.length ? table(["Setting", "This run", "Preset"], run.changed.map(([name, value, other]) => [el("code", {}, name), el("code", {}, value), el("code", { class: "soft" }, other)]), { label: "differences from the preset" }) : null,
    el("details", { class: "settings" }, el("summary", {}, "All " + run.settings.length + " settings"), table(null, run.settings.map(([name, value]) => [el("code", {}, name), el("code", {}, value)]), { label: "settings" })),
    el("h2", {}, "Compute and cost"), pairs(run.usage, 2),
    el("h2", {}, "Model, data, machine"), pairs(run.about),
    run.environments.map((rows, i) => el("details", {}, el("summary", {}, run.environments.length > 1 ? "Environment of session " + (i + 1) : "Environment"), pairs(rows))),
  ];
}

function render() {
  const main = document.getElementById("page"), run = view.runs[view.chosen];
  const open = new Set([...main.querySelectorAll("details")].flatMap((node, i) => (node.open ? [i] : [])));
  const before = main.querySelectorAll("details").length;
  made = [];
  main.replaceChildren(...[header(run), selector(), run ? [figures(run), comparison(), training(run), evaluations(run), errorAnalysis(run), samples(run), details(run)] : [],
    el("footer", {}, page.footer)].flat(9).filter(Boolean));
  const nodes = [...main.querySelectorAll("details")];
  if (page.live && nodes.length === before) nodes.forEach((node, i) => { node.open = open.has(i); });
  draw();
}

function draw() {
  for (const [plot, chart] of made) {
    const data = chart.traces();
    Plotly.react(plot, data, layout(chart, view, data), CONFIG);
  }
}

function take(data) {
  const name = view.runs[view.chosen] && view.runs[view.chosen].name;
  page = data;
  view.runs = data.runs;
  view.chosen = Math.max(0, view.runs.findIndex((run) => run.name === name));
  render();
}

/* Request new data while the page is open; status 204 means no new data. */
async function follow() {
  let version = page.version;
  for (;;) {
    await new Promise((wake) => setTimeout(wake, 1000 * page.seconds));
    if (document.hidden) continue;
    try {
      const answer = await fetch("data.json?since=" + encodeURIComponent(version), { cache: "no-store" });
      if (answer.status !== 204) {
        const data = await answer.json();
        version = data.version;
        const y = scrollY;
        view.failures = 0;
        take(data);
        scrollTo(0, y);
      } else if (view.failures) { view.failures = 0; render(); }
    } catch (error) {
      view.failures += 1;
      if (view.failures === 3) render();
    }
  }
}

async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
  const text = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  const script = document.createElement("script");
  script.textContent = text;
  document.head.append(script);
}

unpack().then(() => {
  take(page);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", render);
  document.documentElement.dataset.ready = "true";
  if (page.live) follow();
}).catch((error) => {
  document.getElementById("page").append(el("p", {}, "This browser cannot show the report (" + error.message + "). Use a browser from 2023 or later."));
});
