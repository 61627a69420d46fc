// The learning curves: which runs are drawn, in which colours, and what the pointer tells.

let lines = [];
let placed = [];
let pointed = -1; // of `placed`, by the pointer or the keyboard
const pinned = new Set(); // groups of the legend that were clicked

// Makes the wanted lines strong and the others pale; for null those that are pinned, if any are.
function emphasise(wanted) {
  const strong = wanted ?? ((line) => pinned.has(line.group));
  byId("curves").classList.toggle("emphasis", lines.some(strong));
  for (const line of lines) line.node.classList.toggle("strong", strong(line));
}

function showCurves() {
  if (!data.curve_names.length) return;
  point(-1);
  const metric = byId("metric").value;
  const info = data.metrics[metric];
  const axis = byId("axis").value;
  const isLog = byId("log").checked;
  const column = data.columns[byId("colour").value];
  const source = state.chosen.size ? runs.filter((run) => state.chosen.has(run)) : state.shown;
  const values = distinct(runs, column); // of all runs: a filter must not change a run's colour
  let [left, unusable] = [0, 0];
  lines = source.map((run) => {
    const found = pointsOf(run, metric, info, axis, isLog);
    left += found.left;
    unusable += run.unusable[metric] ?? 0;
    return { run, group: values.findIndex((value) => same(value, valueOf(run, column))), points: found.points };
  }).filter((line) => line.points.length);
  const unit = info.unit ? ` (${info.unit})` : "";
  placed = drawCurves(byId("curves"), lines, {
    isLog, xLabel: axis === "step" ? "step" : "supervised tokens", yLabel: metric + unit + (isLog ? ", log" : ""),
  });
  emphasise(null);
  const groups = [...new Set(lines.map((line) => line.group))].sort((a, b) => a - b);
  byId("legend").replaceChildren(
    make("strong", { textContent: column.label }),
    ...groups.map((group) => legendEntry(group, spell(values[group])))
  );
  const missing = source.length - lines.length;
  byId("drawn").textContent = [
    `${lines.length} ${state.chosen.size ? "chosen" : "filtered"} ${lines.length === 1 ? "run" : "runs"} drawn`,
    missing ? `${missing} without this curve` : "",
    left ? `${left} points have no place on these axes (${isLog ? "not above 0" : "tokens not known"})` : "",
    unusable ? `${unusable} logged values are no finite number` : "",
    values.length > 24 ? "more groups than line styles: some look alike" : "",
  ].filter(Boolean).join(" · ");
}

function legendEntry(group, text) {
  const { colour, dash } = lineStyle(group);
  const sample = shape("svg", { class: `sample line ${colour}`, width: 26, height: 10, "aria-hidden": "true" });
  sample.append(shape("path", { d: "M1 5H25", "stroke-dasharray": dash }));
  const entry = make("button", { type: "button", "aria-pressed": pinned.has(group), title: "Click to keep these lines strong" }, sample, text);
  entry.addEventListener("click", () => {
    pinned[pinned.has(group) ? "delete" : "add"](group);
    entry.setAttribute("aria-pressed", pinned.has(group));
    emphasise(null);
  });
  for (const name of ["pointerenter", "focus"]) entry.addEventListener(name, () => emphasise((line) => line.group === group));
  for (const name of ["pointerleave", "blur"]) entry.addEventListener(name, () => emphasise(null));
  return entry;
}

