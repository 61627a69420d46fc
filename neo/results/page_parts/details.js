// Everything about one run, in a dialog. Texts of a record enter the document as text only.

function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

// Returns a line of code with a button that copies it.
function copyable(text, what) {
  const code = make("code", { textContent: text });
  const button = make("button", { type: "button", className: "small", textContent: "Copy", title: `Copy ${what}` });
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(code); // a browser that does not let a page copy
      button.textContent = "Selected";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return make("div", { className: "code" }, code, button);
}

// Returns a table of two or three columns, one line per entry.
function listing(entries, marked = new Set()) {
  const body = make("tbody");
  for (const [name, value, unit, description] of entries) {
    const line = make("tr", {}, make("th", { scope: "row", textContent: name }), make("td", { textContent: value }));
    if (unit !== undefined) line.append(make("td", { className: "unit", textContent: unit }));
    if (description) line.title = description;
    if (marked.has(name)) line.className = "differs";
    body.append(line);
  }
  return make("table", { className: "listing" }, body);
}

function dotted(value) {
  return flatten(value).filter(([path]) => path).map(([path, leaf]) => [path, spell(leaf)]);
}

function section(title, content, className = "") {
  return make("section", { className }, make("h3", { textContent: title }), ...content);
}

// Returns the metrics as lines: name, number as a table prints it, unit, description.
function measured(record, infos) {
  return Object.entries(infos)
    .map(([name, info]) => [name, info, info.field ? record[name] : record.metrics[name]])
    .filter(([, , number]) => number !== undefined)
    .map(([name, info, number]) => [name, readable(number * info.scale, info.decimals), info.unit, `${info.description}; recorded: ${number}`]);
}

// Returns the config as dotted lines that a search narrows; what differs between runs is marked.
function searchable(config, differing) {
  const lines = dotted(config);
  const marked = new Set(lines.map(([path]) => path).filter((path) => differing.has(path)));
  const table = listing(lines, marked);
  const search = make("input", { type: "search", placeholder: "Search the config", className: "wide", "aria-label": "Search the config" });
  const none = make("p", { className: "muted", textContent: "No line of the config has this.", hidden: true });
  search.addEventListener("input", () => {
    let found = 0;
    for (const [i, line] of [...table.tBodies[0].rows].entries()) {
      line.hidden = !matches(lines[i].join(" = "), search.value.trim());
      found += !line.hidden;
    }
    none.hidden = found > 0;
  });
  return [search, table, none];
}

// Fills the dialog with the run and opens it.
function openDetails(dialog, run, data) {
  const { record } = run;
  const close = make("button", { type: "button", className: "close", textContent: "Close" });
  close.addEventListener("click", () => dialog.close());
  const seeded = `seed ${record.seed}`;
  const stands = run.rows.length ? `in the table as ${run.rows.join("; ")}` : "in no row of the table";
  const title = make("h2", { id: "details-title" }, make("code", { textContent: record.run_id }), " ", statusMark(record.status));
  const head = make("header", {}, make("div", {}, title, make("p", { className: "muted", textContent: `${stands} · ${seeded} · started ${record.started_at}` })), close);
  const numbers = measured(record, data.metrics);
  const dirty = { true: ", with local changes", false: "" }[record.dirty] ?? ", local changes not known";
  const body = make("div", { className: "body" },
    record.error ? make("p", { className: "reason full", textContent: record.error }) : null,
    section("Run it again", [copyable(run.repeat, "the command that repeats this run")], "full"),
    run.command ? section("It was started by", [copyable(run.command, "the command that started this run")], "full") : null,
    section("Config", searchable(record.config, new Set(data.differing))),
    section("Numbers", [numbers.length ? listing(numbers) : make("p", { className: "muted", textContent: "None was recorded." })]),
    section("Origin", [listing([
      ["commit", record.commit ? record.commit + dirty : "not known"],
      ["device", record.device ?? "not recorded"],
      ...["models", "data", "rows", "choices", "versions", "evaluations"].flatMap((name) => dotted({ [name]: record[name] ?? {} })),
      ["record", `schema version ${record.schema_version}`],
    ])], "full"));
  dialog.replaceChildren(head, body);
  if (!dialog.open) dialog.showModal();
  dialog.scrollTop = 0;
}

function statusMark(status) {
  return make("span", { className: `status ${status === "ok" ? "ok" : "stopped"}`, textContent: status });
}
