for (const table of document.querySelectorAll(".sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const key = (row, n) => row.cells[n].textContent.replaceAll(",", "");
  heads.forEach((head, n) => head.firstElementChild.addEventListener("click", () => {
    const up = head.ariaSort !== "ascending";
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...[...body.rows].sort((a, b) => {
      const [x, y] = [key(a, n), key(b, n)], less = parseFloat(x) - parseFloat(y);
      return (up ? 1 : -1) * (isNaN(less) ? x.localeCompare(y) : less);
    }));
  }));
}
for (const choice of document.querySelectorAll(".against")) {
  choice.addEventListener("change", () => {
    for (const body of choice.closest("section").querySelectorAll("tbody[data-against]"))
      body.hidden = body.dataset.against !== choice.value;
  });
}
