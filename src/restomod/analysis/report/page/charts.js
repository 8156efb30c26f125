"use strict";
// Charts of the runs. plotly parses some HTML, so text of a run is passed to it through plain() only.

const CHARTS = [
  { id: "loss", title: "Loss", unit: "nats per token", wide: true, metric: "loss", digits: ".4f" },
  { id: "lr", title: "Learning rate", metric: "lr", digits: ".3~g" },
  { id: "grad_norm", title: "Gradient norm", metric: "grad_norm", digits: ".3~g", log: true },
  { id: "tokens_per_second", title: "Tokens per second", metric: "tokens_per_second", digits: ",.0f" },
  { id: "mfu", title: "Model FLOPs utilisation", metric: "mfu", digits: ".1%", tick: ".0%" },
];
const TASKS = {
  validation: "Validation loss", hellaswag: "HellaSwag", "hellaswag-harness": "HellaSwag (lm-evaluation-harness)", lambada: "LAMBADA",
  "arc-easy": "ARC, easy", "arc-challenge": "ARC, challenge", piqa: "PIQA", winograd: "Winograd",
};
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

/* Return the line style of a run: accent colour if chosen, otherwise shades of grey and dashes. */
function look(index, chosen) {
  if (index === chosen) return { color: colour("accent"), dash: "solid" };
  const place = index > chosen ? index - 1 : index;
  return { color: colour("other-" + (1 + (place % 4))), dash: DASHES[place % 4] };
}

/* Return runs with their indices; the chosen run comes last, so that it is drawn on top. */
function inOrder(view) {
  return view.runs.map((run, index) => [run, index]).sort((a, b) => (a[1] === view.chosen) - (b[1] === view.chosen));
}

function traces(chart, view) {
  const made = [];
  const several = view.runs.length > 1;
  for (const [run, index] of inOrder(view)) {
    const { color, dash } = look(index, view.chosen), chosen = index === view.chosen;
    const name = plain(run.name), curves = run.curves;
    const mean = curves[chart.metric + "_mean"], raw = curves[chart.metric], val = chart.id === "loss" && curves.val;
    const add = (curve, label, more) => made.push({
      type: "scatter", x: xs(run, curve, view.axis), y: curve.y, name: label, mode: "lines", legendrank: index,
      line: { color, width: 1.7, dash }, hovertemplate: "%{y:" + chart.digits + "}", ...more,
    });
    const label = chart.id === "loss" ? (several ? name : "training") : several ? name : chart.title;
    if (raw && mean) {
      if (chosen) {
        add(raw, label, { line: { color, width: 1 }, opacity: 0.3, hoverinfo: "skip", hovertemplate: null, showlegend: false, legendgroup: label });
      }
      add(mean, label, { legendgroup: label });
    } else if (raw) {
      add(raw, label, { legendgroup: label });
    }
    if (val) {
      const shade = chosen ? colour("ink") : color, few = val.x.length <= 30;
      add(val, several ? name + ", validation" : "validation", {
        ...(several && raw ? { showlegend: false, legendgroup: name } : {}), // one legend entry per run
        mode: few ? "lines+markers" : "lines", line: { color: shade, width: 1.5, dash: few || !chosen ? "dot" : "solid" },
        marker: { size: 6, color: colour("paper"), line: { width: 1.6, color: shade } },
      });
    }
  }
  return made;
}

function taskTraces(task, view) {
  return inOrder(view).flatMap(([run, index]) => {
    const points = run.tasks[task];
    if (!points) return [];
    const { color, dash } = look(index, view.chosen), chosen = index === view.chosen, few = points.x.length <= 30;
    return [{
      type: "scatter", x: xs(run, points, view.axis), y: points.y, name: plain(run.name), mode: few ? "lines+markers" : "lines",
      legendrank: index, line: { color, width: 1.6, dash }, marker: { size: 6, color },
      error_y: { type: "data", array: points.error, color: colour("rule"), thickness: few ? 1.5 : 1, width: 0, visible: chosen },
      connectgaps: false, customdata: points.error.map((error, i) => [error, points.examples[i] ? ", " + points.examples[i].toLocaleString("en") + " examples" : ""]),
      hovertemplate: "%{y:.2%} ± %{customdata[0]:.2%}%{customdata[1]}",
    }];
  });
}

/* Return the numbers of examples of a task's points as text. Lines do not join points of different numbers. */
function sampleSizes(task, view) {
  const sizes = new Set(view.runs.flatMap((run) => (run.tasks[task] ? run.tasks[task].examples : [])).filter(Boolean));
  return sizes.size ? [...sizes].sort((a, b) => a - b).map((n) => n.toLocaleString("en")).join(" and ") + " examples" : "";
}

/* Return the range of the second half of all curves. */
function lateRange(data) {
  const last = Math.max(...data.map((trace) => trace.x[trace.x.length - 1]));
  const late = data.filter((trace) => trace.opacity === undefined)
    .flatMap((trace) => trace.y.filter((y, i) => y !== null && trace.x[i] >= last / 2));
  if (!late.length) return null;
  const low = Math.min(...late), high = Math.max(...late), room = 0.15 * (high - low) + 0.01;
  return [low - room, high + room];
}

/*
 * Return plotly's `nticks` for a logarithmic axis, so that at least three ticks are shown: at equal distances within a
 * decade, at 1, 2 and 5 in up to three decades, and at powers of ten beyond.
 */
