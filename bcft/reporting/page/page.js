"use strict";
// Searching and filtering is all that needs a script: the page reads, prints and changes its theme without one.
for (const block of document.querySelectorAll(".rows")) {
  const form = block.querySelector(".filter");
  const search = form.querySelector("input");
  const choices = [...form.querySelectorAll("select")];
  const count = form.querySelector("output");
  const rows = [...block.querySelectorAll(".list > details")];
  const texts = new Map();
  const textOf = (row) => {
    if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
    return texts.get(row);
  };
  const apply = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = choices.filter((choice) => choice.value);
    let shown = 0;
    for (const row of rows) {
      const fits = wanted.every((choice) => row.dataset[choice.dataset.by] === choice.value)
        && words.every((word) => textOf(row).includes(word));
      row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown.toLocaleString("en")} of ${rows.length.toLocaleString("en")}`;
  };
  form.hidden = false;
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  apply();
}
