// Draws the learning curves into an <svg>, and finds the point that is meant.

const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "2 3", "9 3 2 3"];
const EDGE = { top: 14, right: 14, bottom: 42, left: 64 };

function shape(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Returns colour class and dash of the group with this number; after 24 they begin again.
function lineStyle(group) {
  return { colour: `c${group % 6}`, dash: DASHES[Math.floor(group / 6) % DASHES.length] };
}

function range(numbers, isLog) {
  let [low, high] = [Infinity, -Infinity];
  for (const number of numbers) {
    if (number < low) low = number;
    if (number > high) high = number;
  }
  if (low > high) return null;
  if (low === high) return isLog ? [low / 1.1, high * 1.1] : [low - (Math.abs(low) * 0.05 || 1), high + (Math.abs(high) * 0.05 || 1)];
  const gap = isLog ? (high / low) ** 0.04 : (high - low) * 0.04;
  return isLog ? [low / gap, high * gap] : [low - gap, high + gap];
}

// Draws one line per entry of `series`: {run, group, points}. Returns where every point stands.
function drawCurves(svg, series, { isLog, xLabel, yLabel }) {
  svg.replaceChildren();
  const [width, height] = [svg.clientWidth || 900, svg.clientHeight || 340];
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const all = series.flatMap((line) => line.points);
  const ys = range(all.map((point) => point.y), isLog);
  if (!ys) return [];
  const lowX = 0; // where training begins
  const highX = range(all.map((point) => point.x), false)[1];
  const x = scaleOf(lowX, highX, EDGE.left, width - EDGE.right, false);
  const y = scaleOf(ys[0], ys[1], height - EDGE.bottom, EDGE.top, isLog);

  const grid = shape("g", { class: "grid" });
  const up = (isLog ? logTicks : ticks)(ys[0], ys[1], 8);
  const upTexts = tickTexts(up, isLog);
  for (const [i, tick] of up.entries()) {
    grid.append(shape("line", { x1: EDGE.left, x2: width - EDGE.right, y1: y(tick), y2: y(tick) }));
    grid.append(shape("text", { x: EDGE.left - 8, y: y(tick) + 4, "text-anchor": "end" }, upTexts[i]));
  }
  const across = ticks(lowX, highX, Math.max(2, Math.floor(width / 130)));
  const acrossTexts = tickTexts(across, false);
  for (const [i, tick] of across.entries()) {
    grid.append(shape("line", { x1: x(tick), x2: x(tick), y1: height - EDGE.bottom, y2: height - EDGE.bottom + 5, class: "tick" }));
    grid.append(shape("text", { x: x(tick), y: height - EDGE.bottom + 19, "text-anchor": "middle" }, acrossTexts[i]));
  }
  grid.append(shape("line", { x1: EDGE.left, x2: width - EDGE.right, y1: height - EDGE.bottom, y2: height - EDGE.bottom, class: "tick" }));
  grid.append(shape("text", { x: (EDGE.left + width - EDGE.right) / 2, y: height - 6, "text-anchor": "middle", class: "label" }, xLabel));
  grid.append(shape("text", { transform: `translate(14 ${(EDGE.top + height - EDGE.bottom) / 2}) rotate(-90)`, "text-anchor": "middle", class: "label" }, yLabel));
  svg.append(grid);

  // The ends of the axes, for whoever reads the picture back into numbers.
  Object.assign(svg.dataset, { x0: lowX, x1: highX, y0: ys[0], y1: ys[1], left: EDGE.left,
    right: width - EDGE.right, top: EDGE.top, bottom: height - EDGE.bottom, log: isLog });

  const placed = [];
  const few = all.length <= 1500;
  series.forEach((line) => {
    const { colour, dash } = lineStyle(line.group);
    const spots = line.points.map((point) => ({ ...point, px: x(point.x), py: y(point.y), line }));
    const at = (spot) => `${spot.px.toFixed(2)} ${spot.py.toFixed(2)}`;
    const drawn = shape("g", { class: `line ${colour}` });
    drawn.dataset.run = line.run.record.run_id;
    drawn.append(shape("path", { d: `M${spots.map(at).join("L")}`, "stroke-dasharray": dash }));
    if (few || spots.length === 1) drawn.append(shape("path", { d: spots.map((spot) => `M${at(spot)}h0`).join(""), class: "dots" }));
    line.node = drawn;
    svg.append(drawn);
    placed.push(...spots);
  });
  const mark = shape("circle", { r: 5, class: "mark" });
  mark.setAttribute("visibility", "hidden");
  svg.append(mark);
  return placed;
}

// Returns the point nearest to a place, if one is near.
function nearest(placed, px, py, reach = 40) {
  let [best, least] = [null, reach * reach];
  for (const spot of placed) {
    const distance = (spot.px - px) ** 2 + (spot.py - py) ** 2;
    if (distance < least) [best, least] = [spot, distance];
  }
  return best;
}