// Shows what the point with this number in `placed` is, or nothing for -1.
function point(number) {
  pointed = number;
  const tip = byId("tip");
  const mark = byId("curves").querySelector(".mark");
  if (number < 0) {
    tip.hidden = true;
    mark?.setAttribute("visibility", "hidden");
    emphasise(null);
    return;
  }
  const spot = placed[number];
  const metric = byId("metric").value;
  const info = data.metrics[metric];
  const column = data.columns[byId("colour").value];
  const value = `${readable(spot.y, info.decimals)} ${info.unit}`.trim();
  const tokens = byId("axis").value === "tokens" ? `, ${printed(spot.x, 0)} tokens` : "";
  const settings = [...new Set([column, ...data.columns.filter((c) => c.role === "key" || c.role === "seed")])];
  tip.replaceChildren(
    make("strong", { textContent: `${metric} ${value}` }),
    make("span", { textContent: `step ${printed(spot.step, 0)}${tokens}` }),
    make("span", { textContent: `run ${spot.line.run.record.run_id}` }),
    ...settings.slice(0, 5).filter((c) => c.role !== "run").map((c) => make("span", { className: "muted", textContent: `${c.label} ${cellText(valueOf(spot.line.run, c), c)}` }))
  );
  tip.hidden = false;
  const width = byId("curves").clientWidth;
  tip.style.left = `${Math.max(0, Math.min(spot.px + 14, width - tip.offsetWidth - 4))}px`;
  if (spot.px + 14 > width - tip.offsetWidth - 4) tip.style.left = `${Math.max(0, spot.px - tip.offsetWidth - 14)}px`;
  tip.style.top = `${Math.max(0, spot.py - tip.offsetHeight - 10)}px`;
  mark.setAttribute("cx", spot.px);
  mark.setAttribute("cy", spot.py);
  mark.setAttribute("visibility", "visible");
  emphasise((line) => line === spot.line);
}

// Left and right go along a line, up and down from line to line at the same place.
function pointByKey(event) {
  const spot = placed[pointed];
  if (event.key === "Enter" && spot) {
    event.preventDefault(); // or the same key presses the dialog's first button
    return openDetails(byId("details"), spot.line.run, data);
  }
  if (event.key === "Escape") return point(-1);
  if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown"].includes(event.key) || !placed.length) return;
  event.preventDefault();
  if (!spot) return point(0);
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    const next = pointed + (event.key === "ArrowRight" ? 1 : -1);
    if (placed[next]?.line === spot.line) point(next);
    return;
  }
  const next = lines[(lines.indexOf(spot.line) + (event.key === "ArrowDown" ? 1 : lines.length - 1)) % lines.length];
  const own = placed.filter((other) => other.line === next);
  point(placed.indexOf(own.reduce((a, b) => (Math.abs(b.x - spot.x) < Math.abs(a.x - spot.x) ? b : a))));
}

function setUpCurves() {
  for (const name of data.curve_names) byId("metric").append(make("option", { value: name, textContent: name, title: data.metrics[name].description }));
  data.columns.forEach((column, i) => {
    if (column.setting) byId("colour").append(make("option", { value: i, textContent: column.label }));
  });
  const first = data.columns.findIndex((column) => column.role === "key");
  byId("colour").value = first >= 0 ? first : data.columns.findIndex((column) => column.role === "seed");
  byId("chart").hidden = !data.curve_names.length;
  byId("no-curves").hidden = data.curve_names.length > 0;
  byId("colour").addEventListener("change", () => pinned.clear());
  for (const id of ["metric", "axis", "colour", "log"]) byId(id).addEventListener("change", showCurves);
  const svg = byId("curves");
  const near = (event) => {
    const box = svg.getBoundingClientRect();
    return placed.indexOf(nearest(placed, event.clientX - box.left, event.clientY - box.top));
  };
  svg.addEventListener("pointermove", (event) => point(near(event)));
  svg.addEventListener("pointerleave", () => point(-1));
  svg.addEventListener("click", (event) => {
    const spot = placed[near(event)];
    if (spot) openDetails(byId("details"), spot.line.run, data);
  });
  svg.addEventListener("keydown", pointByKey);
  let width = 0;
  new ResizeObserver(() => {
    if (svg.clientWidth === width) return;
    width = svg.clientWidth;
    requestAnimationFrame(showCurves);
  }).observe(svg);
}
