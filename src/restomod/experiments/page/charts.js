"use strict";
// Charts of the runs. Text of a run reaches plotly only through plain(): plotly reads some markup of its own.

const CHARTS = [
  { id: "loss", title: "Loss", unit: "nats per token", wide: true, metric: "loss", digits: ".4f" },
  { id: "lr", title: "Learning rate", metric: "lr", digits: ".3~g" },
  { id: "grad_norm", title: "Gradient norm", metric: "grad_norm", digits: ".3~g", log: true },
  { id: "tokens_per_second", title: "Tokens per second", metric: "tokens_per_second", digits: ",.0f" },
  { id: "mfu", title: "Model FLOP utilisation", metric: "mfu", digits: ".1%", tick: ".0%" },
];
const AXES = { step: "step", tokens: "tokens seen", hours: "hours in steps" };
const DASHES = ["solid", "dash", "dot", "dashdot"];

function plain(text) {
  return String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
}

function xs(run, curve, axis) {
  if (axis === "hours") return curve.h;
  return axis === "tokens" ? curve.x.map((step) => step * run.batch_tokens) : curve.x;
}

/* The chosen run has the accent; the others are quiet, and told apart by shade and dash. */
function look(index, chosen) {
  if (index === chosen) return { color: colour("accent"), dash: "solid" };
  const place = index > chosen ? index - 1 : index;
  return { color: colour("other-" + (1 + (place % 4))), dash: DASHES[place % 4] };
}

function traces(chart, view) {
  const made = [];
  const several = view.runs.length > 1;
  view.runs.forEach((run, index) => {
    const { color, dash } = look(index, view.chosen);
    const name = plain(run.name);
    const curves = run.curves;
    const mean = curves[chart.metric + "_mean"];
    const raw = curves[chart.metric];
    const hover = "%{y:" + chart.digits + "}";
    const add = (curve, label, more) => made.push({
      type: "scatter", x: xs(run, curve, view.axis), y: curve.y, name: label, mode: "lines",
      line: { color, width: 1.6, dash }, hovertemplate: hover, ...more,
    });
    const of = (label) => (several ? (label ? name + ", " + label : name) : label || name);
    const train = chart.id === "loss" ? "training" : "";
    if (raw && mean) {
      if (index === view.chosen) {
        add(raw, of(train ? "each step" : "each step"), { line: { color, width: 1 }, opacity: 0.32, hoverinfo: "skip", hovertemplate: null });
      }
      add(mean, of((train ? train + ", " : "") + "mean of " + mean.over), {});
    } else if (raw) {
      add(raw, of(train), {});
    }
    if (chart.id === "loss" && curves.val) {
      add(curves.val, of("validation"), {
        mode: "lines+markers", line: { color: index === view.chosen ? colour("ink") : color, width: 1.4, dash: "dot" },
        marker: { size: 6, color: colour("paper"), line: { width: 1.6, color: index === view.chosen ? colour("ink") : color } },
      });
    }
  });
  return made;
}

function taskTraces(task, view) {
  return view.runs.flatMap((run, index) => {
    const points = run.tasks[task];
    if (!points) return [];
    const { color, dash } = look(index, view.chosen);
    return [{
      type: "scatter", x: xs(run, points, view.axis), y: points.y, name: plain(run.name), mode: "lines+markers",
      line: { color, width: 1.6, dash }, marker: { size: 6, color },
      error_y: { type: "data", array: points.error, color, thickness: 1, width: 3 },
      hovertemplate: "%{y:.2%} ± %{error_y.array:.2%}",
    }];
  });
}

function layout(chart, view, data) {
  const ink = colour("ink"), soft = colour("soft"), grid = colour("grid");
  const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: soft };
  const log = chart.log || (chart.id === "loss" && view.log);
  const lines = (chart.lines || []).map((line) => ({ ...line, at: log ? Math.log10(line.value) : line.value }));
  return {
    font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 52, r: 12, t: 8, b: 40 },
    uirevision: [chart.id, view.axis, view.log, view.chosen].join(), showlegend: data.length > 1,
    legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", font: { ...font, color: ink }, bgcolor: "rgba(0,0,0,0)" },
    hovermode: "x unified",
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("rule"), font: { ...font, color: ink } },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    xaxis: {
      title: { text: chart.x || AXES[view.axis], standoff: 8 }, gridcolor: grid, zeroline: false, linecolor: colour("rule"), showline: true,
      tickformat: chart.x ? undefined : view.axis === "hours" ? ".3~g" : ".3~s", hoverformat: view.axis === "hours" ? ".2f" : ",.0f",
      type: chart.xlog ? "log" : "linear", nticks: 7,
      ...(chart.xlog ? { dtick: Math.log10(4), tickformat: ",.0f" } : {}),
    },
    yaxis: {
      gridcolor: grid, zeroline: false, type: log ? "log" : "linear", tickformat: chart.tick || (chart.digits === ",.0f" ? "~s" : "~g"),
      nticks: 6, automargin: true, ...(log ? { minexponent: 3, dtick: "D2" } : {}),
    },
    shapes: lines.map((line) => ({
      type: "line", xref: "paper", x0: 0, x1: 1, y0: line.value, y1: line.value, line: { color: soft, width: 1, dash: "4px,4px" },
    })),
    annotations: lines.map((line) => ({
      xref: "paper", x: 1, xanchor: "right", y: line.at, yanchor: "bottom", showarrow: false,
      text: plain(line.name) + " " + line.label, font: { ...font, color: soft, size: 11 },
    })),
  };
}

const CONFIG = { displayModeBar: false, responsive: true, showTips: false, doubleClick: "reset" };

function allCharts(view) {
  const lines = view.runs[view.chosen].lines;
  const made = CHARTS.filter((chart) => view.runs.some((run) => run.curves[chart.metric] || (chart.id === "loss" && run.curves.val)))
    .map((chart) => ({ ...chart, traces: () => traces(chart, view),
      lines: chart.id === "loss" ? (lines.loss || []).map((line) => ({ ...line, label: line.value.toFixed(2) })) : [] }));
  const tasks = [...new Set(view.runs.flatMap((run) => Object.keys(run.tasks)))];
  const named = { hellaswag: "HellaSwag", "hellaswag-harness": "HellaSwag, harness" };
  const more = tasks.map((task) => ({
    id: "task-" + task, title: named[task] || task, digits: ".2%", tick: ".0%",
    unit: (view.runs.find((run) => run.tasks[task]).tasks[task].metric) + ", ± one standard error",
    traces: () => taskTraces(task, view),
    lines: (lines[task] || []).map((line) => ({ ...line, label: (100 * line.value).toFixed(1) + " %" })),
  }));
  return [...made.slice(0, 1), ...more, ...made.slice(1)];
}

function positionChart(run) {
  const points = run.examined.positions;
  return {
    id: "positions", title: "Loss by position", unit: "nats per token, by how many tokens are seen", digits: ".3f", x: "tokens seen in the window",
    xlog: true, lines: [{ name: "mean", value: run.examined.loss, label: run.examined.loss.toFixed(2) }],
    traces: () => [{ type: "scatter", mode: "lines", x: points.x, y: points.y, name: "loss", line: { color: colour("accent"), width: 1.6 }, hovertemplate: "%{y:.3f}" }],
  };
}
