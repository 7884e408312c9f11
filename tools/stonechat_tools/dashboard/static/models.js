// Which models and versions are in the field, and how they fare.

import { fill, h, state } from "./dom.js";
import { fleet, levelOf, on, text } from "./data.js";

function table(title, of, columns) {
  const heads = columns.map(([name, kind]) => h("th", { scope: "col", class: kind }, name));
  return [h("h2", {}, title), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, h("table", {}, h("thead", {}, h("tr", {}, heads)), h("tbody", {}, of)))];
}

function share(n, all) {
  const part = all ? (100 * n) / all : 0;
  return part > 0 && part < 0.1 ? "< 0.1 %" : `${part.toFixed(1)} %`;
}

function bar(part) {
  const inner = h("i");
  inner.style.width = `${Math.max(1, part * 100)}%`;
  return h("span", { class: "share", "aria-hidden": "true" }, inner);
}

function most(counts, link) {
  const sorted = [...counts].sort((a, b) => b[1] - a[1]);
  const shown = sorted.slice(0, 4).map(([name, n]) => h("a", { class: "chip", href: `#/devices?q=${link}:${encodeURIComponent(name)}` }, name || "not said", h("b", {}, n.toLocaleString())));
  return [shown, sorted.length > 4 && h("span", { class: "hint" }, `and ${sorted.length - 4} more`)];
}

function collect(by) {
  const found = new Map();
  for (const row of fleet.rows.values()) {
    const key = text(row, by);
    let group = found.get(key);
    if (!group) found.set(key, (group = { n: 0, watch: 0, alarm: 0, unfit: 0, learning: 0, schemas: new Map(), versions: new Map(), models: new Map(), updates: 0 }));
    group.n++;
    const level = levelOf(row), marks = text(row, "marks");
    if (level === "alarm") group.alarm++;
    if (level === "watch") group.watch++;
    if (marks.includes("does not fit")) group.unfit++;
    if (marks.includes("learning")) group.learning++;
    if (text(row, "update")) group.updates++;
    for (const [name, map] of [["schema", group.schemas], ["firmware", group.versions], ["model", group.models]]) map.set(text(row, name), (map.get(text(row, name)) ?? 0) + 1);
  }
  return [...found].sort((a, b) => b[1].n - a[1].n);
}

export function showModels(main) {
  const place = h("div");
  fill(main, h("h1", {}, "Models and versions in the field"), place);

  function show() {
    const all = fleet.rows.size;
    if (!all) return fill(place, state("No device has reported yet."));
    const number = (n, wide = false) => h("td", { class: wide ? "number wide" : "number" }, n.toLocaleString());
    fill(place,
      table("Models", collect("model").map(([name, group]) => h("tr", {},
        h("th", { scope: "row" }, name ? h("a", { href: `#/devices?q=model:${name}` }, h("code", {}, name)) : "no model", h("small", {}, [...group.schemas.keys()].filter(Boolean).join(", "))),
        h("td", { class: "number" }, group.n.toLocaleString(), bar(group.n / all)),
        h("td", { class: "number" }, group.alarm.toLocaleString(), h("small", {}, share(group.alarm, group.n))),
        number(group.watch), number(group.unfit, true), number(group.learning, true),
        h("td", { class: "wide" }, most(group.versions, "firmware")))),
      [["Model", ""], ["Devices", "number"], ["In alarm", "number"], ["Watch", "number"], ["Does not fit", "number wide"], ["Learning", "number wide"], ["Firmware", "wide"]]),
      table("Firmware", collect("firmware").map(([name, group]) => h("tr", {},
        h("th", { scope: "row" }, name ? h("a", { href: `#/devices?q=firmware:${encodeURIComponent(name)}` }, name) : "not said"),
        h("td", { class: "number" }, group.n.toLocaleString(), bar(group.n / all)),
        h("td", { class: "number" }, group.alarm.toLocaleString(), h("small", {}, share(group.alarm, group.n))),
        number(group.updates, true),
        h("td", { class: "wide" }, most(group.models, "model")))),
      [["Firmware", ""], ["Devices", "number"], ["In alarm", "number"], ["With an update", "number wide"], ["Models", "wide"]]));
  }

  let asked = 0;
  show();
  const end = on(() => { asked ||= setTimeout(() => { asked = 0; if (!place.contains(document.activeElement)) show(); }, 3000); });
  return () => { end(); clearTimeout(asked); };
}
