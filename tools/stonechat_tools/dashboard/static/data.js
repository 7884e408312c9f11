// The fleet in the browser: read once, then only what changes. And requests to the server.

export const session = { user: null, role: null, csrf: "", commands: [], lasting: [] };

// automatic: asked by the page itself, not by somebody; that does not keep an idle session
export async function ask(path, body, automatic = false) {
  const options = body === undefined ? { headers: automatic ? { "x-automatic": "1" } : {} } : {
    method: "POST",
    headers: { "content-type": "application/json", "x-csrf-token": session.csrf },
    body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the dashboard does not answer; is it still running?");
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) {
    const error = new Error(found.error || `the dashboard answers ${answer.status}`);
    error.status = answer.status;
    throw error;
  }
  return found;
}

export async function readSession() {
  Object.assign(session, await ask("/api/session"));
}

const listeners = new Set();
let source = null;
let again = 0;

export const fleet = {
  about: null, // what was said of all: version, now, open, news, listening, stale
  rows: new Map(), // device: row, an array
  at: {}, // field: its place in a row
  strings: [],
  states: [],
  levels: [],
  texts: new Set(),
  base: 0,
  epoch: "",
  skew: 0, // this clock less the server's, in seconds
  trouble: null, // why nothing new arrives
  asked: 0, // readings so far
};

export const now = () => Date.now() / 1000 - fleet.skew;
export const text = (row, field) => fleet.strings[row[fleet.at[field]]] ?? "";
export const number = (row, field) => row[fleet.at[field]];
export const time = (row, field) => row[fleet.at[field]] + fleet.base;
export const stateOf = (row) => fleet.states[row[fleet.at.state]];
export const levelOf = (row) => fleet.levels[row[fleet.at.level]] ?? "";
export const shownName = (row) => text(row, "name") || row[0];

// on(listener): called with the names of the devices that changed, null for all -> what ends it
export function on(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function heard(names) {
  for (const listener of [...listeners]) listener(names);
}

export async function load(automatic = false) {
  close();
  const found = await ask("/api/fleet", undefined, automatic);
  fleet.at = Object.fromEntries(found.fields.map((name, place) => [name, place]));
  fleet.texts = new Set(found.texts);
  for (const name of ["strings", "states", "levels", "base", "epoch"]) fleet[name] = found[name];
  const rows = new Map();
  const columns = found.columns;
  for (let n = 0; n < columns[0].length; n++) rows.set(columns[0][n], columns.map((column) => column[n]));
  fleet.rows = rows;
  take(found);
  fleet.asked++;
  heard(null);
  listen();
}

function take(about) {
  fleet.about = about;
  fleet.skew = Date.now() / 1000 - about.now;
}

function close() {
  clearTimeout(again);
  source?.close();
  source = null;
}

function listen() {
  close();
  const { version } = fleet.about;
  source = new EventSource(`/api/live?epoch=${fleet.epoch}&version=${version}&strings=${fleet.strings.length}`);
  source.onmessage = (event) => {
    const found = JSON.parse(event.data);
    fleet.strings.push(...found.strings);
    const names = [];
    for (const row of found.rows) {
      fleet.rows.set(row[0], row);
      names.push(row[0]);
    }
    for (const name of found.gone) if (fleet.rows.delete(name)) names.push(name);
    fleet.trouble = null;
    take(found);
    heard(names);
  };
  source.addEventListener("trouble", (event) => {
    fleet.trouble = JSON.parse(event.data).error;
    heard([]);
  });
  source.addEventListener("reset", () => reload(0));
  source.addEventListener("ended", () => { close(); location.hash = "#/login"; location.reload(); });
  source.onerror = () => {
    fleet.trouble = "The dashboard does not answer; what is shown may be old.";
    heard([]);
    reload(3000);
  };
}

// After a break all is read again: cheaper than to reason about what was missed.
function reload(wait) {
  close();
  again = setTimeout(() => load(wait > 0).catch((error) => {
    fleet.trouble = error.message;
    heard([]);
    if (error.status === 401) location.hash = "#/login";
    else reload(5000);
  }), wait);
}

// A browser has six connections for one address: a tab that nobody sees holds none of them.
document.addEventListener("visibilitychange", () => {
  if (!fleet.asked) return;
  if (document.hidden) close();
  else reload(0);
});
addEventListener("pagehide", () => close());
addEventListener("pageshow", (event) => { if (event.persisted && fleet.asked) reload(0); });
