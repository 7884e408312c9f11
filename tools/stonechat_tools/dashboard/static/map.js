// The fleet as a map: a cell for each device, in groups. Drawn on a canvas; the table beside it says the same in words.

import { color, counted, fill, firstSteps, h, span } from "./dom.js";
import { fleet, levelOf, now, number, on, shownName, stateOf, text, time } from "./data.js";

const GROUPS = { class: "Class", site: "Site", model: "Model", firmware: "Firmware", schema: "Schema", presence: "Presence", none: "Nothing" };
const COLOURS = { presence: "Presence", level: "Level" };
const LABEL = 22, GAP = 14, LARGEST = 26, LEAST = 4;
const MOST_SCALE = 12;
const SHAPES_OF_BLOCKS = [1.7, 1, 2.5, 4, 8]; // width by height of a group's cells; the first that fits
// The shape of a cell says the same as its colour.
const SHAPES = { asleep: "small", off: "small", silent: "hollow", gone: "hollow", lying: "cross", watch: "dot", alarm: "cross", unknown: "dot" };

function kept(name, options, fallback) {
  const found = localStorage.getItem(`stonechat.${name}`);
  return found !== null && Object.hasOwn(options, found) ? found : fallback;
}

export function groupOf(row, by) {
  if (by === "none") return "all devices";
  if (by === "presence") return stateOf(row);
  return text(row, by) || `no ${by}`;
}

