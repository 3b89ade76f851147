// Make the tables sortable: a button in each column header sorts ascending, then descending, then in the original order.
"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  if (original.length < 2) continue;
  const value = (row, column) => {
    const text = row.cells[column].textContent.trim();
    if (column === 0) return text;
    const match = /[-+]?\d+(\.\d+)?/.exec(text);
    return match ? Number(match[0]) : null;
  };
  const compare = (column, sign) => (first, second) => {
    const [a, b] = [value(first, column), value(second, column)];
    if (a === null || b === null) return (a === null) - (b === null); // missing values stay at the end
    return sign * (typeof a === "string" ? a.localeCompare(b) : a - b);
  };
  for (const [column, header] of [...table.tHead.rows[0].cells].entries()) {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...header.childNodes);
    header.append(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: null }[header.ariaSort];
      const order = next === undefined ? "ascending" : next;
      for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
      if (order) header.setAttribute("aria-sort", order);
      const sign = order === "descending" ? -1 : 1;
      body.append(...(order ? [...original].sort(compare(column, sign)) : original));
    });
  }
}
