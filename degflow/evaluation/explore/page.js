"use strict";

const NAMES = ["hr", "lr", "bicubic", "plain"];
const $ = (id) => document.getElementById(id);
const view = {
  ready: null,  // a promise: kept once `about` is the server's first answer
  about: null, photograph: null, at: null, zoom: 2, middle: null, cursor: null, answer: null, errors: {},
};
const canvases = {};  // name -> the canvas on the page, of the size of its place
const pictures = {};  // name -> a canvas of the picture's own size, to draw from and read values from
const overview = new Image();
let asking = false;
let askAgain = false;

// ---- asking the server

async function ask(path, options) {
  let answer;
  try {
    answer = await (await fetch(path, options)).json();
  } catch {
    throw new Error("The server does not answer. Is degflow explore still running in its terminal?");
  }
  if (answer.error) throw new Error(answer.error);
  return answer;
}

// An error of opening a file stays until another one is opened, whatever pictures arrive meanwhile.
function say(about, error) {
  view.errors[about] = error ? error.message : "";
  $("error").textContent = [view.errors.opening, view.errors.pictures].filter(Boolean).join(" ");
  $("error").hidden = !$("error").textContent;
}

// In steps of 0.05, and both ends of the range, whatever they are.
function chosenScale() {
  const { low, high } = view.about;
  const value = Number($("scale").value);
  return value >= high ? high : Math.min(Math.max(Number((Math.round(value * 20) / 20).toFixed(2)), low), high);
}

function query() {
  const { photograph, at } = view;
  return new URLSearchParams({
    photograph: photograph.identity, x: at.x, y: at.y, scale: chosenScale(), seed: $("seed").value,
    spread: $("spread").value,
  });
}

// One question is under way at a time; what changed meanwhile is asked after it.
async function update() {
  if (!view.photograph || !$("seed").reportValidity()) return;
  askAgain = true;
  if (asking) return;
  asking = true;
  while (askAgain) {
    askAgain = false;
    for (const name of NAMES) $(name).classList.add("stale");
    const asked = query();
    try {
      const answer = await ask(`/pictures?${asked}`);
      if (asked.get("photograph") === view.photograph.identity) await show(answer, asked);
      say("pictures", null);
    } catch (error) {
      say("pictures", error);
    }
  }
  asking = false;
  for (const name of NAMES) $(name).classList.remove("stale");
}

async function show(answer, asked) {
  const loaded = await Promise.all(answer.pictures.map(async (picture) => {
    const image = new Image();
    image.src = picture.png;
    await image.decode();
    return image;
  }));
  const { left, top, width, height } = answer.window;
  const same = (key) => view.answer.window[key] === answer.window[key];
  const moved = !view.answer || !["left", "top", "width", "height"].every(same);
  if (moved || !view.middle) view.middle = { x: width / 2, y: height / 2 };
  if (moved) view.cursor = null;
  view.answer = answer;
  answer.pictures.forEach((picture, n) => {
    const kept = document.createElement("canvas");
    [kept.width, kept.height] = [width, height];
    kept.getContext("2d", { willReadFrequently: true }).drawImage(loaded[n], 0, 0);
    pictures[picture.name] = kept;
    caption(picture);
  });
  const { photograph } = view;
  const place = answer.whole
    ? `The whole photograph, ${width} × ${height} pixels.`
    : `A window of ${width} × ${height} pixels at (${left}, ${top}) of ${photograph.width} × ${photograph.height}.`;
  $("shown").textContent = `${place} Made in ${answer.seconds.toFixed(1)} s.`;
  $("pair").href = `/pair?${asked}`;
  $("pair").hidden = $("pair-note").hidden = false;
  plot(answer.pictures);
  drawOverview();
  draw();
  document.body.dataset.shown = asked;  // whose pictures are on the page, for the tests
}

// ---- pictures

function caption(picture) {
  const figure = $(picture.name);
  figure.querySelector("b").textContent = picture.title;
  figure.querySelector(".about").textContent = picture.caption;
  figure.querySelector(".psnr").textContent = picture.psnr === null ? "" : `${picture.psnr.toFixed(1)} dB to HR`;
}

function makeFigure(name) {
  const figure = $(name);
  const canvas = figure.appendChild(document.createElement("canvas"));
  canvas.tabIndex = 0;
  canvas.setAttribute("aria-label", `${name} picture; the arrow keys move it`);
  const text = figure.appendChild(document.createElement("figcaption"));
  const title = text.appendChild(document.createElement("div"));
  title.className = "title";
  title.appendChild(document.createElement("b"));
  title.appendChild(document.createElement("span")).className = "psnr";
  text.appendChild(document.createElement("p")).className = "about";
  text.appendChild(document.createElement("div")).className = "value";
  canvases[name] = canvas;
  listen(canvas);
}

// Pixels of the screen for one of the page; zoom counts pixels of the screen.
const density = () => window.devicePixelRatio || 1;

