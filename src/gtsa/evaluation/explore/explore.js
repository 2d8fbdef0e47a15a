// The explorer's page. The state is in the address (after #), so links and back and forward work; everything else follows.

const INFERNO = [[0, 0, 4], [31, 12, 72], [85, 15, 109], [136, 34, 106], [186, 54, 85], [227, 89, 51], [249, 140, 10], [249, 201, 50], [252, 255, 164]];
const DEFAULTS = { image: "", at: "0.5,0.5", rotation: "0", show: "similarity", weights: "all", order: "nearest", filter: "", page: "0", overlay: "60", smooth: "1" };
const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const ANGLES = ["0°", "90°", "180°", "270°"];

const byId = (id) => document.getElementById(id);
const count = (number, word) => `${number.toLocaleString("en")} ${word}${number === 1 ? "" : "s"}`;
const listItem = (name, textContent) => Object.assign(document.createElement(name), { textContent });
const controls = byId("controls");
let state = { ...DEFAULTS }, image = null, views = [], requests = new AbortController();

// Answers of the server

async function ask(path, query = {}, signal = undefined) {
  const answer = await fetch(`/api/${path}?${new URLSearchParams(query)}`, { signal }).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("gtsa explore does not answer. If it was stopped, start it again and open the new address.");
  });
  if (answer.status === 403) throw new Error("This page belongs to an earlier start. Open the address that gtsa explore printed.");
  const content = await answer.json().catch(() => ({ error: `The server answers with code ${answer.status}; its terminal says more.` }));
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function complain(error) {
  if (error.name !== "AbortError") Object.assign(byId("problem"), { textContent: error.message, hidden: false });
}

// The state in the address

function readAddress() {
  const given = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  state = Object.fromEntries(Object.entries(DEFAULTS).map(([name, value]) => [name, given[name] ?? value]));
}

function writeAddress(replace) {
  const address = `#${new URLSearchParams(Object.entries(state).filter(([name, value]) => ["image", "at"].includes(name) || value !== DEFAULTS[name]))}`;
  if (address !== location.hash) history[replace ? "replaceState" : "pushState"](null, "", address);
}

function change(news, replace = false) {
  state = { ...state, ...news };
  writeAddress(replace);
  show().catch(complain);
}

// Geometry: a point of a picture after `turns` quarter-turns counter-clockwise, as fractions [y, x]; -turns undoes it

function rotatedPoint([y, x], turns) {
  for (let i = 0; i < ((turns % 4) + 4) % 4; i++) [y, x] = [1 - x, y];
  return [y, x];
}

const centre = ([row, column], [height, width]) => [(row + 0.5) / height, (column + 0.5) / width];
const patchAt = ([y, x], [height, width]) => [Math.min(height - 1, Math.floor(y * height)), Math.min(width - 1, Math.floor(x * width))];
const written = (point) => point.map((value) => value.toFixed(5)).join(",");
const gridOf = (map) => [map.length, map[0].length];

// Drawing

function inferno(value) {
  const position = Math.min(1, Math.max(0, value)) * (INFERNO.length - 1), low = Math.min(INFERNO.length - 2, Math.floor(position));
  return INFERNO[low].map((from, channel) => from + (INFERNO[low + 1][channel] - from) * (position - low));
}

function paint(canvas, map, colourOf, opacity = state.show === "pca" ? Math.sqrt(state.overlay / 100) : state.overlay / 100) {
  const [height, width] = gridOf(map), context = canvas.getContext("2d");
  [canvas.width, canvas.height] = [width, height];
  const pixels = context.createImageData(width, height);
  map.flat().forEach((value, i) => pixels.data.set([...colourOf(value), 255], 4 * i));
  context.putImageData(pixels, 0, 0);
  canvas.style.opacity = opacity;
}

function mark(marker, patch, [height, width]) {
  marker.hidden = !patch;
  const [row, column] = patch ?? [0, 0], [down, right] = [100 / height, 100 / width];
  Object.assign(marker.style, { top: `${row * down}%`, left: `${column * right}%`, height: `${down}%`, width: `${right}%` });
}

function picture(frame, index, rotation, side, grid) {
  const source = `/image?${new URLSearchParams({ image: index, rotation, side })}`, img = frame.querySelector("img");
  if (img.getAttribute("src") !== source) img.src = source;
  frame.style.aspectRatio = `${grid[1]} / ${grid[0]}`;
}

