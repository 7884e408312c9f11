// Which page is shown, who has logged in, and what is said above the page.

import { clock, fill, h, span, state, toast, zone } from "./dom.js";
import { ask, fleet, load, now, on, readSession, session } from "./data.js";
import { showMap } from "./map.js";
import { showTable } from "./table.js";
import { showDevice } from "./device.js";
import { showIncidents } from "./incidents.js";
import { showModels } from "./models.js";
import { showAudit } from "./audit.js";
import { showLogin } from "./login.js";

const PAGES = {
  "": ["Fleet", showMap],
  devices: ["Devices", showTable],
  device: ["Device", showDevice],
  incidents: ["Incidents", showIncidents],
  incident: ["Incident", showIncidents],
  models: ["Models", showModels],
  audit: ["Log", showAudit],
  login: ["Log in", showLogin],
};
const main = document.getElementById("main");
let leave = null;

function route() {
  if (location.hash && !location.hash.startsWith("#/")) return; // a place within the page
  const [path, query = ""] = location.hash.slice(2).split("?");
  const [name, ...rest] = path.split("/").map(decode);
  const [title, show] = PAGES[Object.hasOwn(PAGES, name) ? name : ""];
  leave?.();
  leave = null;
  document.title = `${rest[0] ? rest[0] + " – " : ""}${title} – stonechat`;
  for (const link of document.querySelectorAll("nav a")) {
    const mine = link.getAttribute("href").slice(2) === name || (name === "incident" && link.hash === "#/incidents");
    if (mine) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  fill(main);
  if (name !== "login" && session.role === null) {
    location.hash = "#/login";
    return;
  }
  leave = show(main, new URLSearchParams(query), rest[0]) ?? null;
  main.className = `page-${name || "fleet"}`;
  if (started) main.focus({ preventScroll: true });
  scrollTo(0, 0);
}

function decode(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}

function showSession() {
  const place = document.getElementById("session");
  document.getElementById("to-audit").hidden = !(session.user && session.role === "operator");
  if (session.user) {
    fill(place, h("span", { class: "who" }, session.user, h("small", {}, session.role)),
      h("button", { type: "button", class: "plain", onclick: logOut }, "Log out"));
  } else {
    fill(place, h("a", { href: "#/login" }, "Log in"));
  }
}

async function logOut() {
  try {
    await ask("/api/logout", {});
  } catch (error) {
    toast(error.message, true);
    return;
  }
  location.hash = "#/login";
  location.reload();
}

function showBanner() {
  const about = fleet.about;
  const news = document.getElementById("news");
  news.hidden = !about?.news;
  news.textContent = about?.news ? String(about.news) : "";
  if (about?.news) news.setAttribute("aria-label", `, ${about.news} new`);
  const lines = [];
  if (fleet.trouble) lines.push(fleet.trouble);
  else if (about && about.listening === null) lines.push("No collector has been connected to its broker yet: nothing is known of the devices.");
  else if (about?.stale) lines.push(`No collector runs. This is the fleet as of ${clock(about.listening[1])}, ${span(now() - about.listening[1])} ago.`);
  const banner = document.getElementById("banner");
  const line = lines.join(" ");
  if (banner.textContent !== line) banner.textContent = line;
}

document.getElementById("search").addEventListener("submit", (event) => {
  event.preventDefault();
  location.hash = `#/devices?q=${encodeURIComponent(new FormData(event.target).get("q").trim())}`;
});
addEventListener("hashchange", route);
on(showBanner);
document.getElementById("zone").textContent = `Times are in this browser's zone: ${zone()}.`;

let started = false;
async function start() {
  try {
    await readSession();
    showSession();
    if (session.role !== null) await load();
    route();
    started = true;
    showBanner();
  } catch (error) {
    showSession();
    fill(main, state(`The fleet can't be shown: ${error.message}`, start));
  }
}
start();
