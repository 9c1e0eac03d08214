"use strict";
// Shows the queries that all filters let through, and says how many. Without JavaScript all are shown.
const form = document.querySelector("form.tools");
if (form) {
  const queries = [...document.querySelectorAll("#queries > .query")];
  const filters = [...form.querySelectorAll("select[data-filter]")];
  const apply = () => {
    let shown = 0;
    for (const query of queries) {
      query.hidden = filters.some(({ value, dataset }) => value !== "" && query.dataset[dataset.filter] !== value);
      shown += query.hidden ? 0 : 1;
    }
    form.querySelector("output").textContent = `${shown} of ${queries.length} queries`;
    document.querySelector("#ranked .empty").hidden = shown > 0;
  };
  form.addEventListener("change", apply);
  form.addEventListener("reset", () => setTimeout(apply)); // after the browser has reset the fields
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  apply(); // a browser may have kept the fields from before a reload
}
