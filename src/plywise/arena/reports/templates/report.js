// What the demo's charts show, from the study in #data.
(() => {
  const { finite, log, median, pretty } = Charts;
  const source = document.getElementById("data").textContent;
  const study = JSON.parse(source);
  const methods = study.methods || [];
  const sensitivity = study.sensitivity || [];
  const layers = study.layers || {};
  const names = [...new Set([...methods, ...sensitivity, ...(layers.series || [])].map((one) => one.name))];

  // What each chart shows ------------------------------------------------------------------------

  function curve(method, clock) {
    const runs = method.runs || [];
    const at = new Map(); // step -> what every run says there, so that seeds meet at equal steps
    for (const run of runs) {
      (run.steps || []).forEach((step, i) => {
        if (!at.has(step)) at.set(step, { clocks: [], losses: [] });
        const seconds = (run.cpu_seconds || [])[i];
        if (finite(seconds)) at.get(step).clocks.push(seconds);
        if (finite((run.loss || [])[i])) at.get(step).losses.push(run.loss[i]);
      });
    }
    const points = [];
    for (const [step, { clocks, losses }] of at) {
      const x = clock === "steps" ? step : clocks.length ? median(clocks) : null;
      if (!finite(x)) continue;
      if (!losses.length) points.push({ x, value: null });
      else points.push({ x, value: median(losses), low: Math.min(...losses), high: Math.max(...losses) });
    }
    const failed = runs.filter((run) => run.failure);
    for (const run of failed) {
      const last = (run.loss || []).findLastIndex(finite);
      const x = last < 0 ? 0 : (clock === "steps" ? run.steps : run.cpu_seconds || [])[last];
      if (!finite(x)) continue;
      let point = points.find((one) => one.x === x);
      if (!point) points.push((point = { x }));
      point.mark = "top";
      point.why = `seed ${run.seed}: ${run.failure}`;
    }
    const note = failed.length ? `${failed.length} of ${runs.length} failed` : "";
    return { name: method.name, points, note };
  }

  function rates(one) {
    const points = [];
    (one.rates || []).forEach((rate, i) => {
      const ratio = log(rate / one.default_rate);
      if (ratio === null) return;
      const value = (one.final_loss || [])[i];
      points.push({ x: Math.round(ratio * 1e6) / 1e6, value, ...(finite(value) ? {} : { mark: "top", why: "diverged" }) });
    });
    const diverged = points.filter((point) => point.mark).length;
    return { name: one.name, points, note: diverged ? `${diverged} diverged` : "" };
  }

  const layerNames = layers.names || [];
  const charts = [
    { id: "steps", title: "Loss against steps", series: methods.map((one) => curve(one, "steps")), label: "steps", head: (x) => `step ${Math.round(x)}` },
    { id: "seconds", title: "Loss against CPU seconds", series: methods.map((one) => curve(one, "seconds")), label: "CPU seconds", head: (x) => `${pretty(x)} CPU s` },
    { id: "sensitivity", title: "Learning-rate sensitivity", series: sensitivity.map(rates), label: "learning rate ÷ tuned learning rate", head: (x) => `${pretty(10 ** x)} × the tuned rate`, dots: true, ticks: "decades", divisions: [[1]], home: "tuned", unit: "×" },
    {
      id: "layers", title: "What each layer hears", dots: true, ticks: layerNames, unbounded: true,
      series: (layers.series || []).map((one) => ({ name: one.name, points: (one.sizes || []).map((value, x) => ({ x, value })), note: "" })),
      head: (x) => layerNames[x] ?? `layer ${x}`,
    },
  ];

  const board = Charts.board(names);
  charts.forEach(({ id, series }) => board.legend(id === "steps" ? "curves" : id, series));
  board.show(charts);
  Charts.sortable(document.getElementById("results"));
  Charts.offer(document.getElementById("download"), "study.json", source, "application/json");
  document.documentElement.dataset.ready = "true";
})();