function logTicks(data) {
  const all = data.flatMap((trace) => trace.y.filter((y) => y !== null && y > 0));
  const decades = Math.log10(Math.max(...all) / Math.min(...all));
  return decades < 0.6 ? 6 : decades < 1 ? 5 : Math.min(5, Math.max(3, Math.round(2 * decades)));
}

function layout(chart, view, data) {
  const ink = colour("ink"), soft = colour("soft"), grid = colour("grid");
  const font = { family: getComputedStyle(document.body).fontFamily, size: 12, color: soft };
  const isLoss = chart.id === "loss";
  const log = chart.log || (isLoss && view.scale === "log");
  const range = isLoss && view.scale === "late" ? lateRange(data) : null;
  const lines = (chart.lines || []).map((line) => ({ ...line, at: log ? Math.log10(line.value) : line.value }));
  return {
    font, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    margin: { l: 52, r: 12, t: 8, b: 40 },
    uirevision: [chart.id, view.axis, view.scale, view.chosen].join(),
    // a legend of many runs does not fit into a small chart
    showlegend: data.filter((trace) => trace.showlegend !== false).length > 1 && (chart.wide || view.runs.length <= 4),
    legend: { orientation: "h", x: 0, y: 1.02, xanchor: "left", yanchor: "bottom", font: { ...font, color: ink }, bgcolor: "rgba(0,0,0,0)" },
    hovermode: "x unified",
    hoverlabel: { namelength: -1, bgcolor: colour("panel"), bordercolor: colour("rule"), font: { ...font, color: ink } },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom",
    xaxis: {
      title: { text: chart.x || AXES[view.axis], standoff: 8 }, gridcolor: grid, zeroline: false, linecolor: colour("rule"), showline: true,
      tickformat: chart.x ? undefined : view.axis === "hours" ? ".3~g" : ".3~s", hoverformat: view.axis === "hours" ? ".2f" : ",.0f",
      type: chart.xlog ? "log" : "linear", nticks: 7, rangemode: "nonnegative",
      ...(!chart.x && view.axis === "step" && Math.max(...data.flatMap((trace) => trace.x)) < 6 ? { dtick: 1, tickformat: ",.0f" } : {}),
      ...(chart.xlog ? { dtick: Math.log10(4), tickformat: ",.0f" } : {}),
    },
    yaxis: {
      gridcolor: grid, zeroline: false, type: log ? "log" : "linear", tickformat: chart.tick || (chart.digits === ",.0f" ? "~s" : "~g"),
      nticks: log ? logTicks(data) : 6, automargin: true, ...(range ? { range } : {}),
    },
    shapes: lines.map((line) => ({
      type: "line", xref: "paper", x0: 0, x1: 1, y0: line.value, y1: line.value, line: { color: soft, width: 1, dash: "4px,4px" },
    })),
    annotations: lines.map((line) => ({ // rising curves have free space above their start and below their end
      xref: "paper", x: chart.left && line.name !== "chance" ? 0 : 1, xanchor: chart.left && line.name !== "chance" ? "left" : "right", y: line.at, yanchor: "bottom", showarrow: false,
      text: plain(line.name) + " " + line.label, font: { ...font, color: soft, size: 11 }, bgcolor: colour("paper"), opacity: 0.85, borderpad: 1,
    })),
  };
}

const CONFIG = { displayModeBar: false, responsive: true, showTips: false, doubleClick: "reset" };

function units(chart, view) {
  const mean = view.runs[view.chosen].curves[chart.metric + "_mean"];
  const val = chart.id === "loss" && view.runs.length > 1 && "validation: " + (view.runs[view.chosen].curves.val ? "dark line (other runs: dotted)" : "dotted line");
  return [chart.unit, mean && "faint line: single steps; bold line: mean over " + mean.over + " steps", val].filter(Boolean).join("; ");
}

function allCharts(view) {
  const lines = view.runs[view.chosen].lines;
  const made = CHARTS.filter((chart) => view.runs.some((run) => run.curves[chart.metric] || (chart.id === "loss" && run.curves.val)))
    .map((chart) => ({ ...chart, unit: units(chart, view), traces: () => traces(chart, view),
      lines: chart.id === "loss" ? (lines.loss || []).map((line) => ({ ...line, label: line.value.toFixed(2) })) : [] }));
  const tasks = [...new Set(view.runs.flatMap((run) => Object.keys(run.tasks)))];
  const more = tasks.map((task) => ({
    id: "task-" + task, title: TASKS[task] || task, digits: ".2%", tick: ".0%",
    unit: [(view.runs.find((run) => run.tasks[task]).tasks[task].metric) + ", ± one standard error", sampleSizes(task, view)].filter(Boolean).join("; "),
    left: true, traces: () => taskTraces(task, view),
    lines: (lines[task] || []).map((line) => ({ ...line, label: Number((100 * line.value).toFixed(2)) + " %" })),
  }));
  return [...made.slice(0, 1), ...more, ...made.slice(1)];
}

function positionChart(run) {
  const points = run.error_analysis.positions;
  return {
    id: "positions", title: "Loss by position", unit: "nats per token", digits: ".3f", x: "position in the window",
    xlog: true, lines: [{ name: "mean", value: run.error_analysis.loss, label: run.error_analysis.loss.toFixed(2) }],
    traces: () => [{ type: "scatter", mode: "lines", x: points.x, y: points.y, name: "loss", line: { color: colour("accent"), width: 1.6 }, hovertemplate: "%{y:.3f}" }],
  };
}