const copyOf = (id) => byId(id).content.firstElementChild.cloneNode(true);

// A picture on which patches are chosen

class Stage {
  constructor(view) {
    this.view = view;
    this.element = copyOf("stage");
    [this.frame, this.canvas, this.marker, this.hover, this.caption] = [".frame", "canvas", ".marker", ".hover", "figcaption"].map((name) => this.element.querySelector(name));
    this.frame.addEventListener("click", (event) => this.choose(this.under(event)));
    this.frame.addEventListener("keydown", (event) => this.move(event));
    this.frame.addEventListener("pointermove", (event) => this.point(this.under(event)));
    this.frame.addEventListener("pointerleave", () => this.point(null));
  }

  under(event) {
    const box = this.frame.getBoundingClientRect(), inside = (value) => Math.min(0.999999, Math.max(0, value));
    return patchAt([inside((event.clientY - box.top) / box.height), inside((event.clientX - box.left) / box.width)], this.grid);
  }

  choose(patch, replace = false) {
    change({ at: written(rotatedPoint(centre(patch, this.grid), -this.rotation)), page: "0" }, replace);
  }

  move(event) {
    const step = ARROWS[event.key];
    if (!step || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.patch = this.patch.map((value, axis) => Math.min(this.grid[axis] - 1, Math.max(0, value + step[axis])));
    mark(this.marker, this.patch, this.grid); // the next key may come before the answer
    this.choose(this.patch, true);
  }

  point(patch) {
    mark(this.hover, patch, this.grid);
    const value = patch && this.map[patch[0]][patch[1]];
    this.view.readout.textContent = patch ? `row ${patch[0] + 1}, column ${patch[1] + 1}${typeof value === "number" ? `: ${value.toFixed(3)}` : ""}` : "";
  }

  update(map, patch, rotation, caption, colourOf) {
    Object.assign(this, { map, patch, rotation, grid: gridOf(map) });
    picture(this.frame, image.index, rotation, 960, this.grid);
    this.frame.style.maxWidth = `${(70 * this.grid[1]) / this.grid[0]}vh`;
    this.frame.setAttribute("aria-label", `${image.name}, ${caption} Chosen patch: row ${patch[0] + 1} of ${this.grid[0]}, column ${patch[1] + 1} of ${this.grid[1]}.`);
    paint(this.canvas, map, colourOf);
    mark(this.marker, patch, this.grid);
    this.caption.textContent = caption;
  }
}

// One set of weights: the chosen image, its numbers, and the other images

class View {
  constructor(network, number) {
    this.number = number;
    this.element = copyOf("network");
    const find = (name) => this.element.querySelector(name);
    [this.box, this.legend, this.readout, this.numbers, this.title, this.tiles, this.none, this.pages] = [".stages", ".legend", ".readout", ".numbers", ".others h3", ".tiles", ".none", ".pages"].map(find);
    find(".chosen h3").textContent = `${network.name} (${network.model})`;
    this.stages = [0, 1, 2, 3].map(() => new Stage(this));
    this.box.append(...this.stages.map((stage) => stage.element));
    paint(find(".ramp"), [Array.from({ length: 128 }, (_, i) => i / 127)], inferno, 1);
    for (const [name, step] of [[".earlier", -1], [".later", 1]]) find(name).addEventListener("click", () => change({ page: String(Number(state.page) + step) }));
  }

  // `lowest` gives the least similarity on this side's maps, and resolves to the least of all sides: they share one scale
  async show(signal, lowest) {
    this.element.classList.add("waiting");
    try {
      const { order, filter, page, show, rotation } = state, [y, x] = state.at.split(",");
      const query = { network: this.number, image: image.index, y, x, rotation };
      const look = await ask("look", query, signal).catch((error) => (lowest(Infinity), Promise.reject(error))); // the other side goes on
      this.low = await lowest(Math.min(...look.upright.flat(), ...(look.rotated?.map.flat() ?? [])));
      if (state.show === "similarity") this.drawChosen(look, look.upright, look.rotated?.map, this.heat());
      const gallery = await ask("gallery", { ...query, order, filter, page, show }, signal);
      if (state.show === "pca") this.drawChosen(look, gallery.upright, gallery.rotated, (colour) => colour, gallery.variance);
      this.drawOthers(gallery);
      return gallery;
    } finally {
      if (!signal.aborted) this.element.classList.remove("waiting"); // else the next request waits
    }
  }

