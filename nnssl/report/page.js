"use strict";
// tables: a click on a head sorts by its column, numbers by their full value, what has none last
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.setAttribute("aria-sort", other !== head ? "none" : up ? "ascending" : "descending"));
    const key = row => {
      const cell = row.cells[column];
      return "value" in cell.dataset ? parseFloat(cell.dataset.value) : cell.textContent;
    };
    const compare = (a, b) => {
      if (typeof a === "string" || typeof b === "string") return (up ? 1 : -1) * String(a).localeCompare(String(b), undefined, {numeric: true});
      if (isNaN(a) || isNaN(b)) return isNaN(a) - isNaN(b);
      return up ? a - b : b - a;
    };
    const body = table.tBodies[0];
    body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
  }));
}
// curves: the values under the pointer
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const {x: [low, high, start, end], label, series} = JSON.parse(svg.dataset.chart);
  const cursor = svg.querySelector(".cursor"), readout = svg.parentElement.querySelector(".readout");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const wanted = low + (at - start) / (end - start) * (high - low);
    const all = series.flatMap(s => s.x);
    if (!all.length) return;
    const nearest = all.reduce((a, b) => Math.abs(b - wanted) < Math.abs(a - wanted) ? b : a);
    const place = start + (nearest - low) / (high - low) * (end - start);
    cursor.setAttribute("x1", place); cursor.setAttribute("x2", place); cursor.setAttribute("visibility", "visible");
    readout.textContent = `${label} ${nearest}: ` + series.filter(s => s.x.includes(nearest)).map(
      s => `${s.name} ${s.y[s.x.indexOf(nearest)] ?? "–"}`).join(", ");
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); readout.textContent = ""; });
}
