// One device: its presence, score and evidence over time, what explains them, its incidents, and commands.

import { badge, clock, color, counted, figure, fill, finding, h, span, state, toast } from "./dom.js";
import { ask, fleet, now, on, session } from "./data.js";
import { card } from "./incidents.js";

const SPANS = { "1h": "1 h", "6h": "6 h", "1d": "1 day", "7d": "7 days", "90d": "90 days", "2y": "2 years" };
const TIMES = { 900: "15 min", 3600: "1 h", 28800: "8 h", 86400: "1 day", 604800: "7 days", 0: "end it" };
const HINTS = {
  "report-now": "send a report at once", mute: "score, but raise no alarm, for a time", maintenance: "expect anything, for a time",
  calibrate: "learn its own normal anew", "was-normal": "a report that was an alarm was normal", "stop-responding": "end its response, and begin no other", respond: "let it respond to alarms again", release: "release what it holds back",
};

export function showDevice(main, parameters, name) {
  let length = Object.hasOwn(SPANS, parameters.get("span")) ? parameters.get("span") : "1d";
  let ended = false, asking = false, again = 0, plots = [];
  const place = h("div", {}, state("Loading …"));
  fill(main, place);
  read();

  async function read(automatic) {
    if (asking || ended) return;
    asking = true;
    try {
      const found = await ask(`/api/device/${encodeURIComponent(name)}?span=${length}`, undefined, automatic === true);
      if (!ended) show(found);
    } catch (error) {
      if (!ended) fill(place, h("h1", {}, name), state(`The device can't be shown: ${error.message}`, read), h("p", {}, h("a", { href: "#/devices" }, "All devices")));
    }
    asking = false;
  }

  function show(found) {
    const { row, facts } = found;
    const open = new Set([...place.querySelectorAll("details[open]")].map((each) => each.id));
    const lead = found.reports.find((report) => report.features.length);
    const chart = h("div", { class: "plots" });
    for (const plot of plots) plot.destroy();
    plots = [];
    fill(place,
      h("div", { class: "title" }, h("h1", {}, row.name || row.device), row.name && h("span", { class: "hint" }, row.device),
        h("span", { class: "chips" }, [["class", row.class], ["site", row.site], ...row.tags.split(", ").map((tag) => ["tag", tag])].filter(([, value]) => value).map(([key, value]) => h("a", { class: "chip", href: finding(key, value) }, `${key} ${value}`)))),
      h("div", { class: "tiles" },
        tile("Presence", badge(row.state), `since ${clock(row.since)} (${span(now() - row.since)})`, row.why, row.cause && `with others: ${row.cause}`),
        tile("Level", badge(fleet.levels[row.level]), row.marks, row.score === null ? "no score yet" : `score ${figure(row.score / 100)}, evidence ${figure(row.evidence === null ? null : row.evidence / 100)} (1 is the threshold)`),
        tile("Reports", h("b", {}, row.reports.toLocaleString()), `heard ${span(now() - facts.last_seen_s)} ago`, row.lost ? `${row.lost} lost` : "none lost", row.unexplained ? `${row.unexplained} lost, unexplained` : null, facts.refused ? `${facts.refused} refused` : null),
        facts.response && tile("Response", h("b", {}, facts.response)),
        facts.update && tile("Update", h("b", {}, facts.update))),
      h("section", { "aria-labelledby": "why" }, h("h2", { id: "why" }, "What explains the latest score"), lead ? explanation(lead) : h("p", { class: "hint" }, "No report has an explanation yet.")),
      h("section", { "aria-labelledby": "history" }, h("div", { class: "bar" }, h("h2", { id: "history" }, "Score"),
        h("div", { class: "choice", role: "group", "aria-label": "Length of time" }, Object.entries(SPANS).map(([key, shown]) => h("button", { type: "button", "aria-pressed": String(key === length), onclick: () => { length = key; history.replaceState(null, "", `#/device/${encodeURIComponent(name)}?span=${key}`); read(); } }, shown)))), chart),
      commands(found),
      h("section", { "aria-labelledby": "timeline" }, h("h2", { id: "timeline" }, "Incidents"), found.incidents.length ? h("ul", { class: "cards" }, found.incidents.map((incident) => card(incident, read))) : h("p", { class: "hint" }, "None.")),
      h("section", { "aria-labelledby": "about" }, h("h2", { id: "about" }, "About it"), about(row, facts)),
      reports(found.reports));
    for (const each of place.querySelectorAll("details")) if (open.has(each.id)) each.open = true;
    draw(chart, found);
  }

  function tile(title, ...lines) {
    return h("div", { class: "card tile" }, h("h2", {}, title), lines.filter(Boolean).map((line) => (typeof line === "string" ? h("p", { class: "hint" }, line) : h("p", {}, line))));
  }

  function explanation(report) {
    return [h("p", { class: "hint" }, `report ${report.number}, ${clock(report.time)}, ${fleet.levels[report.level]}`, report.channel ? `, in ${report.channel}` : "", report.detail ? `, ${report.detail}` : ""),
      h("ul", { class: "features" }, report.features.map(([feature, deviation, share]) => {
        const bar = h("i");
        bar.style.width = `${Math.max(1, Math.min(100, share))}%`;
        return h("li", {}, h("span", { class: "feature" }, feature), h("span", { class: "share", "aria-hidden": "true" }, bar), h("span", {}, `${share} % of the score, ${deviation > 0 ? "+" : ""}${deviation.toFixed(1)} sd`));
      }))];
  }

  function about(row, facts) {
    const rows = {
      Model: facts.model && h("code", {}, facts.model.slice(0, 16)), "Own model": facts.own_model, Firmware: facts.firmware, Agent: facts.agent,
      Schema: facts.schema, Sources: facts.sources.join(", "), "Not scored": facts.unscored.join(", "), Services: facts.channels.join(", "),
      Calibration: [facts.learning ? "learning its own normal" : "done", facts.adaptation === null ? "" : `threshold adapted by ${figure(facts.adaptation)}`, facts.steady_since_s ? `changed and steady since ${clock(facts.steady_since_s)}` : ""].filter(Boolean).join("; "),
      Window: facts.window_s && `${facts.window_s} s`, "Reports at least every": facts.interval_s && span(facts.interval_s),
      "First heard": clock(facts.first_seen_s), Starts: facts.boot, "Key": facts.key && h("code", {}, facts.key), "Key used twice": facts.conflicts || null,
    };
    return h("dl", { class: "facts" }, Object.entries(rows).filter(([, value]) => value !== null && value !== undefined && value !== "").map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  }

  function reports(rows) {
    return h("details", { id: "reports" }, h("summary", {}, rows.length === 1 ? "The only report as a table" : `The latest ${counted(rows.length, "report")} as a table`), h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Reports" }, h("table", {},
      h("thead", {}, h("tr", {}, ["Time", "Level", "Score", "Evidence", "Windows", "What carries it"].map((each, n) => h("th", { scope: "col", class: n > 1 && n < 5 ? "number" : "" }, each)))),
      h("tbody", {}, rows.map((report) => h("tr", {}, h("td", { class: "nowrap" }, clock(report.time), report.known ? null : h("small", {}, "time unknown")), h("td", {}, badge(fleet.levels[report.level])), h("td", { class: "number" }, figure(report.score)), h("td", { class: "number" }, figure(report.evidence)), h("td", { class: "number" }, report.windows),
        h("td", {}, [report.channel && `${report.channel}: `, report.features.map(([feature, deviation, share]) => `${feature} ${deviation > 0 ? "+" : ""}${deviation.toFixed(1)} sd (${share} %)`).join(", "), report.detail && ` [${report.detail}]`, report.flags.length > 0 && ` (${report.flags.join(", ")})`])))))));
  }

  function commands(found) {
    const sent = found.commands.filter((each) => each.command);
    if (!session.commands.length && !sent.length) return null;
    const report = found.reports.find((each) => each.level > 0);
    const time = h("select", { "aria-label": "How long mute and maintenance last" }, Object.entries(TIMES).map(([value, shown]) => h("option", { value, selected: value === "3600" }, shown)));
    const button = (command) => h("button", { type: "button", title: HINTS[command], disabled: command === "was-normal" && !report, onclick: async (event) => {
      const pressed = event.target;
      pressed.disabled = true;
      try {
        const asked = { command };
        if (session.lasting.includes(command)) asked.lasts_s = Number(time.value);
        if (command === "was-normal") asked.report = report.number;
        const { sequence } = await ask(`/api/device/${encodeURIComponent(name)}/command`, asked);
        toast(`${command}: sent as number ${sequence}; its answer appears below.`);
        setTimeout(read, 2000);
      } catch (error) {
        toast(error.message, true);
      }
      pressed.disabled = false;
    } }, command);
    return h("section", { "aria-labelledby": "commands" }, h("h2", { id: "commands" }, "Commands"),
      session.commands.length > 0 && h("div", { class: "actions" }, session.commands.map(button), h("label", { class: "inline" }, "mute, maintenance for", time)),
      sent.length > 0 && h("ul", { class: "plain" }, sent.map((each) => h("li", {}, `${each.time ? clock(each.time) : ""} ${each.command}: `, h("b", {}, each.answer ?? "no answer yet")))));
  }

  // --- plots

  function draw(chart, found) {
    const { points } = found;
    if (!points.time.length) return fill(chart, h("p", { class: "hint" }, "No reports in this time."));
    if (typeof uPlot === "undefined") return fill(chart, h("p", { class: "hint" }, "The plot could not be loaded; the table below has the reports."));
    const paint = { line: color("plot"), band: color("band"), grid: color("line"), text: color("dim"), watch: color("wash-watch"), alarm: color("wash-alarm"), threshold: color("is-alarm") };
    const axis = { stroke: paint.text, grid: { stroke: paint.grid, width: 1 }, ticks: { stroke: paint.grid, width: 1 }, font: "12px system-ui, sans-serif" };
    const hours = (plot, at, n, space, step) => at.map((each) => { const shown = clock(each); return step >= 86400 || shown.endsWith("00:00:00") ? shown.slice(5, 10) : shown.slice(11, 16); });
    const shade = (plot) => {
      const { ctx, bbox } = plot;
      for (let i = 0; i < points.time.length; i++) {
        if (!points.level[i]) continue;
        const x = plot.valToPos(points.time[i], "x", true);
        const to = i + 1 < points.time.length ? plot.valToPos(points.time[i + 1], "x", true) : x + 3;
        ctx.fillStyle = points.level[i] === 2 ? paint.alarm : paint.watch;
        ctx.fillRect(Math.max(bbox.left, x), bbox.top, Math.max(2, Math.min(to, bbox.left + bbox.width) - x), bbox.height);
      }
    };
    const wide = () => Math.max(260, chart.clientWidth);
    const options = (tall, series, bands, extra = {}) => ({
      width: wide(), height: tall, cursor: { drag: { x: false, y: false }, sync: { key: "device" } }, legend: { show: true, live: true },
      scales: { x: { time: true, min: found.from, max: found.now }, ...extra }, axes: [{ ...axis, values: hours }, { ...axis, size: 52 }], series, bands, hooks: { drawClear: [shade] },
    });
    const value = (plot, each) => (each === null || each === undefined ? "–" : each.toFixed(2));
    const line = (label, more = {}) => ({ label, stroke: paint.line, width: 1.5, points: { show: points.time.length < 120, size: 4 }, value, ...more });
    const faint = (label) => line(label, { width: 0, points: { show: false } });
    const when = { label: "Time", value: (plot, at) => (at === null || at === undefined ? "–" : clock(at)) };
    const alarms = points.level.filter((level) => level === 2).length;
    const highest = Math.max(...points.high.filter((each) => each !== null), 0);
    const add = (title, words, make) => {
      const holder = h("div", { class: "plot", role: "img", "aria-label": words });
      chart.append(h("h3", { class: "hint" }, title), holder);
      const plot = make(holder);
      for (const table of holder.querySelectorAll("table")) table.setAttribute("role", "presentation");
      plots.push(plot);
    };
    add("Score; shaded where the level was watch or alarm", `Score from ${clock(found.from)} to ${clock(found.now)}: ${counted(points.time.length, "point")}, highest ${figure(highest)}, ${alarms} in alarm. The table below has the numbers.`,
      (holder) => new uPlot(options(220, [when, faint("Lowest"), faint("Highest"), line("Score")], [{ series: [2, 1], fill: paint.band }]), [points.time, points.low, points.high, points.score], holder));
    if (points.evidence.some((each) => each !== null)) {
      const one = points.time.map(() => 1);
      add("Evidence; an alarm is raised at 1", `Evidence over the same time, at most ${figure(Math.max(...points.evidence.map((each) => each ?? 0)))}; the threshold is 1.`,
        (holder) => new uPlot(options(140, [when, line("Evidence"), line("Threshold", { stroke: paint.threshold, dash: [4, 4], width: 1, points: { show: false } })], []), [points.time, points.evidence, one], holder));
    }
  }

  const resized = () => { const chart = place.querySelector(".plots"); if (chart) for (const plot of plots) plot.setSize({ width: Math.max(260, chart.clientWidth), height: plot.height }); };
  const dark = matchMedia("(prefers-color-scheme: dark)");
  addEventListener("resize", resized);
  dark.addEventListener("change", read);
  const end = on((names) => {
    const mine = names === null || names.includes(name);
    const active = document.activeElement;
    const busy = place.contains(active) && active.closest("form, select, .actions");
    if (mine && !busy && !again) again = setTimeout(() => { again = 0; read(true); }, 3000);
  });
  return () => { ended = true; end(); clearTimeout(again); removeEventListener("resize", resized); dark.removeEventListener("change", read); for (const plot of plots) plot.destroy(); };
}
