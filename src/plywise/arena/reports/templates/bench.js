// What a bench's tables and charts show, from the numbers in #data. Everything was computed before: here it is
// only chosen, written and drawn. An infinite number has become null.
(() => {
  const { element, finite, inside, log, pretty, variable } = Charts;
  const data = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const others = data.methods.filter((name) => !data.shown.includes(name));
  const board = Charts.board([...data.methods, data.before], others);
  const isNull = (name) => Object.hasOwn(data.nulls, name);
  const axes = { steps: "steps", gradients: "passes forward and backward", cpu: "CPU seconds", wall: "seconds" };
  const units = { steps: "steps", gradients: "passes", cpu: "CPU\u00a0s", wall: "s" };

  // What is chosen ---------------------------------------------------------------------------------

  function options(id, pairs, chosen) {
    const select = find(id);
    const before = select.value;
    select.replaceChildren(...pairs.map(([value, text]) => Object.assign(element("option", text), { value })));
    select.value = [before, chosen, pairs[0]?.[0]].find((value) => pairs.some(([one]) => one === value)) ?? "";
    select.closest("label").hidden = pairs.length < 2;
  }

  const chosen = (id) => find(id).value;

  // Tables -----------------------------------------------------------------------------------------
  // A column is [heading, row => [value to sort by, text, small text below, class]].

  function table(id, columns, rows) {
    const host = find(id);
    const sorted = [...(host.tHead?.rows[0].cells ?? [])].map((cell) => cell.getAttribute("aria-sort"));
    const head = host.createTHead();
    head.replaceChildren(element("tr"));
    for (const [heading] of columns) {
      const cell = element("th");
      cell.scope = "col";
      cell.append(Object.assign(element("button", heading), { type: "button" }));
      head.rows[0].append(cell);
    }
    const body = host.tBodies[0] ?? host.createTBody();
    body.replaceChildren(...rows.map((row) => {
      const line = element("tr");
      if (isNull(row.method)) line.className = "null";
      line.append(...columns.map(([, write], column) => cellOf(column, row, ...write(row))));
      return line;
    }));
    Charts.sortable(host);
    sorted.forEach((order, column) => { // as it was sorted before
      const button = head.rows[0].cells[column]?.querySelector("button");
      if (order && button) { button.click(); if (order === "descending") button.click(); }
    });
  }

  function cellOf(column, row, value, text, below, kind) {
    const cell = element(column ? "td" : "th");
    cell.dataset.value = value ?? "";
    if (!column) {
      cell.scope = "row";
      const dot = element("span", "", "dot");
      dot.style.setProperty("--colour", `var(${board.paint(row.method)})`);
      const label = element("span", "", "name");
      text.split(/(?<=\+)/).forEach((part) => label.append(part, element("wbr"))); // a line may end after a +
      cell.append(dot, label);
    } else cell.append(text);
    if (below) cell.append(element("br"), element("span", below, "small"));
    if (kind) cell.classList.add(kind);
    return cell;
  }

  const bound = (value) => (finite(value) ? pretty(value) : "∞");
  const between = ([low, , high]) => (low === high ? "" : `${bound(low)} to ${bound(high)}`);
  const name = (row) => [row.method, row.method];
  const reached = (row) => {
    const more = [row.reached_loose > row.reached ? `loose ${row.reached_loose}` : "", row.failed ? `${row.failed} failed` : ""];
    return [row.runs ? row.reached / row.runs : null, `${row.reached} of ${row.runs}`, more.filter(Boolean).join(", "), row.reached < row.runs ? "miss" : ""];
  };

  function time(interval) {
    if (!finite(interval[1])) return [Infinity, "missed", between(interval), "miss"];
    return [interval[1], pretty(interval[1]), between(interval)];
  }

  function ratio(interval) {
    if (!interval) return [null, "–"];
    return [interval[1], `${interval[3]}${bound(interval[1])}${finite(interval[1]) ? "×" : ""}`, between(interval)];
  }

  const area = ([low, value, high]) => [value, value.toFixed(2), low === high ? "" : `${low.toFixed(2)} to ${high.toFixed(2)}`];

  function spread(values) {
    if (!values) return [null, "–"];
    if (!finite(values[0])) return [Infinity, "failed", "", "miss"];
    return [values[0], pretty(values[0]), values[1] === values[2] ? "" : `${bound(values[1])} to ${bound(values[2])}`];
  }

  // A figure and its limits on a line from -1 to 1, where `scale` places numbers; a ratio also has the line of 1.
  const ofRatio = (value) => Math.max(-1, Math.min(1, finite(value) ? Math.log(Math.max(value, 1e-9)) / Math.log(4) : 1));
  const ofArea = (value) => 2 * value - 1;

  function whisker(interval, colour, scale = ofRatio) {
    const svg = (tag, attributes) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
      Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
      return made;
    };
    const made = svg("svg", { width: 120, height: 18, viewBox: "0 0 120 18", class: "whisker", "aria-hidden": "true" });
    made.style.setProperty("--colour", `var(${colour})`);
    const x = (value) => 60 + 54 * scale(value);
    made.append(svg("path", { d: scale === ofRatio ? "M60 0V18" : "M6 9H114" }));
    if (interval) {
      const open = interval[0] === 0 && interval[2] === null; // nothing is known
      if (!open) made.append(svg("path", { d: `M${x(interval[0])} 9H${x(interval[2])}`, class: "span" }));
      made.append(svg("circle", { cx: x(interval[1]), cy: 9, r: 4, class: interval[3] ? "bound" : "" }));
    }
    return made;
  }

  const FIRST = 9; // rows of the picture; the table below has all

  // The ratio on one workload. On several, areas: with misses on any of them a mean ratio has no limits.
  function ranking(rows, clock) {
    const several = Boolean(find("profile"));
    const [figure, scale] = several ? [area, ofArea] : [ratio, ofRatio];
    const capital = data.clocks[clock].replace(/^./, (c) => c.toUpperCase());
    find("ranking-title").textContent = several ? `Rank by ${data.clocks[clock]}: area under the profile` : `${capital} to the target, over the best baseline's`;
    const body = element("tbody");
    body.append(...rows.slice(0, FIRST).map((row) => {
      const line = element("tr", undefined, ...(isNull(row.method) ? ["null"] : []));
      const interval = several ? row.area : row.ratio;
      const [value, text, below] = figure(interval);
      const picture = element("td");
      picture.append(whisker(interval, board.paint(row.method), scale));
      line.append(cellOf(0, row, row.method, row.method), picture, cellOf(1, row, value, text, below));
      return line;
    }));
    find("ranking").replaceChildren(Object.assign(element("table"), { className: "ranking" }));
    find("ranking").firstChild.append(body);
  }

  function standing(track, clock) {
    const rows = data.ranking[track]?.[clock] ?? [];
    ranking(rows, clock);
    find("standing-of").textContent = `${track}, by ${data.clocks[clock]}`;
    table("standing", [
      ["Method", name],
      ["Rank", (row) => (row.rank ? [row.rank[1], `${row.rank[1]}${row.level ? "\u00a0=" : ""}`, between(row.rank)] : [null, "–"])],
      ["Area", (row) => area(row.area)],
      ["Ratio", (row) => ratio(row.ratio)],
      ["¼ to 4 times", (row) => [row.ratio?.[1] ?? null, whisker(row.ratio, board.paint(row.method))]],
      ["Reached", reached],
      ["Workloads in ratio", (row) => [row.compared, String(row.compared)]],
    ], rows);
    return rows;
  }

  function results(track, clock, workload) {
    const about = data.workloads[workload] ?? {};
    const rows = data.rows[track]?.[workload] ?? [];
    find("workload-name").textContent = workload;
    const goal = finite(about.target) ? `Target: ${about.metric ?? "metric"} ${about.target}${finite(about.loose) ? `, loose ${about.loose}` : ""}.` : "No target yet: no baseline has been tuned.";
    const refused = Object.keys(about.refused ?? {});
    find("workload-about").textContent = `${about.about ?? ""} ${goal}${refused.length ? ` Does not fit: ${refused.join(", ")}.` : ""}`;
    table("results", [
      ["Method", name],
      ["Reached", reached],
      [`To target, ${units[clock]}`, (row) => time(row.times[clock])],
      ["Ratio", (row) => ratio(row.ratios[clock])],
      ["Final validation", (row) => spread(row.validation)],
      ["Final test", (row) => spread(row.test)],
      ["Step cost", (row) => [row.step_cost, finite(row.step_cost) ? `${pretty(row.step_cost)}×` : "–"]],
      ["Run, CPU\u00a0s", (row) => [row.seconds, pretty(row.seconds)]],
      ["Peak MiB", (row) => [row.peak_mib, pretty(row.peak_mib)]],
      ["Front", (row) => [row.front ? 0 : 1, row.front ? "◆" : ""]],
    ], rows);
    return rows;
  }

  // Charts -----------------------------------------------------------------------------------------

  function profile(rows, clock) {
    const every = rows.map((row) => Object.values(row.profile).map((one) => (finite(one) ? Math.max(one, 1) : Infinity)));
    const grid = [...new Set([1, ...every.flat().filter((one) => one <= data.furthest), data.furthest])];
    const series = rows.map((row, i) => ({
      name: row.method, note: "",
      points: grid.map((tau) => {
        const within = every[i].filter((one) => one <= tau).length;
        return { x: log(tau), value: within / every[i].length, text: `${within} of ${every[i].length}` };
      }),
    }));
    return {
      id: "profile", title: "Performance profile", series, up: "share", ticks: "decades", unit: "×", least: 0.1, room: 0, paths: uPlot.paths.stepped({ align: 1 }),
      label: `${data.clocks[clock]} over the quickest method's`, head: (x) => `within ${pretty(10 ** x)}× of the quickest`,
    };
  }

  function along(one, clock) {
    return clock === "gradients" ? one.steps.map((step) => step * one.gradients) : one[clock];
  }

  function curve(one, what, clock) {
    const xs = along(one, clock);
    const [middle, low = middle, high = middle] = one[what];
    const points = xs.map((x, i) => ({ x, value: middle[i], low: low[i], high: high[i] })).filter((point) => finite(point.x));
    for (const [i, why] of one.failed) {
      const x = xs[i] ?? 0;
      let point = points.find((each) => each.x === x);
      if (!point) points.push((point = { x }));
      Object.assign(point, { mark: "top", why });
    }
    const drawn = points.some((point) => finite(point.value) || point.mark);
    return { name: one.name, points: drawn ? points : [], note: one.failed.length ? `${one.failed.length} of ${one.runs} failed` : "" };
  }

  function curves(id, what, title, { track, clock, workload }, target) {
    const series = (data.curves[track]?.[workload] ?? []).map((one) => curve(one, what, clock));
    const head = clock === "steps" ? (x) => `step ${Math.round(x)}` : (x) => `${pretty(x)} ${units[clock]}`;
    const until = Object.fromEntries((data.rows[track]?.[workload] ?? []).map((row) => [row.method, row.times[clock][1]]));
    return { id, title, series, head, label: axes[clock], include: what === "validation" ? target : undefined, until, over: (u) => goal(u, target) };
  }

  function goal(u, target) {
    const level = log(target);
    if (level === null) return;
    inside(u, (ctx, _, toY) => {
      ctx.strokeStyle = variable("--muted");
      ctx.lineWidth = 1.5 * uPlot.pxRatio;
      ctx.setLineDash([2, 4].map((part) => part * uPlot.pxRatio));
      ctx.beginPath();
      ctx.moveTo(u.bbox.left, toY(level));
      ctx.lineTo(u.bbox.left + u.bbox.width, toY(level));
      ctx.stroke();
    });
  }

  function rates(workload) {
    const series = (data.rates[workload] ?? []).map((one) => ({
      name: one.name, note: "",
      points: one.points.map(([value, metric, why]) => ({
        x: log(value / one.default), value: metric, ...(why === null ? {} : { mark: "top", why: `${one.number} ${pretty(value)} failed` }),
        ...(finite(metric) ? { text: `${one.number} ${pretty(value)}: ${pretty(metric)}` } : {}),
      })).filter((point) => finite(point.x)),
    }));
    return {
      id: "rates", title: "Learning-rate sensitivity", series, dots: true, ticks: "decades", divisions: [[1]], home: "default", unit: "×", paths: () => null,
      label: "learning rate ÷ default", head: (x) => `${pretty(10 ** x)} × the default`,
    };
  }

  function tuning(workload) {
    const series = (data.tuning[workload] ?? []).map((one) => ({
      name: one.name, note: "",
      points: one.middle.map((value, i) => (value === null ? { x: i + 1, mark: "top", why: "failed" } : { x: i + 1, value, low: one.low[i], high: one.high[i] })),
    }));
    return { id: "tuning", title: "Cost of tuning", series, label: "tuning trials", head: (x) => `best of ${Math.round(x)}`, dots: true, whole: true };
  }

  const COSTS = [["seconds", "CPU seconds of a run"], ["target", "CPU seconds to the target"], ["peak_mib", "peak memory, MiB"]];
  const costOf = (row, cost) => (cost === "target" ? row.times.cpu[1] : row[cost]);

  function pareto(rows, cost) {
    const label = (COSTS.find(([key]) => key === cost) ?? COSTS[0])[1];
    const tests = rows.some((row) => row.test && finite(row.test[0]));
    const placed = rows.filter((row) => log(costOf(row, cost)) !== null);
    const series = placed.map((row) => {
      const value = (tests ? row.test : row.validation)?.[0];
      return { name: row.method, note: "", front: row.front, points: [{ x: log(costOf(row, cost)), value, text: `${pretty(costOf(row, cost))}, ${pretty(value)}` }] };
    });
    return {
      id: "pareto", title: "Time, memory and metric", series, dots: true, size: 9, ticks: "decades", least: 0.15, room: 0.12,
      label, head: () => `${label}, final ${tests ? "test" : "validation"} metric`, over: labels,
    };
  }

  // Names beside the dots, those of the front first; a name that would cover a dot or a name is left to hovering.
  function labels(u, shown, paint) {
    const scale = uPlot.pxRatio;
    inside(u, (ctx, toX, toY) => {
      ctx.font = `${12 * scale}px system-ui, sans-serif`;
      ctx.textBaseline = "middle";
      ctx.textAlign = "left";
      ctx.setLineDash([]);
      const drawn = shown.filter((one) => finite(one.points[0].y)).sort((a, b) => b.front - a.front);
      const at = (one) => [toX(one.points[0].x), toY(one.points[0].y)];
      const [dot, half] = [6 * scale, 8 * scale];
      const taken = drawn.map((one) => { const [x, y] = at(one); return [x - dot, y - dot, x + dot, y + dot]; });
      for (const one of drawn) {
        const [[x, y], text] = [at(one), one.name.length > 22 ? `${one.name.slice(0, 21)}…` : one.name];
        if (one.front) {
          ctx.strokeStyle = variable(paint(one.name));
          ctx.lineWidth = 1.5 * scale;
          ctx.beginPath();
          ctx.arc(x, y, half, 0, 7);
          ctx.stroke();
        }
        const width = ctx.measureText(text).width;
        const places = [x + 1.5 * half, x - 1.5 * half - width].map((left) => [left, y - half, left + width, y + half]);
        const free = places.find(([left, top, right, bottom]) => left >= u.bbox.left && right <= u.bbox.left + u.bbox.width
          && !taken.some((other) => left < other[2] && other[0] < right && top < other[3] && other[1] < bottom));
        if (!free) continue;
        taken.push(free);
        ctx.fillStyle = variable("--muted");
        ctx.fillText(text, free[0], y);
      }
    });
  }

  function layers(track, workload, kind) {
    const known = (data.layers[track]?.[workload] ?? []).filter((one) => one.kinds[kind]);
    const names = [...new Set(known.flatMap((one) => one.layers))];
    const series = known.map((one) => ({
      name: one.name, note: "",
      points: one.kinds[kind].map((value, i) => ({ x: names.indexOf(one.layers[i]), value })).filter((point) => point.x >= 0),
    }));
    const label = `Layers, input to output${known.length === 1 ? `: ${known[0].name}` : ""}`;
    return { id: "layers", title: `Layer by layer: ${kind}`, label, series, ticks: names, dots: true, unbounded: true, head: (x) => names[x] ?? "" };
  }

  // Showing ------------------------------------------------------------------------------------------

  function legends(found, place) {
    const failed = new Map(found.map((row) => [row.method, row.failed ? `${row.failed} of ${row.runs} failed` : ""]));
    board.legend(place, data.methods.map((one) => ({ name: one, note: failed.get(one) ?? "", points: [0] })));
    if (data.methods.length < 3) return;
    const sets = [["All", []], ["None", data.methods], ...(others.length ? [[`First ${data.shown.length}`, others]] : [])];
    for (const [text, hidden] of sets) {
      const button = element("button", text, "all");
      button.type = "button";
      button.addEventListener("click", () => board.hideOnly(hidden));
      find(`${place}-legend`).append(button);
    }
  }

  function show() {
    const [track, clock, workload] = ["track", "clock", "workload"].map(chosen);
    const kinds = [...new Set((data.layers[track]?.[workload] ?? []).flatMap((one) => Object.keys(one.kinds)))];
    options("kind", kinds.map((kind) => [kind, kind]));
    const places = standing(track, clock);
    const found = results(track, clock, workload);
    const where = { track, clock, workload };
    const target = data.workloads[workload]?.target;
    find("validation-title").textContent = `Validation: ${data.workloads[workload]?.metric ?? "metric"}`;
    legends([], "standing");
    legends(found, "curves");
    board.show([
      profile(places, clock),
      curves("validation", "validation", "Validation metric", where, target),
      curves("loss", "loss", "Training loss", where),
      rates(workload),
      tuning(workload),
      pareto(found, chosen("cost")),
      layers(track, workload, chosen("kind")),
    ]);
  }

  // A download is packed inside its link; where the browser can unpack it, the file itself is handed out.
  async function unpack(link) {
    const bytes = Uint8Array.from(atob(link.href.split(",")[1]), (character) => character.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    Charts.offer(link, link.dataset.name, await new Response(stream).text(), link.dataset.kind);
  }

  const all = Object.values(data.layers).flatMap((each) => Object.values(each).flat());
  find("layers").closest("figure").hidden = !all.length;
  options("track", data.tracks.map((track) => [track, track]));
  options("clock", Object.entries(data.clocks), "cpu");
  options("workload", Object.keys(data.workloads).map((one) => [one, one]));
  options("cost", COSTS);
  for (const id of ["track", "clock", "workload", "cost", "kind"]) find(id).addEventListener("change", show);
  show();
  const links = globalThis.DecompressionStream ? [...document.querySelectorAll(".downloads a")] : [];
  Promise.all(links.map(unpack)).then(() => { document.documentElement.dataset.ready = "true"; });
})();
