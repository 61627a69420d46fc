// What the page computes, apart from what it draws: no function here touches the document.

const MISSING = "—";

// Returns the runs with their whole records: a value that several runs share is stored once.
function expand(data) {
  return data.runs.map((stored, index) => {
    const record = { ...stored.own };
    for (const [name, place] of Object.entries(stored.shared)) record[name] = data.pool[place];
    record.config = Object.fromEntries(
      Object.entries(stored.config).map(([name, place]) => [name, data.pool[place]])
    );
    record.metrics = Object.fromEntries(
      data.metric_names.map((name, i) => [name, stored.metrics[i]]).filter(([, v]) => v !== null)
    );
    const curves = Object.fromEntries(
      Object.entries(data.curves[index]).map(([name, [steps, values]]) => [
        name,
        { steps: data.steps[steps], values },
      ])
    );
    return { index, record, rows: stored.rows, repeat: stored.repeat, command: stored.command,
      curves, unusable: stored.unusable };
  });
}

// Returns what the run has in a column of the runs' table; undefined where it has nothing.
function valueOf(run, column) {
  let value = run.record;
  for (const part of column.path) {
    if (value === null || typeof value !== "object" || !Object.hasOwn(value, part)) return undefined;
    value = value[part];
  }
  return value;
}

// Returns a config value as it would be typed: texts bare, all else as JSON.
function spell(value) {
  if (value === undefined) return MISSING;
  return typeof value === "string" ? value : JSON.stringify(value);
}

// Returns the number as the tables print it: `decimals` places, thousands apart, no minus zero.
function printed(value, decimals) {
  const size = Math.abs(value);
  if (size >= 1e21) return String(value);
  let text = size.toFixed(decimals);
  // Exactly between two, toFixed takes the larger and the tables take the even one.
  const halves = size * 2 ** (decimals + 1);
  if (Number.isInteger(halves) && halves % 2 === 1 && /[13579]$/.test(text)) {
    text = (size * (1 - 2 ** -45)).toFixed(decimals);
  }
  const [whole, rest] = text.split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+$)/g, ",") + (rest ? `.${rest}` : "");
  return value < 0 && /[1-9]/.test(text) ? `-${grouped}` : grouped;
}

// Returns the printed number, or three digits of one that would be printed as nothing but zeros.
function readable(value, decimals) {
  const text = printed(value, decimals);
  return value !== 0 && !/[1-9]/.test(text) ? value.toPrecision(3) : text;
}

// Returns the text of a cell: a measured number with its decimals, a setting as it is typed.
function cellText(value, column) {
  if (value === undefined || value === null) return column.setting ? spell(value) : MISSING;
  if (column.decimals === null || typeof value !== "number") return spell(value);
  return printed(value * column.scale, column.decimals);
}

// Orders numbers as numbers and before texts, and texts with numbers in them as people do.
function compare(a, b) {
  const [first, second] = [typeof a === "number", typeof b === "number"];
  if (first && second) return a - b;
  if (first !== second) return first ? -1 : 1;
  return spell(a).localeCompare(spell(b), "en", { numeric: true });
}

// Returns the runs in the order of their values; those without one are last in both directions.
function sortRuns(runs, column, descending) {
  const has = (run) => ![undefined, null].includes(valueOf(run, column));
  const order = (a, b) => compare(valueOf(a, column), valueOf(b, column)) || 0;
  const there = runs.filter(has).sort((a, b) => (descending ? order(b, a) : order(a, b)));
  return [...there, ...runs.filter((run) => !has(run))];
}

// Returns the distinct values of a column among the runs, the missing one last: numbers in order,
// texts in the order of the runs, which is that of the table.
function distinct(runs, column) {
  const found = new Map(runs.map((run) => [JSON.stringify(valueOf(run, column)), valueOf(run, column)]));
  const there = [...found.values()].filter((value) => value !== undefined);
  if (there.every((value) => typeof value === "number")) there.sort(compare);
  return found.has(undefined) ? [...there, undefined] : there;
}

function same(a, b) {
  return JSON.stringify(a) === JSON.stringify(b);
}

// Returns [dotted path, value] of every leaf; an empty mapping is a leaf.
function flatten(value, prefix = "") {
  if (value === null || typeof value !== "object" || Array.isArray(value) ||
      (prefix && !Object.keys(value).length)) {
    return [[prefix, value]];
  }
  return Object.entries(value).flatMap(([key, item]) =>
    flatten(item, prefix ? `${prefix}.${key}` : key)
  );
}

// Whether every word of the query stands somewhere in the text, in any case.
function matches(text, query) {
  const found = text.toLowerCase();
  return query.toLowerCase().split(/\s+/).every((word) => found.includes(word));
}

// Returns round numbers from low to high, about `count` of them.
function ticks(low, high, count) {
  const rough = (high - low) / Math.max(count, 1);
  if (!(rough > 0)) return [low];
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.999);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) {
    found.push(Number((i * step).toPrecision(12)));
  }
  return found;
}

// Returns round numbers for a logarithmic axis; both ends are positive.
function logTicks(low, high, count) {
  if (high / low < 10) return ticks(low, high, count).filter((tick) => tick > 0);
  const found = [];
  const factors = high / low < 1e4 ? [1, 2, 5] : [1];
  for (let power = Math.floor(Math.log10(low)); 10 ** power <= high; power++) {
    for (const factor of factors) {
      const tick = Number((factor * 10 ** power).toPrecision(6));
      if (tick >= low && tick <= high) found.push(tick);
    }
  }
  return found;
}

// Returns the texts of ticks, with the same decimals where they are equally far apart.
function tickTexts(found, isLog) {
  const places = found.map((tick) => (String(tick).split(".")[1] || "").length);
  return found.map((tick, i) => {
    const size = Math.abs(tick);
    if (size >= 1e6 || (size > 0 && size < 1e-4)) return tick.toExponential().replace("e+", "e");
    return printed(tick, isLog ? places[i] : Math.max(...places));
  });
}

// Returns the supervised tokens seen at a step, on a line between the steps that logged them; after
// the last of them the run's total, or null where it is not known.
function tokensAt(logged, step, total) {
  const [steps, tokens] = [logged.steps, logged.values];
  const after = steps.findIndex((known) => known >= step);
  if (after < 0) return total ?? null;
  if (steps[after] === step) return tokens[after];
  const [from, start] = after ? [steps[after - 1], tokens[after - 1]] : [-1, 0]; // steps count from 0
  return start + ((tokens[after] - start) * (step - from)) / (steps[after] - from);
}

// Returns the curve of a run as points {step, x, y} in printed units, and how many have no place.
function pointsOf(run, metric, info, axis, isLog) {
  const curve = run.curves[metric];
  if (!curve) return { points: [], left: 0 };
  const logged = run.curves["train/tokens"];
  const all = curve.steps.map((step, i) => ({
    step,
    x: axis === "step" ? step : logged ? tokensAt(logged, step, run.record.num_tokens) : null,
    y: curve.values[i] * info.scale,
  }));
  const points = all.filter((point) => point.x !== null && (!isLog || point.y > 0));
  return { points, left: all.length - points.length };
}

// Returns the function from values to pixels, and its ends, for values between low and high.
function scaleOf(low, high, from, to, isLog) {
  const place = isLog ? Math.log10 : (value) => value;
  const [start, end] = [place(low), place(high)];
  const slope = end > start ? (to - from) / (end - start) : 0;
  const middle = end > start ? from : (from + to) / 2;
  return (value) => middle + (place(value) - start) * slope;
}
