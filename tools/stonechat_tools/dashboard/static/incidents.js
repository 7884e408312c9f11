// Incidents: those that go on, those that are over, and silences.

import { badge, clock, counted, fill, h, span, state, toast } from "./dom.js";
import { ask, fleet, now, on, session } from "./data.js";

export function evidence(incident) {
  const rows = Object.entries(incident.evidence).filter(([, value]) => value !== null && !(Array.isArray(value) && !value.length));
  return rows.length > 0 && h("dl", { class: "facts" }, rows.map(([name, value]) => [h("dt", {}, WORDS[name] ?? name.replace(/ s$/, "")), h("dd", {}, shown(name, value))]));
}

const WORDS = { "by chance": "probability by chance", chance: "probability by chance", left: "devices that left", away: "still away" };

function shown(name, value) {
  if (Array.isArray(value)) return value.join(", ");
  if (typeof value !== "number") return String(value);
  if (name.endsWith(" s")) return span(value);
  if (name.includes("chance") && value > 0 && value < 1e-6) return "less than one in a million";
  if (/heard|since|time/.test(name)) return clock(value);
  return Number.isInteger(value) ? value.toLocaleString() : value.toPrecision(3);
}

export function card(incident, changed, linked = true) {
  const over = incident.end_s !== null;
  const operator = session.user && session.role === "operator";
  const lasted = (incident.end_s ?? now()) - incident.start_s;
  const acknowledge = h("button", { type: "button", onclick: async () => {
    acknowledge.disabled = true;
    try {
      await ask(`/api/incidents/${incident.id}/acknowledge`, {});
      toast(`Incident ${incident.id}: noted for the collector.`);
      changed?.();
    } catch (error) {
      toast(error.message, true);
      acknowledge.disabled = false;
    }
  } }, "Acknowledge");
  const place = h("div");
  const silence = h("button", { type: "button", "aria-expanded": "false", onclick: () => {
    const opens = !place.firstChild;
    silence.setAttribute("aria-expanded", String(opens));
    fill(place, opens && silenceForm(Object.entries(incident.labels).filter(([name]) => ["kind", "site", "class", "device"].includes(name)).map((pair) => pair.join("=")), () => { fill(place); changed?.(); }));
    if (opens) place.querySelector("input").focus();
  } }, "Silence");
  return h("li", { class: `card incident is-${incident.severity}`, id: `incident-${incident.id}` },
    h("div", { class: "head" }, badge(incident.severity), h(linked ? "h3" : "h2", { class: "name" }, linked ? h("a", { href: `#/incident/${incident.id}` }, `#${incident.id}`) : `#${incident.id}`, " ", incident.title)),
    h("p", { class: "hint" }, `${incident.kind}, since ${clock(incident.start_s)}, ${over ? `over after ${span(lasted)}` : `for ${span(lasted)}`}`,
      incident.acknowledged_s ? `; acknowledged by ${incident.acknowledged_by} at ${clock(incident.acknowledged_s)}` : "",
      incident.silenced && !over ? "; silenced" : "", incident.notifications ? `; sent ${incident.notifications === 1 ? "once" : `${incident.notifications} times`}` : ""),
    evidence(incident),
    incident.devices.length > 0 && h("p", { class: "chips" }, incident.devices.slice(0, 12).map((name) => h("a", { class: "chip", href: `#/device/${encodeURIComponent(name)}` }, name)), incident.count > 12 && h("span", { class: "hint" }, `${counted(incident.count, "device")} in all`)),
    operator && !over && h("div", { class: "actions" }, !incident.acknowledged_s && acknowledge, silence), place);
}

function silenceForm(matchers, done) {
  const error = h("p", { class: "error", role: "alert" });
  const form = h("form", { class: "silence", onsubmit: async (event) => {
    event.preventDefault();
    const given = new FormData(form);
    try {
      await ask("/api/silences", { matchers: given.get("matchers").split(",").map((each) => each.trim()).filter(Boolean), for: given.get("for"), comment: given.get("comment") });
      toast("Silenced. Nothing is sent about what matches until the end.");
      done();
    } catch (failed) {
      error.textContent = failed.message;
    }
  } },
  h("label", {}, "What matches", h("input", { name: "matchers", required: true, value: matchers.join(", "), spellcheck: "false" })),
  h("label", {}, "For", h("select", { name: "for" }, [["30m", "30 minutes"], ["2h", "2 hours"], ["8h", "8 hours"], ["1d", "a day"], ["7d", "a week"]].map(([value, text]) => h("option", { value, selected: value === "2h" }, text)))),
  h("label", {}, "Why", h("input", { name: "comment", maxlength: 200 })), error,
  h("button", { type: "submit", class: "main" }, "Silence"));
  return form;
}

export function showIncidents(main, parameters, wanted) {
  const place = h("div", {}, state("Loading …"));
  fill(main, h("h1", {}, "Incidents"), place);
  let version = -1, asking = false, ended = false, found = null;
  read();

  async function read(automatic) {
    if (asking) return;
    asking = true;
    try {
      found = await ask("/api/incidents", undefined, automatic === true);
      version = found.version;
      if (!ended) show();
    } catch (error) {
      if (!ended) fill(place, state(`The incidents can't be shown: ${error.message}`, read));
    }
    asking = false;
  }

  function show() {
    const operator = session.user && session.role === "operator";
    if (wanted) {
      const incident = [...found.open, ...found.over].find((each) => String(each.id) === wanted);
      fill(place, incident ? h("ul", { class: "cards" }, card(incident, read, false)) : state(`There is no incident ${wanted} any more.`), h("p", {}, h("a", { href: "#/incidents" }, "All incidents")));
      return;
    }
    const list = (incidents) => h("ul", { class: "cards" }, incidents.map((incident) => card(incident, read)));
    const making = h("div");
    fill(place,
      h("section", { "aria-labelledby": "open" }, h("h2", { id: "open" }, `Open (${found.open.length})`), found.open.length ? list(found.open) : state("Nothing is open. An incident appears here while it goes on.")),
      h("section", { "aria-labelledby": "silences" }, h("h2", { id: "silences" }, `Silences (${found.silences.length})`),
        found.silences.length > 0 && h("ul", { class: "cards" }, found.silences.map((silence) => h("li", { class: "card" }, h("p", {}, h("code", {}, silence.matchers.join(", ")), ` until ${clock(silence.until_s)}, by ${silence.by}${silence.comment ? `: ${silence.comment}` : ""}`),
          operator && h("button", { type: "button", onclick: () => endOf(silence.id) }, "End it")))),
        operator && [h("button", { type: "button", onclick: () => fill(making, making.firstChild ? null : silenceForm(["site="], read)) }, "New silence"), making],
        !operator && !found.silences.length && h("p", { class: "hint" }, "None.")),
      h("section", { "aria-labelledby": "over" }, h("h2", { id: "over" }, `Over (${found.over.length}${found.more ? ` of ${found.over.length + found.more}` : ""})`), found.over.length ? list(found.over) : h("p", { class: "hint" }, "None yet.")));
  }

  async function endOf(id) {
    try {
      await ask(`/api/silences/${encodeURIComponent(id)}/end`, {});
      await read();
    } catch (error) {
      toast(error.message, true);
    }
  }

  const end = on(() => {
    const busy = place.contains(document.activeElement) && document.activeElement.closest("form");
    if (fleet.about.incidents !== version && !busy) read(true);
  });
  return () => { ended = true; end(); };
}
