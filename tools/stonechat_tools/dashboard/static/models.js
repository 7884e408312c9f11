// Which models and versions are in the field, and how they fare.

import { badge, clock, counted, fill, finding, firstSteps, h, span, state, toast } from "./dom.js";
import { ask, fleet, levelOf, on, session, text } from "./data.js";

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
  const shown = sorted.slice(0, 4).map(([name, n]) => h(name ? "a" : "span", { class: "chip", href: name ? finding(link, name) : null }, name || "not said", h("b", {}, n.toLocaleString())));
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

// "5:3d" -> "5 devices for 3d", "1%:7d" -> "1 % for 7d"
function stage(text) {
  const [most, time] = text.split(":");
  return `${most.endsWith("%") ? most.replace("%", " %") : counted(Number(most), "device")}${time ? ` for ${time}` : ""}`;
}

const KINDS = { running: "reporting", paused: "watch", halted: "alarm", withdrawn: "off", done: "normal" };

function rollout(each, found, again) {
  const counts = each.devices;
  const acts = session.user && session.role === "operator" ? Object.keys(found.acts).filter((act) => found.acts[act].includes(each.state)) : [];
  const comment = h("input", { "aria-label": "Why, for the log", placeholder: "why, for the log", maxlength: 200 });
  const button = (act) => h("button", { type: "button", onclick: async (event) => {
    event.target.disabled = true;
    try {
      await ask(`/api/rollouts/${each.id}/${act}`, { comment: comment.value });
      toast(`${each.class} ${each.version}: ${act}.`);
      again();
    } catch (error) {
      toast(error.message, true);
      event.target.disabled = false;
    }
  } }, act[0].toUpperCase() + act.slice(1));
  return h("li", { class: "card" },
    h("div", { class: "title" }, badge(KINDS[each.state] ?? "unknown", each.state), h("h3", {}, `${each.class} ${each.version}${each.site ? ` at ${each.site}` : ""}`)),
    h("p", { class: "hint" }, `now ${each.stage}, for ${span(found.now - each.since_s)}; stages: ${each.stages.map(stage).join(", ")}; began ${clock(each.began_s)}`),
    h("p", {}, Object.entries(counts).map(([name, n]) => h("span", { class: "chip" }, name, h("b", {}, n.toLocaleString()))), each.remaining ? h("span", { class: "hint" }, `still on ${counted(each.remaining, "device")}`) : null),
    each.evidence.why && h("p", {}, each.evidence.why),
    each.failed.length > 0 && h("ul", { class: "plain" }, each.failed.slice(0, 10).map((one) => h("li", {}, h("a", { href: `#/device/${encodeURIComponent(one.device)}` }, one.device), `: ${one.why}`))),
    acts.length > 0 && h("div", { class: "actions" }, acts.map(button), comment));
}

export function showModels(main) {
  const place = h("div");
  const rolled = h("div");
  fill(main, h("h1", {}, "Models and versions in the field"), place, rolled);
  let ended = false;

  async function showRollouts(automatic) {
    try {
      const found = await ask("/api/rollouts", undefined, automatic === true);
      if (ended || rolled.contains(document.activeElement) && document.activeElement.value) return;
      const again = () => showRollouts();
      fill(rolled, h("h2", {}, `Roll-outs of signed releases (${found.rollouts.length})`),
        found.rollouts.length ? h("ul", { class: "cards" }, found.rollouts.map((each) => rollout(each, found, again))) : h("p", { class: "hint" }, "None. ", h("code", {}, "stonechat release stage"), " begins one."),
        found.versions.length > 0 && table("Versions of releases", found.versions.map((each) => h("tr", {}, h("th", { scope: "row" }, each.class || "no class"), h("td", { class: "number" }, each.version), h("td", { class: "number" }, each.devices.toLocaleString()), h("td", { class: "number" }, each["on trial"].toLocaleString()))), [["Class", ""], ["Version", "number"], ["Devices", "number"], ["On trial", "number"]]));
    } catch (error) {
      if (!ended) fill(rolled, state(`The roll-outs can't be shown: ${error.message}`, showRollouts));
    }
  }

  function show() {
    const all = fleet.rows.size;
    if (!all) return fill(place, firstSteps());
    const number = (n, wide = false) => h("td", { class: wide ? "number wide" : "number" }, n.toLocaleString());
    fill(place,
      table("Models", collect("model").map(([name, group]) => h("tr", {},
        h("th", { scope: "row" }, name ? h("a", { href: finding("model", name) }, h("code", {}, name)) : "no model", h("small", {}, [...group.schemas.keys()].filter(Boolean).join(", "))),
        h("td", { class: "number" }, group.n.toLocaleString(), bar(group.n / all)),
        h("td", { class: "number" }, group.alarm.toLocaleString(), h("small", {}, share(group.alarm, group.n))),
        number(group.watch), number(group.unfit, true), number(group.learning, true),
        h("td", { class: "wide" }, most(group.versions, "firmware")))),
      [["Model", ""], ["Devices", "number"], ["In alarm", "number"], ["Watch", "number"], ["Does not fit", "number wide"], ["Learning", "number wide"], ["Firmware", "wide"]]),
      table("Firmware", collect("firmware").map(([name, group]) => h("tr", {},
        h("th", { scope: "row" }, name ? h("a", { href: finding("firmware", name) }, name) : "not said"),
        h("td", { class: "number" }, group.n.toLocaleString(), bar(group.n / all)),
        h("td", { class: "number" }, group.alarm.toLocaleString(), h("small", {}, share(group.alarm, group.n))),
        number(group.updates, true),
        h("td", { class: "wide" }, most(group.models, "model")))),
      [["Firmware", ""], ["Devices", "number"], ["In alarm", "number"], ["With an update", "number wide"], ["Models", "wide"]]));
  }

  let asked = 0;
  show();
  showRollouts();
  const often = setInterval(() => { if (!document.hidden) showRollouts(true); }, 15000);
  const end = on(() => { asked ||= setTimeout(() => { asked = 0; if (!place.contains(document.activeElement)) show(); }, 3000); });
  return () => { ended = true; end(); clearTimeout(asked); clearInterval(often); };
}
