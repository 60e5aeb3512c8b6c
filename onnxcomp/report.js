"use strict";
// Adds to a page that is complete without it: sorting and filtering of tables, one histogram at a time.
(() => {
  const make = (tag, settings) => Object.assign(document.createElement(tag), settings);

  for (const table of document.querySelectorAll("table[data-sortable]")) {
    const body = table.tBodies[0];
    const rows = Array.from(body.rows);
    const status = document.getElementById(table.dataset.status);
    table.querySelectorAll("th[data-column]").forEach((header) => {
      const column = Number(header.dataset.column);
      const button = make("button", { type: "button", className: "sort" });
      button.append(...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => {
        const descending = header.getAttribute("aria-sort") !== "descending";
        for (const other of table.querySelectorAll("th[aria-sort]")) other.removeAttribute("aria-sort");
        header.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const sign = descending ? -1 : 1;
        const key = (row) => row.cells[column].dataset.value;
        const compare = (a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
          const numeric = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
          return sign * (numeric ? Number(x) - Number(y) : x.localeCompare(y));
        };
        body.append(...rows.slice().sort(compare));
        status.textContent = `sorted by ${header.dataset.label}, ${descending ? "largest" : "smallest"} first`;
      });
    });
    const filter = document.getElementById(table.dataset.filter);
    filter.closest("[hidden]")?.removeAttribute("hidden");
    filter.addEventListener("input", () => {
      const wanted = filter.value.trim().toLowerCase();
      let shown = 0;
      for (const row of rows) {
        row.hidden = !row.textContent.toLowerCase().includes(wanted);
        shown += row.hidden ? 0 : 1;
      }
      status.textContent = `${shown} of ${rows.length} layers`;
    });
  }

  const choice = document.getElementById("histogram-choice");
  if (choice) {
    choice.closest("[hidden]")?.removeAttribute("hidden");
    const figures = document.querySelectorAll("[data-histogram]");
    const show = () => figures.forEach((f) => { f.hidden = f.dataset.histogram !== choice.value; });
    choice.addEventListener("change", show);
    show();
  }

  const copy = document.getElementById("copy");
  if (copy && navigator.clipboard) {
    copy.hidden = false;
    copy.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(document.getElementById("command").textContent);
        copy.textContent = "Copied";
      } catch {
        copy.textContent = "Not allowed here: select the text";
      }
    });
  }
})();