function draw() {
  if (!view.answer) return;
  const { width, height } = view.answer.window;
  const { zoom } = view;
  const sides = [canvases.hr.clientWidth, canvases.hr.clientHeight].map((side) => Math.round(side * density()));
  const clamp = (at, side, length) => {
    const half = side / zoom / 2;
    return 2 * half >= length ? length / 2 : Math.min(Math.max(at, half), length - half);
  };
  view.middle = { x: clamp(view.middle.x, sides[0], width), y: clamp(view.middle.y, sides[1], height) };
  const left = Math.round(sides[0] / 2 - view.middle.x * zoom);
  const top = Math.round(sides[1] / 2 - view.middle.y * zoom);
  view.corner = { left, top };
  for (const name of NAMES) {
    const canvas = canvases[name];
    [canvas.width, canvas.height] = sides;
    const context = canvas.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(pictures[name], left, top, width * zoom, height * zoom);
    if (view.cursor) drawCursor(context, name);
    else $(name).querySelector(".value").textContent = "";
  }
}

function drawCursor(context, name) {
  const { x, y } = view.cursor;
  const { zoom, corner } = view;
  const [left, top] = [corner.left + x * zoom, corner.top + y * zoom];
  for (const [colour, width] of [["#000a", 3], ["#fff", 1]]) {
    context.strokeStyle = colour;
    context.lineWidth = width;
    context.beginPath();
    const [cx, cy] = [left + zoom / 2, top + zoom / 2];
    for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
      const gap = zoom / 2 + 4;
      context.moveTo(cx + dx * gap, cy + dy * gap);
      context.lineTo(cx + dx * (gap + 14), cy + dy * (gap + 14));
    }
    context.stroke();
  }
  const [red, green, blue] = pictures[name].getContext("2d").getImageData(x, y, 1, 1).data;
  const { left: from, top: down } = view.answer.window;
  $(name).querySelector(".value").textContent = `(${from + x}, ${down + y}): ${red} ${green} ${blue}`;
}

function listen(canvas) {
  let held = null;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    const at = (page, start, corner) => Math.floor(((page - start) * density() - corner) / view.zoom);
    return { x: at(event.clientX, box.left, view.corner.left), y: at(event.clientY, box.top, view.corner.top) };
  };
  canvas.addEventListener("pointerdown", (event) => {
    held = { x: event.clientX, y: event.clientY };
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", () => { held = null; });
  canvas.addEventListener("pointercancel", () => { held = null; });
  canvas.addEventListener("pointermove", (event) => {
    if (!view.answer) return;
    if (held) {
      move((held.x - event.clientX) * density() / view.zoom, (held.y - event.clientY) * density() / view.zoom);
      held = { x: event.clientX, y: event.clientY };
      draw();
    }
    const { x, y } = place(event);
    const { width, height } = view.answer.window;
    view.cursor = x >= 0 && y >= 0 && x < width && y < height ? { x, y } : null;
    draw();
  });
  canvas.addEventListener("pointerleave", () => { view.cursor = null; draw(); });
  canvas.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-8, 0], ArrowRight: [8, 0], ArrowUp: [0, -8], ArrowDown: [0, 8] }[event.key];
    if (!step) return;
    event.preventDefault();
    move(...step);
    draw();
  });
}

function move(right, down) {
  if (view.middle) view.middle = { x: view.middle.x + right, y: view.middle.y + down };
}