export function showMap(main) {
  let by = kept("group", GROUPS, "class");
  let colours = kept("colour", COLOURS, "presence");
  const canvas = h("canvas", { tabindex: "0", role: "application", "aria-roledescription": "map of devices", "aria-describedby": "map-keys" });
  const tip = h("div", { class: "tip", hidden: true });
  const where = h("div", { class: "quiet", role: "status", "aria-live": "polite" });
  const legend = h("ul", { class: "legend", "aria-label": "Devices by colour" });
  const total = h("span", { class: "hint" });
  const frame = h("div", { class: "map" }, canvas, tip);
  const choose = (label, name, options, value, change) => h("label", { class: "inline" }, label, h("select", { name, onchange: (event) => { localStorage.setItem(`stonechat.${name}`, event.target.value); change(event.target.value); } },
    Object.entries(options).map(([key, shown]) => h("option", { value: key, selected: key === value }, shown))));
  const zoomed = (factor, label, shown) => h("button", { type: "button", class: "plain", "aria-label": label, title: label, onclick: () => zoom(factor) }, shown);
  fill(main,
    h("h1", { class: "quiet" }, "The fleet"),
    h("div", { class: "bar" },
      choose("Group by", "group", GROUPS, by, (value) => { by = value; lay(); }),
      choose("Colour by", "colour", COLOURS, colours, (value) => { colours = value; paint(); count(); }),
      h("span", { class: "zoom" }, zoomed(1 / 1.5, "Zoom out", "−"), zoomed(1.5, "Zoom in", "+"), h("button", { type: "button", class: "plain", onclick: () => { fit(); paint(); } }, "Fit")),
      h("a", { href: "#/devices" }, "As a table"), total),
    legend, frame, where,
    h("p", { id: "map-keys", class: "hint keys" }, "Keys on the map: arrows move from device to device, Enter opens one, + and − zoom, 0 fits. The same in words: ", h("a", { href: "#/devices" }, "as a table"), "."));

  const context = canvas.getContext("2d", { alpha: false });
  let width = 0, height = 0, ratio = 1;
  let blocks = []; // {name, rows, x, y, columns, width, height}
  let size = LARGEST, tall = 0, wide = 0;
  let scale = 1, left = 0, top = 0;
  let cursor = null; // [block, index]
  let held = null; // the device at the cursor
  let places = new Map(); // device: [block, index]
  let palette = {};
  let dirty = null; // null: all; a Set of names
  let asked = 0;

  const kind = (row) => (colours === "level" ? levelOf(row) : stateOf(row));

  function readPalette() {
    palette = { ground: color("ground"), text: color("text"), line: color("line"), focus: color("focus") };
    for (const name of [...fleet.states, ...fleet.levels]) palette[name] = color(`is-${name}`);
  }

  // --- layout

  function pack(cell, shape) {
    let x = 0, y = 0, shelf = 0, right = 0;
    for (const block of blocks) {
      const most = Math.max(1, Math.floor((width - 2) / cell));
      const columns = Math.min(most, Math.max(1, Math.ceil(Math.sqrt(block.rows.length * shape)), Math.ceil(70 / cell)));
      block.columns = columns;
      block.width = columns * cell;
      block.height = Math.ceil(block.rows.length / columns) * cell + LABEL;
      if (x > 0 && x + block.width > width) { x = 0; y += shelf + GAP; shelf = 0; }
      block.x = x;
      block.y = y;
      x += block.width + GAP;
      shelf = Math.max(shelf, block.height);
      right = Math.max(right, block.x + block.width);
    }
    return [right, y + shelf];
  }

  function lay() {
    const groups = new Map();
    for (const row of fleet.rows.values()) {
      const name = groupOf(row, by);
      if (!groups.has(name)) groups.set(name, []);
      groups.get(name).push(row);
    }
    const order = new Intl.Collator(undefined, { numeric: true });
    blocks = [...groups].sort((a, b) => order.compare(a[0], b[0])).map(([name, rows]) => ({ name, rows: rows.sort((a, b) => (a[0] < b[0] ? -1 : 1)) }));
    const fits = SHAPES_OF_BLOCKS.some.bind(SHAPES_OF_BLOCKS, (shape) => {
      [wide, tall] = pack(size, shape);
      return tall <= height - 8;
    });
    for (size = LARGEST; size > LEAST && !fits(); ) size--;
    if (size === LEAST && !fits()) [wide, tall] = pack(size, 1.7);
    const before = held;
    places = new Map();
    blocks.forEach((block, n) => block.rows.forEach((row, i) => places.set(row[0], [n, i])));
    cursor = before === null ? null : places.get(before) ?? null;
    fit();
    paint();
    count();
  }

  function fit() {
    scale = Math.min(1, tall > 0 ? Math.max(0.25, (height - 8) / tall) : 1);
    left = top = 0;
  }

  function bound() {
    scale = Math.min(MOST_SCALE, Math.max(0.25, scale));
    left = Math.max(Math.min(0, width - wide * scale - 8), Math.min(0, left));
    top = Math.max(Math.min(0, height - tall * scale - 8), Math.min(0, top));
  }

  function zoom(factor, x = width / 2, y = height / 2) {
    const before = scale;
    scale = Math.min(MOST_SCALE, Math.max(0.25, scale * factor));
    left = x - (x - left) * (scale / before);
    top = y - (y - top) * (scale / before);
    bound();
    paint();
  }

  // --- drawing

  function paint(names = null) {
    if (names === null) dirty = null;
    else if (dirty !== null) for (const name of names) dirty.add(name);
    if (!asked) asked = requestAnimationFrame(draw);
  }

  function cell(block, i) {
    const x = block.x + (i % block.columns) * size;
    const y = block.y + LABEL + Math.floor(i / block.columns) * size;
    return [x * scale + left, y * scale + top];
  }

  function drawCell(row, x, y, side) {
    const what = kind(row);
    const shape = side >= 6 ? SHAPES[what] : undefined;
    context.fillStyle = palette[what] || palette.text;
    if (shape === "small") context.fillRect(x + side * 0.22, y + side * 0.22, side * 0.56, side * 0.56);
    else context.fillRect(x, y, side, side);
    if (shape === "hollow") {
      const edge = Math.max(1.5, side * 0.2);
      context.fillStyle = palette.ground;
      context.fillRect(x + edge, y + edge, side - 2 * edge, side - 2 * edge);
    } else if (shape === "dot") {
      context.fillStyle = palette.ground;
      context.fillRect(x + side * 0.38, y + side * 0.38, side * 0.24, side * 0.24);
    } else if (shape === "cross") {
      context.strokeStyle = palette.ground;
      context.lineWidth = Math.max(1.2, side * 0.12);
      context.beginPath();
      context.moveTo(x + side * 0.25, y + side * 0.25);
      context.lineTo(x + side * 0.75, y + side * 0.75);
      context.moveTo(x + side * 0.75, y + side * 0.25);
      context.lineTo(x + side * 0.25, y + side * 0.75);
      context.stroke();
    }
  }

  function draw() {
    asked = 0;
    const changed = dirty;
    dirty = new Set();
    if (!width) return;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    const step = size * scale;
    const gap = step >= 5 ? 1 : 0.5;
    const side = step - gap;
    if (changed !== null) {
      for (const name of changed) {
        const place = places.get(name);
        if (!place) continue;
        const [x, y] = cell(blocks[place[0]], place[1]);
        if (x < -step || y < -step || x > width || y > height) continue;
        context.fillStyle = palette.ground;
        context.fillRect(x - gap / 2, y - gap / 2, step, step);
        drawCell(blocks[place[0]].rows[place[1]], x, y, side);
      }
      mark(side);
      return;
    }
    context.fillStyle = palette.ground;
    context.fillRect(0, 0, width, height);
    for (const block of blocks) {
      const x = block.x * scale + left, y = block.y * scale + top;
      if (x > width || y > height || y + block.height * scale < 0 || x + block.width * scale < 0) continue;
      context.fillStyle = palette.text;
      context.font = "600 12px system-ui, sans-serif";
      context.textBaseline = "alphabetic";
      const room = Math.max(40, block.width * scale - 4);
      const line = clipped(`${block.name}`, ` ${block.rows.length}`, room);
      if (LABEL * scale > 11) context.fillText(line, x, y + Math.min(15, LABEL * scale - 5));
      for (let i = 0; i < block.rows.length; i++) {
        const [cx, cy] = cell(block, i);
        if (cx > -step && cy > -step && cx < width && cy < height) drawCell(block.rows[i], cx, cy, side);
      }
    }
    mark(side);
  }

  function clipped(name, end, most) {
    let line = name + end;
    while (context.measureText(line).width > most && name.length > 1) {
      name = name.slice(0, -1);
      line = name + "…" + end;
    }
    return line;
  }

  function mark(side) {
    if (!cursor || document.activeElement !== canvas) return;
    const [x, y] = cell(blocks[cursor[0]], cursor[1]);
    context.strokeStyle = palette.focus;
    context.lineWidth = 2.5;
    context.strokeRect(x - 2, y - 2, side + 4, side + 4);
  }

  function count() {
    const found = new Map((colours === "level" ? fleet.levels : fleet.states).map((name) => [name, 0]));
    for (const row of fleet.rows.values()) found.set(kind(row), (found.get(kind(row)) ?? 0) + 1);
    fill(legend, [...found].filter(([name, n]) => n || name === "reporting" || name === "normal").map(([name, n]) =>
      h("li", {}, h("a", { href: `#/devices?q=${colours === "level" ? "level" : "state"}:${name}` }, h("i", { class: `dot is-${name}` }), name, h("b", {}, n.toLocaleString())))));
    const all = counted(fleet.rows.size, "device");
    total.textContent = all;
    canvas.setAttribute("aria-label", `Map of ${all} by ${by}: ${[...found].filter(([, n]) => n).map(([name, n]) => `${n} ${name}`).join(", ")}`);
  }

  // --- pointing

  function under(x, y) {
    const wx = (x - left) / scale, wy = (y - top) / scale;
    for (let n = 0; n < blocks.length; n++) {
      const block = blocks[n];
      if (wx < block.x || wx >= block.x + block.width || wy < block.y + LABEL || wy >= block.y + block.height) continue;
      const i = Math.floor((wy - block.y - LABEL) / size) * block.columns + Math.floor((wx - block.x) / size);
      return i < block.rows.length ? [n, i] : null;
    }
    return null;
  }

  function words(row) {
    const at = [text(row, "class"), text(row, "site")].filter(Boolean).join(", ");
    const score = number(row, "score");
    return [shownName(row), `${stateOf(row)} for ${span(now() - time(row, "since"))}${text(row, "why") ? ": " + text(row, "why") : ""}`,
      `level ${levelOf(row)}${score === null ? "" : `, score ${(score / 100).toFixed(2)}`}`, at].filter(Boolean);
  }

  function point(place, x, y) {
    if (!place) { tip.hidden = true; return; }
    const lines = words(blocks[place[0]].rows[place[1]]);
    fill(tip, h("b", {}, lines[0]), lines.slice(1).map((line) => h("div", {}, line)));
    tip.hidden = false;
    tip.style.left = `${Math.max(0, Math.min(x + 14, width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${y + 18 + tip.offsetHeight > height ? Math.max(0, y - tip.offsetHeight - 8) : y + 18}px`;
  }

  const open = (place) => { location.hash = `#/device/${encodeURIComponent(blocks[place[0]].rows[place[1]][0])}`; };
  const pointers = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => { pointers.set(event.pointerId, [event.offsetX, event.offsetY]); moved = 0; canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId);
    if (!before) {
      const place = under(event.offsetX, event.offsetY);
      canvas.classList.toggle("over", Boolean(place));
      point(place, event.offsetX, event.offsetY);
      return;
    }
    const [x, y] = [event.offsetX, event.offsetY];
    const others = [...pointers].filter(([id]) => id !== event.pointerId);
    if (others.length) {
      const [ox, oy] = others[0][1];
      zoom(Math.max(0.5, Math.min(2, Math.hypot(x - ox, y - oy) / Math.max(1, Math.hypot(before[0] - ox, before[1] - oy)))), (x + ox) / 2, (y + oy) / 2);
      moved = 99;
    } else {
      moved += Math.abs(x - before[0]) + Math.abs(y - before[1]);
      left += x - before[0];
      top += y - before[1];
      bound();
      if (moved > 5) { tip.hidden = true; paint(); }
    }
    pointers.set(event.pointerId, [x, y]);
  });
  canvas.addEventListener("pointerup", (event) => {
    pointers.delete(event.pointerId);
    const place = moved <= 5 ? under(event.offsetX, event.offsetY) : null;
    if (place) open(place);
  });
  canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", () => { tip.hidden = true; });
  canvas.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, event.offsetX, event.offsetY); }, { passive: false });

  // --- keys

  function go(place) {
    cursor = place;
    const row = blocks[place[0]].rows[place[1]];
    held = row[0];
    let [x, y] = cell(blocks[place[0]], place[1]);
    const step = size * scale;
    left += Math.max(0, 8 - x) - Math.max(0, x + step + 8 - width);
    top += Math.max(0, 8 - y) - Math.max(0, y + step + 8 - height);
    bound();
    [x, y] = cell(blocks[place[0]], place[1]);
    where.textContent = `${blocks[place[0]].name}: ${words(row).join(", ")}`;
    point(place, x + step, y);
    paint();
  }

  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !blocks.length) return;
    const [n, i] = cursor ?? [0, -1];
    const block = blocks[n];
    const steps = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: block.columns, ArrowUp: -block.columns };
    if (event.key in steps) {
      let to = Math.max(-1, i + (cursor ? steps[event.key] : 1)), at = n;
      if (to >= block.rows.length && at + 1 < blocks.length) { at++; to = 0; }
      else if (to < 0 && at > 0) { at--; to = blocks[at].rows.length - 1; }
      go([at, Math.max(0, Math.min(blocks[at].rows.length - 1, to))]);
    } else if (event.key === "Home") go([0, 0]);
    else if (event.key === "End") go([blocks.length - 1, blocks.at(-1).rows.length - 1]);
    else if (event.key === "Enter" && cursor) open(cursor);
    else if (event.key === "+" || event.key === "=") zoom(1.5);
    else if (event.key === "-") zoom(1 / 1.5);
    else if (event.key === "0") { fit(); paint(); }
    else return;
    event.preventDefault();
  });
  canvas.addEventListener("focus", () => paint());
  canvas.addEventListener("blur", () => { tip.hidden = true; paint(); });

  // --- what changes

  function resized() {
    const box = frame.getBoundingClientRect();
    const [w, t] = [Math.floor(box.width), Math.floor(box.height)];
    if (w === width && t === height && ratio === devicePixelRatio) return;
    [width, height, ratio] = [w, t, devicePixelRatio];
    canvas.width = Math.round(w * ratio);
    canvas.height = Math.round(t * ratio);
    lay();
  }

  function heard(names) {
    if (!fleet.rows.size) { empty(); return; }
    if (frame.classList.contains("none")) { location.reload(); return; }
    if (names === null) { readPalette(); lay(); return; }
    let again = false;
    for (const name of names) {
      const place = places.get(name), row = fleet.rows.get(name);
      if (!place || !row || groupOf(row, by) !== blocks[place[0]].name) { again = true; break; }
      blocks[place[0]].rows[place[1]] = row;
    }
    if (again) lay();
    else if (names.length) { paint(names); count(); }
  }

  function empty() {
    frame.classList.add("none");
    fill(frame, firstSteps());
  }

  readPalette();
  const watcher = new ResizeObserver(resized);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const recolour = () => { readPalette(); paint(); };
  if (fleet.rows.size) watcher.observe(frame);
  else empty();
  dark.addEventListener("change", recolour);
  const end = on(heard);
  return () => { end(); watcher.disconnect(); dark.removeEventListener("change", recolour); cancelAnimationFrame(asked); };
}
