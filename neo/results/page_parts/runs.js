// The table of runs: one state, changed by the controls, shown by the table and the curves.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = expand(data);
const byId = (id) => document.getElementById(id);
const state = {
  sort: null, // {column, descending}
  chosen: new Set(),
  filters: new Map(), // column to the value it must have
  query: "",
  shown: runs,
};

// The table of runs. A run is a <tbody> of its own, so that its reason moves with it.
const bodies = runs.map((run) => {
  const { record } = run;
  const box = make("input", { type: "checkbox", autocomplete: "off", "aria-label": `Choose run ${record.run_id}` });
  box.addEventListener("change", () => {
    state.chosen[box.checked ? "add" : "delete"](run);
    showChosen();
  });
  const line = make("tr", {}, make("td", { className: "box" }, box));
  for (const column of data.columns) {
    const cell = make("td", { className: column.setting ? "" : "number" });
    const value = valueOf(run, column);
    if (column.role === "run") {
      cell.append(make("button", { type: "button", className: "link", textContent: record.run_id }));
      cell.className = "run";
      if (!run.rows.length) cell.append(make("span", { className: "tag", textContent: "no row", title: "matches no row of the table" }));
    } else if (column.role === "status") cell.append(statusMark(record.status));
    else cell.textContent = cellText(value, column);
    line.append(cell);
  }
  const body = make("tbody", {}, line);
  body.addEventListener("click", (event) => {
    if (!event.target.closest("input, .box")) openDetails(byId("details"), run, data);
  });
  body.dataset.run = record.run_id;
  if (record.status !== "ok") {
    body.classList.add("stopped");
    const reason = record.error || "no reason was recorded";
    body.append(make("tr", { className: "reason" }, make("td"), make("td", { colSpan: data.columns.length, textContent: reason })));
  }
  body.addEventListener("pointerenter", () => emphasise((line) => line.run === run));
  body.addEventListener("pointerleave", () => emphasise(null));
  return body;
});

const heads = data.columns.map((column) => {
  const button = make("button", { type: "button" }, make("span", { textContent: column.label }));
  if (column.unit) button.append(make("small", { textContent: column.unit }));
  if (column.description) button.title = column.description;
  const head = make("th", { scope: "col", className: column.setting ? "" : "number" }, button);
  head.setAttribute("aria-sort", "none");
  button.addEventListener("click", () => {
    const again = state.sort?.column === column;
    state.sort = { column, descending: again && !state.sort.descending };
    showRuns();
  });
  return head;
});

const every = make("input", { type: "checkbox", autocomplete: "off", title: "Choose all runs shown" });
every.addEventListener("change", () => {
  for (const run of state.shown) state.chosen[every.checked ? "add" : "delete"](run);
  showChosen();
});

function isShown(run) {
  for (const [column, value] of state.filters) {
    if (!same(valueOf(run, column), value)) return false;
  }
  return matches(texts[run.index], state.query);
}
const texts = runs.map((run) =>
  [run.record.run_id, run.record.status, run.record.error ?? "", ...run.rows, run.repeat,
    ...data.columns.filter((column) => column.setting).map((column) => `${column.label}=${spell(valueOf(run, column))}`),
  ].join(" ")
);

function showRuns() {
  const kept = runs.filter(isShown);
  state.shown = state.sort ? sortRuns(kept, state.sort.column, state.sort.descending) : kept;
  byId("runs").querySelectorAll("tbody").forEach((body) => body.remove());
  byId("runs").append(...state.shown.map((run) => bodies[run.index]));
  data.columns.forEach((column, i) => {
    const sorted = state.sort?.column === column;
    heads[i].setAttribute("aria-sort", !sorted ? "none" : state.sort.descending ? "descending" : "ascending");
  });
  byId("count").textContent = `${state.shown.length} of ${runs.length} runs`;
  byId("nothing").hidden = state.shown.length > 0 || !runs.length;
  byId("reset").disabled = !state.filters.size && !state.query;
  showChosen();
}

function showChosen() {
  for (const run of runs) {
    bodies[run.index].classList.toggle("chosen", state.chosen.has(run));
    bodies[run.index].querySelector("input").checked = state.chosen.has(run);
  }
  const chosen = state.shown.filter((run) => state.chosen.has(run)).length;
  every.checked = chosen > 0 && chosen === state.shown.length;
  every.indeterminate = chosen > 0 && !every.checked;
  byId("chosen").textContent = state.chosen.size ? `${state.chosen.size} chosen` : "";
  byId("unchoose").hidden = !state.chosen.size;
  showCurves();
}

// The filters: one for each setting with few values.
function setUpFilters() {
  for (const column of data.columns.filter((c) => c.setting && c.role !== "run")) {
    const values = distinct(runs, column);
    if (values.length < 2 || values.length > 40) continue;
    const select = make("select", { autocomplete: "off" }, make("option", { value: "", textContent: "all" }));
    values.forEach((value, i) => select.append(make("option", { value: i, textContent: spell(value) })));
    select.addEventListener("change", () => {
      if (select.value === "") state.filters.delete(column);
      else state.filters.set(column, values[select.value]);
      select.classList.toggle("active", select.value !== "");
      showRuns();
    });
    select.dataset.column = column.label;
    byId("filters").append(make("label", {}, make("span", { textContent: column.label }), select));
  }
  byId("query").addEventListener("input", (event) => {
    state.query = event.target.value.trim();
    showRuns();
  });
  byId("reset").addEventListener("click", () => {
    state.filters.clear();
    state.query = byId("query").value = "";
    for (const select of byId("filters").querySelectorAll("select")) {
      select.value = "";
      select.classList.remove("active");
    }
    showRuns();
  });
  byId("unchoose").addEventListener("click", () => {
    state.chosen.clear();
    showChosen();
  });
}