function drawOverview() {
  const canvas = $("overview");
  const { photograph, answer } = view;
  [canvas.width, canvas.height] = [overview.naturalWidth, overview.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(overview, 0, 0);
  if (!answer || answer.whole) return;
  const ratio = overview.naturalWidth / photograph.width;
  const { left, top, width, height } = answer.window;
  for (const [colour, line] of [["#000", 6], ["#fff", 3]]) {
    context.strokeStyle = colour;
    context.lineWidth = line;
    context.strokeRect(left * ratio, top * ratio, width * ratio, height * ratio);
  }
}

// ---- spectrum

function plot(shown) {
  const svg = $("spectrum");
  const add = (kind, attributes, text) => {
    const node = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", kind));
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
  };
  svg.replaceChildren();
  const curves = shown.filter((picture) => picture.spectrum);
  if (!curves.length) {
    add("text", { x: 10, y: 24 }, "The picture is too small for a spectrum.");
    return;
  }
  const box = { left: 34, right: 292, top: 8, bottom: 166 };
  const values = curves.flatMap((picture) => picture.spectrum);
  const low = Math.floor(Math.min(...values) / 20) * 20;
  const high = Math.max(low + 20, Math.ceil(Math.max(...values) / 20) * 20);
  const across = (frequency) => box.left + (box.right - box.left) * frequency / 0.5;
  const up = (power) => box.bottom - (box.bottom - box.top) * (power - low) / (high - low);
  for (let power = low; power <= high; power += 20) {
    add("line", { class: "grid", x1: box.left, x2: box.right, y1: up(power), y2: up(power) });
    add("text", { x: box.left - 5, y: up(power) + 4, "text-anchor": "end" }, power);
  }
  for (const frequency of [0, 0.1, 0.2, 0.3, 0.4, 0.5]) {
    const anchor = frequency < 0.5 ? "middle" : "end";
    add("text", { x: across(frequency), y: box.bottom + 15, "text-anchor": anchor }, frequency);
  }
  add("text", { x: (box.left + box.right) / 2, y: 196, "text-anchor": "middle" }, "cycles per pixel");
  add("text", { x: box.left + 6, y: box.top + 14 }, "dB");
  for (const { name, spectrum } of curves) {
    const ring = 0.5 / spectrum.length;
    const points = spectrum.map((power, n) => [across((n + 0.5) * ring).toFixed(1), up(power).toFixed(1)]);
    add("polyline", { class: name, points: points.join(" ") });
  }
}

// ---- controls

const HINT = $("photograph").textContent;

function name(photograph) {
  const told = photograph && `${photograph.name}, ${photograph.width} × ${photograph.height} pixels`;
  $("photograph").textContent = told || HINT;
}

async function take(photograph) {
  view.photograph = photograph;
  view.at = { x: photograph.width / 2, y: photograph.height / 2 };
  view.answer = view.middle = view.cursor = null;
  overview.src = photograph.overview;
  await overview.decode();
  name(photograph);
  document.body.dataset.photograph = photograph.identity;
  delete document.body.dataset.shown;
  const { window: side } = view.about;
  $("overview").hidden = false;
  $("overview-note").hidden = photograph.width <= side && photograph.height <= side;
  drawOverview();
  await update();
}

async function open(file) {
  if (!file) return;
  try {
    await view.ready;  // a file may be quicker than the server's first answer
    const most = view.about.most_bytes;
    if (file.size > most) throw new Error(`${file.size} bytes, more than the ${most} that are accepted`);
    say("opening", null);
    $("photograph").textContent = `Opening ${file.name} ...`;
    await take(await ask(`/photographs?${new URLSearchParams({ name: file.name })}`, { method: "POST", body: file }));
  } catch (error) {
    name(view.photograph);
    say("opening", new Error(`${file.name}: ${error.message}`));
  }
}

function showValues() {
  $("scale-value").textContent = `×${chosenScale().toFixed(2)}`;
  $("spread-value").textContent = Number($("spread").value).toFixed(2);
}

function setZoom(zoom) {
  view.zoom = zoom;
  for (const button of $("zoom").children) button.setAttribute("aria-pressed", Number(button.dataset.zoom) === zoom);
  draw();
}

function prepare(about) {
  view.about = about;
  const scale = $("scale");
  [scale.min, scale.max] = [about.low, about.high];
  scale.value = about.low + (about.high - about.low) / 2;
  const ends = $("scale-ends").children;
  [ends[0].textContent, ends[1].textContent] = [`×${about.low}`, `×${about.high}`];
  $("model").textContent = `model ${about.model}`;
  for (const id of ["seed", "spread", "again"]) $(id).disabled = !about.draws;
  $("draws-nothing").hidden = about.draws;
  showValues();
}

async function begin() {
  NAMES.forEach(makeFigure);
  for (const id of ["scale", "spread"]) $(id).addEventListener("input", () => { showValues(); update(); });
  $("seed").addEventListener("change", update);
  $("again").addEventListener("click", () => {
    if (!$("seed").reportValidity()) return;
    $("seed").value = String((BigInt($("seed").value || 0) + 1n) % 10n ** 18n);
    update();
  });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  for (const button of $("zoom").children) {
    button.addEventListener("click", () => setZoom(Number(button.dataset.zoom)));
  }
  $("file").addEventListener("change", ({ target }) => { open(target.files[0]); target.value = ""; });
  $("overview").addEventListener("click", (event) => {
    const box = $("overview").getBoundingClientRect();
    const fit = Math.min(box.width / overview.naturalWidth, box.height / overview.naturalHeight);
    const ratio = fit * overview.naturalWidth / view.photograph.width;
    const at = (page, start, side, length) => (page - start - (side - length * ratio) / 2) / ratio;
    view.at = {
      x: at(event.clientX, box.left, box.width, view.photograph.width),
      y: at(event.clientY, box.top, box.height, view.photograph.height),
    };
    update();
  });
  addEventListener("dragover", (event) => { event.preventDefault(); document.body.classList.add("dropping"); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) document.body.classList.remove("dropping"); });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    open(event.dataTransfer.files[0]);
  });
  addEventListener("resize", draw);
  view.ready = ask("/about").then(prepare);
  try {
    await view.ready;
    if (view.about.photograph) await take(view.about.photograph);
  } catch (error) {
    say("pictures", error);
  }
}

begin();
