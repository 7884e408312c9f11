// The fleet as a table: the map in words, and what a search finds. A page of rows at a time.

import { badge, counted, fill, figure, firstSteps, h, span, state } from "./dom.js";
import { fleet, levelOf, now, number, on, shownName, stateOf, text, time } from "./data.js";

const PAGE = 100;
const WORST = ["lying", "silent", "gone", "unknown", "off", "asleep", "reporting"];
const columns = [
  ["device", "Device", "", (row) => shownName(row).toLowerCase()],
  ["presence", "Presence", "", (row) => WORST.indexOf(stateOf(row)) * 1e10 + number(row, "since")],
  ["level", "Level", "", (row) => -number(row, "level")],
  ["score", "Score", "number wide", (row) => -(number(row, "score") ?? -1)],
  ["evidence", "Evidence", "number wide", (row) => -(number(row, "evidence") ?? -1)],
  ["seen", "Heard", "number", (row) => -number(row, "seen")],
  ["lost", "Lost", "number wide", (row) => -(number(row, "lost") + number(row, "unexplained"))],
  ["class", "Class", "wide", (row) => text(row, "class")],
  ["site", "Site", "wide", (row) => text(row, "site")],
  ["firmware", "Firmware", "wide", (row) => text(row, "firmware")],
  ["notes", "Notes", "wide", (row) => notes(row) === "" ],
];

function notes(row) {
  const found = [text(row, "marks"), text(row, "cause") && `with others: ${text(row, "cause")}`, text(row, "response") && `response: ${text(row, "response")}`, text(row, "update") && `update: ${text(row, "update")}`];
  return found.filter(Boolean).join("; ");
}

const KEYS = {
  class: (row) => text(row, "class"), site: (row) => text(row, "site"), tag: (row) => text(row, "tags"),
  model: (row) => text(row, "model"), firmware: (row) => text(row, "firmware"), schema: (row) => text(row, "schema"),
  state: stateOf, presence: stateOf, level: levelOf, device: (row) => row[0], name: (row) => text(row, "name"),
  note: notes, cause: (row) => text(row, "cause"),
};

// 'site:"new york" alarm' -> row => whether all words are found in it
export function matcher(query) {
  const words = (query.toLowerCase().match(/[^\s"]*"[^"]*"?|[^\s"]+/g) ?? []).map((word) => word.replaceAll('"', "")).filter(Boolean).map((word) => {
    const [key, ...rest] = word.split(":");
    return rest.length && Object.hasOwn(KEYS, key) ? [KEYS[key], rest.join(":")] : [null, word];
  });
  return (row) => words.every(([key, word]) => {
    if (key) return key(row).toLowerCase().includes(word);
    return Object.values(KEYS).some((get) => get(row).toLowerCase().includes(word));
  });
}

export function showTable(main, parameters) {
  const query = parameters.get("q") ?? "";
  const finds = matcher(query);
  let order = parameters.get("sort") ?? (query ? "device" : "presence");
  let down = parameters.get("down") === "1";
  let page = Math.max(0, Number(parameters.get("page")) || 0);
  let found = [];
  const input = document.querySelector("#search input");
  input.value = query;
  const body = h("tbody");
  const heads = new Map();
  const head = h("tr", {}, columns.map(([name, shown, kind]) => {
    const cell = h("th", { scope: "col", class: kind }, h("button", { type: "button", class: "sort", onclick: () => sort(name) }, shown));
    heads.set(name, cell);
    return cell;
  }));
  const total = h("p", { class: "hint", role: "status" });
  const pager = h("div", { class: "pager" });
  const table = h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Devices" }, h("table", {}, h("thead", {}, head), body));
  const nothing = h("div");
  fill(main, h("h1", {}, query ? `Devices: ${query}` : "Devices"), total, table, nothing, pager);

  function sort(name) {
    down = order === name ? !down : false;
    order = name;
    page = 0;
    all();
  }

  function all() {
    const key = columns.find(([name]) => name === order)?.[3] ?? columns[0][3];
    found = [...fleet.rows.values()].filter(finds).map((row) => [key(row), row]);
    found.sort((a, b) => (a[0] < b[0] ? -1 : a[0] > b[0] ? 1 : a[1][0] < b[1][0] ? -1 : 1));
    if (down) found.reverse();
    found = found.map(([, row]) => row);
    for (const [name, cell] of heads) cell.setAttribute("aria-sort", name === order ? (down ? "descending" : "ascending") : "none");
    show();
  }

  function show() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE));
    page = Math.min(page, pages - 1);
    const rows = found.slice(page * PAGE, page * PAGE + PAGE).map((row) => fleet.rows.get(row[0])).filter(Boolean);
    fill(body, rows.map(line));
    table.hidden = !rows.length;
    fill(nothing, rows.length ? null : !fleet.rows.size ? firstSteps() : state( `No device matches “${query}”. Search by name, or by class:, site:, tag:, model:, firmware:, state: and level:; quote what has spaces.`));
    total.textContent = found.length === fleet.rows.size ? counted(found.length, "device") : `${found.length.toLocaleString()} of ${counted(fleet.rows.size, "device")}`;
    const turn = (to, shown) => h("button", { type: "button", disabled: to < 0 || to >= pages, onclick: () => { page = to; show(); table.focus(); } }, shown);
    fill(pager, pages > 1 && [turn(page - 1, "Previous"), h("span", {}, `page ${page + 1} of ${pages}`), turn(page + 1, "Next")]);
  }

  function line(row) {
    const lost = number(row, "lost"), unexplained = number(row, "unexplained");
    const why = text(row, "why");
    return h("tr", {},
      h("th", { scope: "row" }, h("a", { href: `#/device/${encodeURIComponent(row[0])}` }, shownName(row)), text(row, "name") && h("small", {}, row[0])),
      h("td", {}, badge(stateOf(row)), h("small", {}, `${span(now() - time(row, "since"))}${why ? `: ${why}` : ""}`)),
      h("td", {}, badge(levelOf(row))),
      h("td", { class: "number wide" }, hundredths(number(row, "score"))),
      h("td", { class: "number wide" }, hundredths(number(row, "evidence"))),
      h("td", { class: "number nowrap" }, span(now() - time(row, "seen"))),
      h("td", { class: "number wide" }, lost || unexplained ? `${lost}${unexplained ? ` + ${unexplained} unexplained` : ""}` : "0"),
      h("td", { class: "wide" }, text(row, "class")),
      h("td", { class: "wide" }, text(row, "site")),
      h("td", { class: "wide" }, text(row, "firmware")),
      h("td", { class: "wide" }, notes(row)));
  }

  const hundredths = (value) => (value === null ? "–" : figure(value / 100));
  let asked = 0;
  all();
  const end = on((names) => {
    const mine = names === null || names.some((name) => !fleet.rows.has(name)) || fleet.rows.size !== counts || names.length > 0;
    counts = fleet.rows.size;
    if (!mine || asked) return;
    asked = setTimeout(() => { asked = 0; if (!body.contains(document.activeElement)) names === null || query ? all() : show(); }, 2000);
  });
  let counts = fleet.rows.size;
  return () => { end(); clearTimeout(asked); input.value = ""; };
}
