"use strict";
// The charts, legends and tables that all pages share. Values are drawn as their logarithms on linear
// scales: ticks and ranges stay simple, and no value (zero, huge, missing) can upset an axis.
//
// A chart is {id, title, series, head}, and perhaps: label (of the axis across), ticks ("decades": x is a
// logarithm; an array: x is an index of these names), home (what the tick at 0 is called), unit (after ticks),
// divisions, least, room and whole (of that axis), include (a value that must be seen), until (by name, where
// that axis may end, unless all are shown), up ("share": 0 to 1, not a logarithm), dots, size, paths, unbounded,
// over (draws above all). A series is {name, points, note}; a point is {x, value, low, high, mark, why, text}. A
// point whose value has no logarithm leaves a gap; `mark` says why, at the top edge ("top") or at the
// bottom ("zero"); `text` is what hovering says.
const Charts = (() => {
  const root = document.documentElement;

  // Small helpers ------------------------------------------------------------------------------

  const finite = (value) => typeof value === "number" && Number.isFinite(value);
  const log = (value) => (finite(value) && value > 0 ? Math.log10(value) : null);
  const variable = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  function median(values) {
    const sorted = [...values].sort((a, b) => a - b);
    const half = sorted.length >> 1;
    return sorted.length % 2 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  }

  function pretty(value) {
    if (!finite(value)) return "–";
    const size = Math.abs(value);
    if (size === 0 || (size >= 1e-3 && size < 1e5)) return String(Number(value.toPrecision(3)));
    const [digits, exponent] = value.toExponential(2).split("e");
    const raised = [...String(Number(exponent))].map((c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c])).join("");
    return Number(digits) === 1 ? `10${raised}` : `${Number(digits)}·10${raised}`;
  }

  function element(tag, text, ...classes) {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    made.classList.add(...classes);
    return made;
  }

  // One ceiling for losses: a run that explodes to 10³⁰ must not flatten all the others.
  function prepare({ series, unbounded, up }) {
    const firsts = series.map((one) => one.points.find((point) => finite(point.value))?.value).filter(finite);
    const ceiling = unbounded || up === "share" ? Infinity : 100 * Math.max(...firsts.map(Math.abs).filter((value) => value < 1e6), 1);
    const place = up === "share" ? (value) => (finite(value) ? value : null) : log;
    for (const { points } of series) {
      points.sort((a, b) => a.x - b.x);
      for (const point of points) {
        if (point.value > ceiling) Object.assign(point, { mark: "top", off: true });
        if (finite(point.value) && point.value <= 0 && up !== "share") point.mark ??= "zero";
        point.y = point.off ? null : place(point.value);
        point.bottom = place(point.low) ?? point.y;
        point.top = place(Math.min(point.high, ceiling)) ?? point.y;
      }
    }
  }

  // Drawing --------------------------------------------------------------------------------------

  const ROW = 11; // pixels of the strip at the top edge that each method with marks there gets

  // Ticks of a log axis: the finest division that fits into `room` labels.
  function decades(low, high, room, divisions = [[1, 2, 3, 4, 5, 6, 8], [1, 2, 5], [1, 3], [1]]) {
    const powers = [];
    for (let power = Math.floor(low); power <= high; power += 1) powers.push(power);
    let ticks = [];
    for (const digits of divisions) {
      ticks = powers.flatMap((power) => digits.map((digit) => power + Math.log10(digit)));
      ticks = ticks.filter((tick) => tick >= low - 1e-9 && tick <= high + 1e-9);
      if (ticks.length <= room) return ticks;
    }
    const step = Math.ceil(ticks.length / room);
    return ticks.filter((tick) => tick % step === 0);
  }

  function padded(values, room, least) {
    if (!values.length) return [-1, 1];
    let [low, high] = [Math.min(...values), Math.max(...values)];
    const extra = Math.max(0, least - (high - low)) / 2 + room * Math.max(high - low, least);
    return [low - extra, high + extra];
  }

  // The range of an axis up: nothing above half as much again as the highest start, and four decades at most.
  function heights({ include, unbounded }, shown) {
    const points = shown.flatMap((one) => one.points);
    const seen = [...points.flatMap((point) => [point.y, point.bottom, point.top]), log(include)].filter(finite);
    const starts = shown.map((one) => one.points.find((point) => finite(point.y))?.y).filter(finite);
    if (unbounded || !starts.length) return padded(seen, 0.05, 0.5);
    const top = Math.min(Math.max(...seen), Math.max(...starts, log(include) ?? -Infinity) + log(1.5));
    const bottom = Math.max(Math.min(...seen), top - 4);
    return padded([bottom, top], 0.05, 0.5);
  }

  // Where an axis of steps or time ends: a little after the last of the methods shown is at the target.
  function end({ until }, shown, xs) {
    const last = xs.at(-1) > xs[0] ? xs.at(-1) : xs[0] + 1;
    const known = shown.map((one) => until?.[one.name]).filter(finite);
    return known.length && Math.max(...known) > 0 ? Math.min(last, 1.5 * Math.max(...known)) : last;
  }

  function draw(chart, { hidden, paint, dash }) {
    const host = document.getElementById(chart.id);
    host.replaceChildren();
    host.setAttribute("role", "img");
    const shown = chart.series.filter((one) => !hidden.has(one.name) && one.points.length);
    host.setAttribute("aria-label", `${chart.title}. ${shown.map(spoken).join("; ") || "No method is shown"}.`);
    if (!shown.length) {
      host.append(element("p", chart.series.some((one) => one.points.length) ? "All methods are hidden." : "There are no values to draw.", "empty"));
      return null;
    }
    const all = shown.flatMap((one) => one.points);
    const xs = [...new Set(all.map((point) => point.x))].sort((a, b) => a - b);
    const index = new Map(xs.map((x, i) => [x, i]));
    // In uPlot null is a gap, while undefined only says that a series was not asked at this x.
    const table = [xs, ...shown.map((one) => {
      const column = new Array(xs.length).fill(undefined);
      for (const point of one.points) if ("value" in point) column[index.get(point.x)] = point.y;
      return column;
    })];

    const [width, height] = root.hasAttribute("data-print") ? [640, 280] : [host.clientWidth, 320];
    const rows = shown.filter((one) => one.points.some((point) => point.mark === "top"));
    const strip = rows.length ? rows.length * ROW + 6 : 0;
    const named = Array.isArray(chart.ticks) ? chart.ticks : null;
    const long = named && Math.max(...named.map((name) => name.length)) * 6.5 > (width - 70) / named.length;
    const below = (long ? 94 : 34) + (chart.label ? 16 : 0);
    const share = chart.up === "share";
    const [low, high] = share ? [0, 1.04] : heights(chart, shown);
    const ceiling = high + ((high - low) * strip) / (height - below - strip - 10);
    const [left, right] = chart.ticks ? padded(xs, named ? 0.06 : chart.room ?? 0.03, chart.least ?? 1) : [Math.min(0, xs[0]), end(chart, shown, xs)];
    const [muted, grid] = ["--muted", "--grid"].map(variable);
    const axis = { stroke: muted, font: "12px system-ui, sans-serif", labelFont: "12px system-ui, sans-serif", grid: { stroke: grid, width: 1 }, ticks: { show: false } };
    const every = named && Math.ceil(named.length / Math.max(2, Math.floor((width - 70) / 22)));

    const across = { ...axis, label: chart.label, labelSize: chart.label ? 20 : 0, labelGap: 2, size: below - (chart.label ? 20 : 0), space: 56 };
    if (chart.whole) across.incrs = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
    if (chart.ticks === "decades") {
      across.splits = () => decades(left, right, width / 60, chart.divisions);
      across.values = (_, ticks) => ticks.map((tick) => (tick === 0 && chart.home ? chart.home : `${pretty(10 ** tick)}${chart.unit ?? ""}`));
    } else if (named) {
      const most = long ? 14 : 24;
      across.splits = () => named.map((_, i) => i).filter((i) => i % every === 0);
      across.values = (_, ticks) => ticks.map((i) => (named[i].length > most ? `${named[i].slice(0, most - 1)}…` : named[i]));
      if (long) across.rotate = 45;
    }

    const options = {
      width, height, legend: { show: false }, padding: [10, named ? 24 : 14, 0, 0],
      cursor: { y: false, drag: { x: false, y: false }, hover: { prox: 24 }, points: { size: 8 } },
      scales: { x: { time: false, range: () => [left, right] }, y: { range: () => [low, ceiling] } },
      axes: [across, { ...axis, size: 58, gap: 6, splits: () => (share ? [0, 0.25, 0.5, 0.75, 1] : decades(low, high, (height - below - strip) / 28)), values: (_, ticks) => ticks.map((tick) => (share ? `${100 * tick} %` : pretty(10 ** tick))) }],
      series: [{}, ...shown.map((one) => ({
        stroke: variable(paint(one.name)), width: 2, dash: dash(one.name), spanGaps: false, ...(chart.paths ? { paths: chart.paths } : {}),
        // A single value has no line to stand on, so it is drawn as a dot in every chart.
        points: { show: chart.dots || one.points.filter((point) => point.y !== null).length === 1, size: chart.size ?? 6, fill: variable(paint(one.name)) },
      }))],
      hooks: { drawAxes: [(u) => bands(u, shown, paint)], draw: [(u) => marks(u, shown, rows, high, muted, paint), (u) => chart.over?.(u, shown, paint)], setCursor: [(u) => tooltip(u, chart, shown, paint)] },
    };
    const plot = new uPlot(options, table, host);
    plot.over.append(Object.assign(element("div", "", "tip"), { hidden: true }));
    plot.root.querySelectorAll("canvas").forEach((canvas) => canvas.setAttribute("aria-hidden", "true"));
    return plot;
  }

  function spoken({ name, points, note }) {
    const last = points.findLast((point) => finite(point.value));
    return `${name} ends at ${last ? pretty(last.value) : "no value"}${note ? `, ${note}` : ""}`;
  }

  function inside(u, paintIn) {
    const { ctx, bbox } = u;
    ctx.save();
    ctx.beginPath();
    ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
    ctx.clip();
    paintIn(ctx, (x) => u.valToPos(x, "x", true), (y) => u.valToPos(y, "y", true));
    ctx.restore();
  }

  function bands(u, shown, paint) {
    inside(u, (ctx, toX, toY) => {
      ctx.globalAlpha = 0.13;
      for (const { name, points } of shown) {
        const wide = points.filter((point) => finite(point.y) && finite(point.low));
        if (!wide.some((point) => point.high > point.low)) continue;
        ctx.beginPath();
        for (const point of wide) ctx.lineTo(toX(point.x), toY(point.top));
        for (const point of wide.reverse()) ctx.lineTo(toX(point.x), toY(point.bottom));
        ctx.fillStyle = variable(paint(name));
        ctx.fill();
      }
    });
  }

  function marks(u, shown, rows, high, muted, paint) {
    const scale = uPlot.pxRatio;
    const { ctx, bbox } = u;
    ctx.save();
    if (rows.length) {
      const y = u.valToPos(high, "y", true);
      ctx.fillStyle = muted;
      ctx.globalAlpha = 0.07;
      ctx.fillRect(bbox.left, bbox.top, bbox.width, y - bbox.top);
      ctx.globalAlpha = 1;
    }
    ctx.lineWidth = 2 * scale;
    ctx.lineCap = "round";
    ctx.setLineDash([]); // the last line may have been dashed
    const arm = 3.2 * scale;
    for (const one of shown) {
      ctx.strokeStyle = variable(paint(one.name));
      for (const point of one.points.filter((each) => each.mark)) {
        const x = u.valToPos(point.x, "x", true);
        ctx.beginPath();
        if (point.mark === "top") {
          const y = bbox.top + ((rows.indexOf(one) + 0.5) * ROW + 3) * scale;
          ctx.moveTo(x - arm, y - arm); ctx.lineTo(x + arm, y + arm);
          ctx.moveTo(x + arm, y - arm); ctx.lineTo(x - arm, y + arm);
        } else {
          const y = bbox.top + bbox.height - 3 * scale;
          ctx.moveTo(x - arm, y - arm); ctx.lineTo(x, y); ctx.lineTo(x + arm, y - arm);
        }
        ctx.stroke();
      }
    }
    ctx.restore();
  }

  // Hover ------------------------------------------------------------------------------------------

  function tooltip(u, chart, shown, paint) {
    const tip = u.over.querySelector(".tip");
    if (!tip) return; // uPlot moves the cursor once before the tip is there
    const { left, top } = u.cursor;
    const near = [];
    if (left >= 0) {
      for (const one of shown) {
        const gap = (point) => Math.abs(u.valToPos(point.x, "x") - left);
        const point = one.points.reduce((best, each) => (!best || gap(each) < gap(best) ? each : best), null);
        if (point && gap(point) <= 24) near.push({ one, point });
      }
    }
    tip.hidden = !near.length;
    if (!near.length) return;
    near.sort((a, b) => (b.point.value ?? Infinity) - (a.point.value ?? Infinity));
    const x = near.reduce((best, { point }) => (Math.abs(u.valToPos(point.x, "x") - left) < Math.abs(u.valToPos(best, "x") - left) ? point.x : best), near[0].point.x);
    tip.replaceChildren(element("b", chart.head(x)), ...near.map(({ one, point }) => {
      const row = element("div");
      const name = element("span");
      const dot = element("span", "", "dot");
      dot.style.setProperty("--colour", `var(${paint(one.name)})`);
      name.append(dot, one.name);
      row.append(name, element("span", point.text ?? (finite(point.value) ? `${pretty(point.value)}${point.why ? " ✕" : ""}` : point.why ?? "no value")));
      return row;
    }));
    const room = u.over.clientWidth;
    const beside = left + 14 + tip.offsetWidth > room ? left - 14 - tip.offsetWidth : left + 14;
    tip.style.left = `${Math.max(0, Math.min(beside, room - tip.offsetWidth))}px`;
    tip.style.top = `${Math.max(0, Math.min(top + 12, u.over.clientHeight - tip.offsetHeight))}px`;
  }

  // Tables ------------------------------------------------------------------------------------------

  function sortable(table) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      heading.querySelector("button").addEventListener("click", () => {
        const down = heading.getAttribute("aria-sort") === "ascending";
        headings.forEach((each) => each.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => (column ? parseFloat(row.cells[column].dataset.value) : row.cells[0].dataset.value);
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // missing goes last
          return (column ? x - y : x.localeCompare(y)) * (down ? -1 : 1);
        });
        table.tBodies[0].append(...rows);
      });
    });
  }

  // A board: charts that share their methods --------------------------------------------------------

  function board(names, hiddenFirst) {
    const hidden = new Set(hiddenFirst);
    const paint = (name) => `--c${names.indexOf(name) % 8}`;
    const dash = (name) => [[], [7, 4], [2, 3]][Math.floor(names.indexOf(name) / 4) % 3];
    let charts = [];
    let plots = [];

    function drawAll() {
      plots.forEach((plot) => plot && plot.destroy());
      plots = charts.map((chart) => draw(chart, { hidden, paint, dash }));
    }

    function press() {
      for (const button of document.querySelectorAll(".legend button[data-name]")) {
        button.setAttribute("aria-pressed", String(!hidden.has(button.dataset.name)));
      }
      drawAll();
    }

    function toggle(name) {
      if (!hidden.delete(name)) hidden.add(name);
      press();
    }

    function hideOnly(some) {
      hidden.clear();
      some.forEach((name) => hidden.add(name));
      press();
    }

    function legend(id, series) {
      const host = document.getElementById(`${id}-legend`);
      if (!host) return;
      host.replaceChildren();
      for (const { name, note, points } of series) {
        if (!points.length) continue;
        const button = element("button");
        button.type = "button";
        button.dataset.name = name;
        button.setAttribute("aria-pressed", String(!hidden.has(name)));
        const key = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        for (const [k, v] of Object.entries({ width: 24, height: 8, "aria-hidden": "true" })) key.setAttribute(k, v);
        const stroke = document.createElementNS("http://www.w3.org/2000/svg", "path");
        stroke.setAttribute("d", "M1 4H23");
        stroke.setAttribute("stroke-dasharray", dash(name).join(" "));
        stroke.style.stroke = `var(${paint(name)})`;
        stroke.style.strokeWidth = "2.5";
        key.append(stroke);
        const text = element("span", name);
        if (note) text.append(" ", element("small", `✕ ${note}`));
        button.append(key, text);
        button.addEventListener("click", () => toggle(name));
        host.append(button);
      }
    }

    function show(some) {
      charts = some.filter((chart) => document.getElementById(chart.id));
      charts.forEach(prepare);
      drawAll();
    }

    let seen = document.body.clientWidth;
    new ResizeObserver(() => {
      if (document.body.clientWidth === seen) return; // the height changes with every drawing
      seen = document.body.clientWidth;
      requestAnimationFrame(drawAll);
    }).observe(document.body);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
    addEventListener("beforeprint", () => { root.setAttribute("data-print", ""); drawAll(); });
    addEventListener("afterprint", () => { root.removeAttribute("data-print"); drawAll(); });
    return { show, legend, hideOnly, paint };
  }

  // The text of a file that a link hands out.
  function offer(link, name, text, type) {
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.hidden = false;
  }

  return { board, element, finite, inside, log, median, offer, pretty, sortable, variable };
})();
