"use strict";
// Draws the charts from the page's payload, and lets the legend and the controls change them.
(function () {
  const { specs, data } = JSON.parse(document.getElementById("payload").textContent);
  const hidden = { hidden_curves: new Set(), hidden_optimizers: new Set() };
  const views = new Map();

  // Columns to rows; what is null is left out.
  function rows(columnar, value) {
    const made = [];
    for (const curve of columnar) {
      const { condition, curve: name, optimizer, kind } = curve;
      for (let i = 0; i < curve.step.length; i++) {
        if (curve[value][i] === null) continue;
        made.push({
          condition, curve: name, optimizer, kind, step: curve.step[i], tokens: curve.tokens[i], seconds: curve.seconds[i],
          [value]: curve[value][i], low: curve.low[i], high: curve.high[i], seeds: curve.seeds[i],
        });
      }
    }
    return made;
  }

  function cells(map) {
    return map.rows.flatMap((place, i) => map.steps.map((step, j) => ({ place, step, value: map.values[i][j] })));
  }

  const datasets = {
    curves: rows(data.curves, "loss"),
    gap_curves: rows(data.gap_curves, "gap"),
    final_gaps: data.final_gaps,
    gains: data.gains,
    matrix: data.matrix,
  };

  function walk(node, visit) {
    if (Array.isArray(node)) node.forEach((item) => walk(item, visit));
    else if (node && typeof node === "object") {
      visit(node);
      Object.values(node).forEach((item) => walk(item, visit));
    }
  }

  const TITLES = { step: "step", tokens: "tokens", seconds: "training time, s" };

  // The specification with the axes that a chart's controls ask for.
  function adjusted(spec, controls) {
    const made = structuredClone(spec);
    if (!controls) return made;
    const value = (name) => controls.querySelector(`[name=${name}]`);
    const field = value("x").value;
    walk(made, (node) => {
      if (!node.encoding || !node.encoding.x || node.encoding.x.field !== "step") return;
      const { x, y } = node.encoding;
      x.field = field;
      x.title = TITLES[field];
      x.scale = { ...x.scale, type: value("logx").checked ? "log" : "linear" };
      if (field !== "step" || value("logx").checked) x.axis = { ...x.axis, format: "~s" };
      if (value("logy")) y.scale = { ...y.scale, type: value("logy").checked ? "log" : "linear" };
    });
    (made.params || []).forEach((param) => {
      if (param.name === "kind" && value("kind")) param.value = value("kind").value;
      if (param.name === "bands") param.value = value("bands").checked;
    });
    return made;
  }

  // Under the pointer lies a cell of a Voronoi diagram, whose datum is a point, whose datum is the row. Vega-Lite reads
  // numbers from the row and texts from the point, which has none.
  function patch(vega) {
    walk(vega, (node) => {
      const tip = node.encode && node.encode.update && node.encode.update.tooltip;
      if (tip && tip.signal && tip.signal.includes("datum.datum")) {
        tip.signal = tip.signal.replace(/\bdatum(\.datum)?\b/g, "datum.datum");
      }
    });
    return vega;
  }

  const options = { actions: false, renderer: "svg", tooltip: { theme: "altgrad" }, patch };

  async function draw(element, spec, named) {
    const name = element.dataset.chart;
    (spec.params || []).forEach((param) => {
      if (param.name in hidden) param.value = [...hidden[param.name]];
    });
    const used = new Set();
    walk(spec, (node) => node.data && node.data.name && used.add(node.data.name));
    spec.datasets = { ...spec.datasets };
    used.forEach((key) => key in named && (spec.datasets[key] = named[key]));
    if (views.has(name)) views.get(name).finalize();
    views.delete(name);
    try {
      views.set(name, await window.altgrad.embed(element, spec, options));
    } catch (error) {
      element.textContent = `This chart could not be drawn: ${error.message}`;
      console.error(error);
    }
  }

  const drawing = [];
  document.querySelectorAll(".chart[data-chart]").forEach((element) => {
    const name = element.dataset.chart;
    if (name === "heat") return;
    const controls = document.querySelector(`.controls[data-for="${name}"]`);
    const again = () => draw(element, adjusted(specs[name], controls), datasets);
    if (controls) controls.addEventListener("change", again);
    drawing.push(again());
  });

  const heat = document.querySelector('.chart[data-chart="heat"]');
  if (heat) {
    const controls = document.querySelector('.controls[data-for="heat"]');
    const condition = controls.querySelector("[name=condition]");
    const measure = controls.querySelector("[name=measure]");
    const again = () => {
      const maps = data.heat[condition.value];
      const before = measure.value;
      measure.replaceChildren(...Object.keys(maps).map((name) => new Option(name, name, false, name === before)));
      const map = maps[measure.value];
      const spec = { ...structuredClone(specs[`heat ${measure.value}`]), height: 90 + 13 * map.rows.length };
      return draw(heat, spec, { cells: cells(map) });
    };
    controls.addEventListener("change", again);
    drawing.push(again());
  }

  function refresh() {
    document.querySelectorAll(".legend button[data-hide]").forEach((button) => {
      button.setAttribute("aria-pressed", String(!hidden[button.dataset.hide].has(button.dataset.name)));
    });
    for (const { view } of views.values()) {
      for (const [name, set] of Object.entries(hidden)) {
        try {
          view.signal(name, [...set]);
        } catch {
          continue; // a heat map has no such signal
        }
      }
      view.runAsync();
    }
  }

  document.querySelectorAll(".legend button").forEach((button) => {
    button.addEventListener("click", () => {
      if ("all" in button.dataset) Object.values(hidden).forEach((set) => set.clear());
      else {
        const set = hidden[button.dataset.hide];
        if (!set.delete(button.dataset.name)) set.add(button.dataset.name);
      }
      refresh();
    });
  });

  // A link into a closed table opens it; on paper all are open.
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => (one.open = true)));
  Promise.all(drawing).then(() => (document.documentElement.dataset.ready = "true"));
})();
