// Elements and texts. Nothing here takes HTML: what devices and operators have written is text.

export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function fill(element, ...children) {
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
}

const two = (number) => String(number).padStart(2, "0");

export function clock(seconds, withDate = true) {
  const at = new Date(seconds * 1000);
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  return (withDate ? day + " " : "") + `${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}

export function span(seconds) {
  const s = Math.max(0, Math.round(seconds));
  if (s < 120) return `${s} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${Math.round(s / 3600)} h`;
  return `${Math.round(s / 86400)} d`;
}

// counted(1, "device") -> "1 device", counted(2, "device") -> "2 devices"
export function counted(n, noun) {
  return `${n.toLocaleString()} ${noun}${n === 1 ? "" : "s"}`;
}

// The browser's zone, in which clock() shows times: "Europe/Berlin (UTC+1)"
export function zone() {
  const minutes = -new Date().getTimezoneOffset();
  const hours = Math.trunc(Math.abs(minutes) / 60), rest = Math.abs(minutes) % 60;
  const offset = minutes ? `UTC${minutes < 0 ? "−" : "+"}${hours}${rest ? `:${two(rest)}` : ""}` : "UTC";
  const name = Intl.DateTimeFormat().resolvedOptions().timeZone;
  return !name || name === "UTC" ? offset : `${name} (${offset})`;
}

// A link to the devices of which `key` is `value`
export function finding(key, value) {
  const plain = value.replaceAll('"', " ");
  return `#/devices?q=${encodeURIComponent(`${key}:${/\s/.test(plain) ? `"${plain}"` : plain}`)}`;
}

export function figure(value, digits = 2) {
  return value === null || value === undefined ? "–" : Number(value).toFixed(digits);
}

export function badge(kind, text) {
  return h("span", { class: `badge is-${kind}` }, text ?? kind);
}

export function state(text, retry) {
  return h("div", { class: "state" }, h("p", {}, text), retry && h("button", { type: "button", onclick: retry }, "Try again"));
}

// Where there is no device yet: how the first one appears
export function firstSteps() {
  const step = (words, command) => h("li", {}, words, " ", h("code", {}, command));
  return h("div", { class: "state first" }, h("p", {}, "No device has reported yet. The first one appears here by itself:"),
    h("ol", {}, step("Make its keys:", "stonechat provision add NAME"), step("Install what that has made on the device:", "stonechat-agent install --bundle NAME.tar"), step("Run the collector:", "stonechat collect")));
}

let hiding = 0;
export function toast(text, bad = false) {
  const place = document.getElementById("toast");
  place.className = bad ? "shown bad" : "shown";
  place.textContent = text;
  clearTimeout(hiding);
  hiding = setTimeout(() => { place.className = ""; place.textContent = ""; }, bad ? 12000 : 5000);
}

export function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}
