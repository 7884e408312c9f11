import { clock, fill, h, state } from "./dom.js";
import { ask } from "./data.js";

export function showAudit(main) {
  const place = h("div", {}, state("Loading …"));
  fill(main, h("h1", {}, "Log"), h("p", { class: "hint" }, "Who did what, the newest first. ", h("code", {}, "stonechat dashboard audit --verify"), " checks that nothing was changed."), place);
  read();

  async function read() {
    try {
      const { entries } = await ask("/api/audit");
      if (!entries.length) return fill(place, state("Nothing has been done yet."));
      fill(place, h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Log" }, h("table", {},
        h("thead", {}, h("tr", {}, ["Time", "Who", "What", "About"].map((name) => h("th", { scope: "col" }, name)))),
        h("tbody", {}, entries.map((entry) => h("tr", {},
          h("td", { class: "nowrap" }, clock(entry.time_s)), h("td", {}, entry.who), h("td", { class: "nowrap" }, entry.what),
          h("td", {}, Object.entries(entry.facts).map(([name, value]) => `${name} ${value}`).join(", ")),
        ))))));
    } catch (error) {
      fill(place, state(error.message, read));
    }
  }
}