  heat = () => (value) => inferno((value - this.low) / Math.max(1e-6, 1 - this.low));

  drawChosen(look, upright, rotated, colourOf, variance) {
    const turns = Number(state.rotation), pca = state.show === "pca", angle = ANGLES[turns];
    const shown = [[upright, look.patch, 0, pca ? "Principal components as colours." : "Cosine similarity with the chosen patch."]];
    if (rotated) shown.push([rotated, look.rotated.patch, turns, pca ? `Rotated by ${angle}, same components.` : `Rotated by ${angle}: similarity with the same patch, rotated.`]);
    if (rotated && !pca) {
      shown.push([look.rotated.against_upright, look.rotated.patch, turns, "Rotated: similarity with the patch before the rotation."]);
      shown.push([look.rotated.same_place, look.rotated.patch, turns, "Each patch, similarity before and after the rotation."]);
    }
    const ratios = shown.map(([map]) => map[0].length / map.length);
    this.stages.forEach((stage, i) => {
      stage.element.hidden = i >= shown.length;
      if (i < shown.length) stage.update(...shown[i], colourOf);
      const share = Math.min(0.7, Math.max(0.3, ratios[i] / (ratios[i] + ratios[i ^ 1]))); // two in a row have one height
      stage.element.style.width = shown.length > 1 ? `calc(${100 * share}% - .4rem)` : "100%";
    });
    const shared = byId("networks").classList.contains("two") ? ", one scale for both weights" : "";
    this.legend.querySelector(".low").textContent = pca ? `3 components: ${(100 * variance).toFixed(0)} % of variance` : this.low.toFixed(2);
    this.legend.querySelector(".high").textContent = pca ? "" : `1.00${shared}`;
    this.legend.querySelector(".ramp").hidden = pca;
    this.drawNumbers(look.rotated);
  }

