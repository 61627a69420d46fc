// Puts the parts together when everything is defined.

// Tabs: all panels stand there without a script, one at a time with it.
function setUpTabs() {
  const tabs = [...document.querySelectorAll("[role=tab]")];
  const open = (chosen) => {
    for (const tab of tabs) {
      tab.setAttribute("aria-selected", tab === chosen);
      tab.tabIndex = tab === chosen ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = tab !== chosen;
    }
  };
  tabs.forEach((tab, i) => {
    tab.addEventListener("click", () => open(tab));
    tab.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      const next = tabs[(i + by + tabs.length) % tabs.length];
      open(next);
      next.focus();
    });
  });
  if (tabs.length) open(tabs[0]);
}

byId("runs").tHead.rows[0].append(make("th", { className: "box" }, every), ...heads);
byId("details").addEventListener("click", (event) => {
  if (event.target === byId("details")) byId("details").close(); // beside it
});
setUpTabs();
setUpFilters();
setUpCurves();
showRuns();
