"use strict";
// Charts in the page's own colours, and tables that can be searched and sorted. Knows no model and asks no network.
(() => {
  const root = document.documentElement;
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const touch = matchMedia("(pointer: coarse)").matches;

  // ---- charts

  /** Unpacks plotly.js, and runs it as a script of the page, which the policy knows by its hash. */
  async function unpacked() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    return window.Plotly;
  }

  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const coloured = (value) => (Array.isArray(value) ? value.map(colour) : value && colour(value));

  /** The trace with the names of its colours replaced by what they are now. */
  function painted(trace) {
    const made = { ...trace };
    for (const part of ["marker", "line"]) {
      if (trace[part]) made[part] = { ...trace[part], color: coloured(trace[part].color) };
    }
    if (trace.colorscale) made.colorscale = trace.colorscale.map(([place, name]) => [place, colour(name)]);
    return made;
  }

  function layout(figure) {
    const lines = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line") };
    const axis = (given) => ({ automargin: true, fixedrange: touch, ...lines, ...given });
    return {
      ...figure.layout,
      xaxis: axis(figure.layout.xaxis),
      yaxis: axis(figure.layout.yaxis),
      height: figure.height,
      margin: { l: 8, r: 14, t: 24, b: 8 },
      dragmode: touch ? false : "zoom",
      font: { family: getComputedStyle(document.body).fontFamily, size: 11, color: colour("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      hoverlabel: {
        align: "left", namelength: -1, bgcolor: colour("--raised"), bordercolor: colour("--soft"),
        font: { color: colour("--ink"), size: 12 },
      },
    };
  }

  const config = {
    responsive: true, displayModeBar: false,
  };
  const shown = (place) => !place.closest("details:not([open])");

  function draw() {
    for (const [id, figure] of Object.entries(figures)) {
      const place = document.getElementById(id);
      if (shown(place)) window.Plotly.react(place, figure.data.map(painted), layout(figure), config);
    }
  }

  async function start() {
    if (!Object.keys(figures).length) return;
    try {
      await unpacked();
    } catch {
      document.getElementById("no-charts").hidden = false;
      return;
    }
    draw();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    for (const details of document.querySelectorAll("[data-draws]")) details.addEventListener("toggle", draw);
    // paper is white, whatever the screen is
    addEventListener("beforeprint", () => {
      for (const settings of document.querySelectorAll("dd details")) settings.open = true;
      root.dataset.paper = "";
      draw();
    });
    addEventListener("afterprint", () => { delete root.dataset.paper; draw(); });
    root.dataset.drawn = "";
  }

  // ---- tables

  function labelled(table) {
    const names = [...table.tHead.rows[0].cells].map((cell) => cell.textContent);
    for (const row of table.tBodies[0].rows) {
      for (const cell of row.cells) {
        if (cell.tagName === "TD" && cell.cellIndex < names.length - 1) cell.dataset.label = names[cell.cellIndex];
        if (cell.dataset.value === "") cell.classList.add("empty");
      }
    }
  }

  function sortable(table) {
    for (const head of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => sort(table, head));
    }
  }

  function sort(table, head) {
    const numbers = head.classList.contains("number");
    const down = head.ariaSort ? head.ariaSort === "ascending" : numbers;
    for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const key = (row) => {
      const cell = row.cells[head.cellIndex];
      return numbers ? (cell.dataset.value === "" ? NaN : Number(cell.dataset.value)) : cell.textContent;
    };
    const order = (a, b) => (numbers ? a - b : a.localeCompare(b, "en", { numeric: true }));
    const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
    // layers without a figure come last, whichever way
    rows.sort(([a], [b]) => (Number.isNaN(a) ? 1 : 0) - (Number.isNaN(b) ? 1 : 0) || (down ? order(b, a) : order(a, b)) || 0);
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }

  function filterable(filters) {
    const table = document.getElementById(filters.dataset.for);
    const [search, kind, told] = ["input", "select", "output"].map((name) => filters.querySelector(name));
    const rows = [...table.tBodies[0].rows].map((row) => [row, row.textContent.toLowerCase()]);
    const apply = () => {
      const wanted = search.value.trim().toLowerCase();
      let count = 0;
      for (const [row, text] of rows) {
        row.hidden = !(text.includes(wanted) && (!kind.value || row.dataset.kind === kind.value));
        count += !row.hidden;
      }
      told.textContent = `${count} of ${rows.length} layers`;
    };
    search.addEventListener("input", apply);
    kind.addEventListener("change", apply);
    filters.hidden = false;
    apply();
  }

  for (const filters of document.querySelectorAll(".filters")) {
    const table = document.getElementById(filters.dataset.for);
    filterable(filters);
    labelled(table);
    sortable(table);
  }
  start();
})();
