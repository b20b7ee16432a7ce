// The retention explorer: choices, one panel for each task, and a table of what they show.
// The data is a CSV in the page itself, since a page opened from disk may not fetch a file.
"use strict";
(() => {
  const [header, ...lines] = document
    .getElementById("explorer-data").textContent.trim().split("\n").map((line) => line.split(","));
  const rows = lines.map((line) => Object.fromEntries(header.map((name, i) => [name, line[i]])));
  for (const row of rows) row.run = [row.grid, row.variant].filter(Boolean).join("-");

  for (const row of rows)
    row.method = row.repair === "none" ? row.scorer : `${row.scorer} + ${row.repair}`;

  const FIRST = { backbone: "efficientnet_lite0", run: "transfer", source: "folder:cifar10-jpeg",
    scorer: "ggn_diag", beside: "magnitude" };
  const KEPT = 0.9; // of the accuracy above chance
  const form = document.getElementById("explorer-form");
  const names = ["backbone", "run", "source", "scorer", "repair"];
  const selects = names.map((name) => form.elements[name]);
  // Scores that look at no data are stored once, under "none", and stand beside every source.
  const fits = (row, name, value) =>
    row[name] === value || (name === "source" && row.source === "none");
  const matching = (choice) =>
    rows.filter((row) => Object.entries(choice).every(([name, value]) => fits(row, name, value)));

  const values = (name) =>
    [...new Set(rows.map((row) => row[name]))].filter((v) => name !== "source" || v !== "none");

  // Each choice narrows the next; what was not measured for it stays in the list, disabled.
  function narrow(wanted) {
    const choice = {};
    names.forEach((name, i) => {
      const available = values(name).filter((value) =>
        matching(choice).some((row) => row[name] === value));
      choice[name] = available.includes(wanted[name]) ? wanted[name] : available[0];
      selects[i].replaceChildren(...values(name).map((value) => {
        const measured = available.includes(value);
        const option = new Option(measured ? value : `${value} (not measured)`, value);
        option.disabled = !measured;
        option.selected = value === choice[name];
        return option;
      }));
    });
    const { backbone, run, source, scorer, repair } = choice;
    const others = new Set(matching({ backbone, run, source })
      .filter((row) => row.scorer !== scorer || row.repair !== repair).map((row) => row.method));
    choice.beside = others.has(wanted.beside) ? wanted.beside : [...others][0] ?? "";
    form.elements.beside.replaceChildren(...[...others].map((method) =>
      new Option(method, method, false, method === choice.beside)));
    return choice;
  }

  // Where the line through the points first falls below nine tenths, from all at sparsity 0.
  function keptUpTo(points) {
    let [at, kept] = [0, 1];
    for (const p of points) {
      if (+p.retention < KEPT)
        return (at + ((kept - KEPT) / (kept - p.retention)) * (p.sparsity - at)).toFixed(2);
      [at, kept] = [+p.sparsity, +p.retention];
    }
    return `at least ${at}`;
  }

  const SVG = "http://www.w3.org/2000/svg";
  function element(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }
  const LEFT = 40, RIGHT = 250, TOP = 12, BOTTOM = 180;
  const x = (sparsity) => LEFT + (RIGHT - LEFT) * sparsity;

  function panel(target, own, series, range) {
    const y = (value) => BOTTOM - ((value - range[0]) / (range[1] - range[0])) * (BOTTOM - TOP);
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    caption.textContent = target + (own ? " (the source's own task)" : " (held-out)");
    const said = series.map(({ label, points }) => `${label}: ` + points.map((p) =>
      `${p.retention} at sparsity ${p.sparsity}`).join(", ")).join(". ");
    const svg = element("svg", { viewBox: "0 0 330 215", role: "img",
      "aria-label": `Retention on ${target} against sparsity. Dense: 1. ${said}.` });
    for (let value = Math.ceil(range[0] * 2) / 2; value <= range[1]; value += 0.5) {
      svg.append(element("line", { x1: LEFT, x2: RIGHT, y1: y(value), y2: y(value), class: "grid" }),
        element("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(1)));
    }
    for (const value of [0, 0.25, 0.5, 0.75, 1])
      svg.append(element("text", { x: x(value), y: BOTTOM + 16, "text-anchor": "middle" }, value));
    svg.append(element("text", { x: (LEFT + RIGHT) / 2, y: 212, "text-anchor": "middle" }, "sparsity"),
      element("line", { x1: LEFT, x2: RIGHT, y1: y(1), y2: y(1), class: "dense" }));
    const labels = [{ at: y(1), text: "dense" }];
    for (const { label, kind, points } of series) {
      svg.append(element("polyline", { class: kind,
        points: points.map((p) => `${x(p.sparsity)},${y(p.retention)}`).join(" ") }));
      for (const p of points) {
        const [cx, cy] = [x(p.sparsity), y(p.retention)];
        svg.append(element("line", { x1: cx, x2: cx, y1: y(p.low), y2: y(p.high), class: kind }),
          kind === "chosen" ? element("circle", { cx, cy, r: 4, class: kind })
            : element("rect", { x: cx - 4, y: cy - 4, width: 8, height: 8, class: kind }));
      }
      labels.push({ at: y(points.at(-1).retention), text: label });
    }
    // Labels at the lines' ends, pushed apart where lines meet.
    labels.sort((a, b) => a.at - b.at).forEach((label, i) => {
      if (i) label.at = Math.max(label.at, labels[i - 1].at + 15);
      svg.append(element("text", { x: RIGHT + 6, y: label.at + 4 }, label.text));
    });
    figure.append(caption, svg);
    return figure;
  }

  function draw(choice) {
    const { scorer, repair, source } = choice;
    const near = matching({ backbone: choice.backbone, run: choice.run, source });
    const chosen = near.filter((row) => row.scorer === scorer && row.repair === repair);
    const beside = near.filter((row) => row.method === choice.beside);
    const shown = [...chosen, ...beside];
    const range = [Math.min(0, ...shown.map((row) => +row.low)),
      Math.max(1.1, ...shown.map((row) => +row.high))];
    const targets = [...new Set(chosen.map((row) => row.target))];
    const isOwn = (target) =>
      near.some((row) => row.source === source && row.target === target && row.task === "own");
    document.getElementById("explorer-panels").replaceChildren(...targets.map((target) => {
      const of = (table) => table.filter((row) => row.target === target)
        .sort((a, b) => a.sparsity - b.sparsity);
      const series = [{ label: "chosen", kind: "chosen", points: of(chosen) },
        { label: "beside", kind: "beside", points: of(beside) }];
      return panel(target, isOwn(target), series.filter((one) => one.points.length), range);
    }));

    const first = chosen[0];
    const folder = `${first.grid}/${first.interval === "range" ? "scorer_atlas" : "zero_shot_retention"}`
      + `-${first.backbone}${first.variant && `-${first.variant}`}`;
    const bars = first.interval === "range" ? "the range over the seeds"
      : "95 % intervals over test images and seeds";
    const also = beside.length ? ` Beside it: ${choice.beside}.` : "";
    const masks = first.source === "none" ? "masks that look at no data" : `masks of ${source}`;
    document.getElementById("explorer-status").textContent =
      `${scorer}${repair === "none" ? "" : ` with ${repair}`}, ${masks}, ${choice.backbone}; `
      + `from results/${folder}, n = ${first.count} test images a task. Bars are ${bars}.${also}`;
    document.querySelector("#explorer-table tbody").replaceChildren(...shown.map((row) => {
      const line = document.createElement("tr");
      const cells = [row.target, isOwn(row.target) ? "own" : "held-out", row.method,
        row.sparsity, row.retention, `${row.low} to ${row.high}`, row.count, row.seeds,
        keptUpTo(shown.filter((one) => one.target === row.target && one.method === row.method)
          .sort((a, b) => a.sparsity - b.sparsity))];
      for (const text of cells) line.insertCell().textContent = text;
      return line;
    }));
  }

  const current = () => Object.fromEntries(
    [...names, "beside"].map((name) => [name, form.elements[name].value]));
  function show(wanted) {
    const choice = narrow(wanted);
    draw(choice);
    return choice;
  }
  const linked = () =>
    ({ ...FIRST, ...Object.fromEntries(new URLSearchParams(location.hash.slice(1))) });
  form.addEventListener("change", () =>
    history.replaceState(null, "", `#${new URLSearchParams(show(current()))}`));
  addEventListener("hashchange", () => show(linked()));
  form.hidden = false;
  show(linked());
})();