  drawNumbers(rotated) {
    if ((this.numbers.hidden = !rotated)) return;
    const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 1 : 0)} %`;
    const rows = [
      [rotated.here.toFixed(3), "similarity of the chosen patch before and after the rotation (1: invariant)"],
      [rotated.mean.toFixed(3), `the same, mean of all patches (near 1: invariant; between different places it is ${rotated.elsewhere.toFixed(3)})`],
      [percent(rotated.found_again), "of patches are most similar to the same place after the rotation (100 %: every place is recognised)"],
      [rotated.agreement === null ? "–" : rotated.agreement.toFixed(3), "correlation of the chosen patch’s similarity maps before and after (1: the map rotates with the image)"],
    ];
    this.numbers.replaceChildren(...rows.flatMap((row) => row.map((text, i) => listItem(i ? "dd" : "dt", text))));
  }

  drawOthers({ tiles, images, page, pages, nearest }) {
    const turns = nearest && state.rotation !== "0" ? `, rotated by ${ANGLES[state.rotation]}` : "";
    this.title.textContent = nearest ? `Nearest images by the chosen patch${turns}` : "Images by name";
    this.none.hidden = tiles.length > 0;
    this.none.textContent = state.filter ? "No image with features has such a name." : "No other image has features yet.";
    this.tiles.replaceChildren(...tiles.map((tile) => this.drawTile(tile)));
    this.pages.querySelector("span").textContent = `page ${page + 1} of ${Math.max(1, pages)}, ${count(images, nearest ? "other image" : "image")}`;
    [".earlier", ".later"].forEach((name, i) => (this.pages.querySelector(name).disabled = i ? page + 1 >= pages : page < 1));
  }

  drawTile(tile) {
    const element = copyOf("tile"), frame = element.querySelector(".frame"), similarity = tile.similarity.toFixed(3);
    picture(frame, tile.image, 0, 320, tile.grid);
    paint(frame.querySelector("canvas"), tile.map ?? tile.colours, tile.map ? this.heat() : (colour) => colour);
    mark(frame.querySelector(".marker"), tile.best, tile.grid);
    element.querySelector(".value").textContent = similarity;
    element.querySelector(".title").textContent = element.title = tile.name;
    element.setAttribute("aria-label", `${tile.name}, similarity ${similarity} at row ${tile.best[0] + 1}, column ${tile.best[1] + 1}. Explore from there.`);
    element.addEventListener("click", (event) => {
      const box = frame.getBoundingClientRect(), point = [(event.clientY - box.top) / box.height, (event.clientX - box.left) / box.width];
      const inside = event.detail > 0 && point.every((value) => value >= 0 && value < 1); // not by the keyboard, not on the name
      change({ image: tile.name, at: written(centre(inside ? patchAt(point, tile.grid) : tile.best, tile.grid)), page: "0" });
    });
    return element;
  }
}

// The page

async function show() {
  requests.abort();
  requests = new AbortController();
  const { signal } = requests;
  if (image?.name !== state.image || !state.image) image = await locate(state.image, signal);
  byId("problem").hidden = true;
  for (const input of controls.elements) {
    if (input.type === "radio") input.checked = input.value === state[input.name];
    else if (input.type === "checkbox") input.checked = state[input.name] === "1";
    else if (input.name && input !== document.activeElement) input.value = state[input.name];
  }
  document.body.classList.toggle("smooth", state.smooth === "1");
  [byId("previous").disabled, byId("next").disabled] = [image.previous === null, image.next === null];
  byId("name").textContent = image.name;
  document.title = `${image.name} – gtsa explore`;
  const wanted = views.filter((view) => String(view.number) === state.weights), visible = wanted.length ? wanted : views;
  views.forEach((view) => (view.element.hidden = !visible.includes(view)));
  byId("networks").classList.toggle("two", visible.length > 1);
  const lowest = meeting(visible.length);
  const [first] = await Promise.all(visible.map((view) => view.show(signal, lowest)));
  const patch = visible[0].stages[0].patch, best = first.tiles[0];
  byId("announcement").textContent = `Patch in row ${patch[0] + 1}, column ${patch[1] + 1}.${best && first.nearest ? ` Nearest: ${best.name}, ${best.similarity.toFixed(2)}.` : ""}`;
}

// A function that each of `sides` calls with a number, and that resolves to the least of all when the last has called it

function meeting(sides) {
  const numbers = [];
  let settle;
  const all = new Promise((resolve) => (settle = resolve));
  return (number) => (numbers.push(number) === sides && settle(Math.min(...numbers)), all);
}

async function locate(name, signal) {
  const answer = await ask("find", name ? { name } : {}, signal);
  if (answer.image === null) throw new Error(name ? `There is no image ${name} in these data. Choose another one below.` : "No image can be read; see the list of those left out.");
  state.image = answer.name;
  writeAddress(true);
  return { ...answer, index: answer.image };
}

async function follow() {
  let ready = -1;
  for (;;) {
    const { images, ready: counts, left_out: leftOut, finished, error } = await ask("progress");
    const least = Math.min(...counts);
    const searched = `${least.toLocaleString("en")} can be searched${finished ? "" : " so far"}`, bad = leftOut.length ? `, ${leftOut.length.toLocaleString("en")} cannot be read` : "";
    byId("progress").textContent = `${count(images, "image")}: ${searched}${bad}. ${error}`;
    byId("left-out").hidden = !leftOut.length;
    byId("left-out").querySelector("ul").replaceChildren(...leftOut.map(({ name, reason }) => listItem("li", `${name}: ${reason}`)));
    if (image && least !== ready && (ready < 0 || ready < 12 || finished)) show().catch(complain); // later a page is full
    ready = least;
    if (finished || error) return;
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

controls.addEventListener("submit", (event) => event.preventDefault());
controls.addEventListener("input", ({ target }) => {
  const value = target.type === "checkbox" ? (target.checked ? "1" : "0") : target.value;
  const drawing = ["overlay", "smooth"].includes(target.name); // no other images, no step back
  if (target.name) change({ [target.name]: value, ...(drawing ? {} : { page: "0" }) }, drawing || target.name === "filter");
});
for (const name of ["previous", "next"]) byId(name).addEventListener("click", () => change({ image: image[name], page: "0" }));
window.addEventListener("popstate", () => (readAddress(), show().catch(complain)));

async function begin() {
  const session = await ask("session");
  byId("summary").textContent = `${session.data}, long side ${session.size} px`;
  views = session.networks.map((network, number) => new View(network, number));
  byId("networks").append(...views.map((view) => view.element)), (byId("weights").hidden = views.length < 2);
  readAddress();
  await show().catch(complain).then(follow);
}

begin().catch(complain);
