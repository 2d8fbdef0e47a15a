// The charts of core/chart.py: values under the pointer, zoom by dragging, both by keyboard too. Paper gets what is closed.
// Without this script the charts are there as they are; nothing is loaded from anywhere.
"use strict";
(() => {
  const WIDTH = 480, HEIGHT = 270, LEFT = 60, RIGHT = 12, TOP = 12, BOTTOM = 40, HUES = 8;
  const INNER = WIDTH - LEFT - RIGHT, SHORT = 20, LEAST = 8; // px of the plot, points with dots, px of a drag

  const svgNode = (name, values, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(values)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const htmlNode = (name, kind, text) => {
    const node = document.createElement(name);
    node.className = kind;
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const number = (value) => {
    const size = Math.abs(value), short = Number(value.toPrecision(4));
    if (size > 0 && size < 0.001) return short.toExponential();
    return size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(short);
  };
  const ticks = (low, high) => {
    const span = high - low;
    if (!(span > 0)) return [low];
    const power = 10 ** Math.floor(Math.log10(span / 5));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => span / s <= 6);
    const values = [];
    for (let k = Math.ceil(low / step - 1e-9); k <= Math.floor(high / step + 1e-9); k++) values.push(k * step);
    return values;
  };

  class Chart {
    constructor(figure) {
      Object.assign(this, JSON.parse(figure.dataset.chart));
      this.plot = figure.querySelector(".plot");
      this.svg = this.plot.querySelector("svg");
      const xs = this.lines.flatMap((line) => line.points.map((p) => p[0]));
      this.xs = [...new Set(xs)].sort((a, b) => a - b);
      this.whole = [this.xs[0], this.xs[this.xs.length - 1]];
      this.tip = htmlNode("div", "tip");
      this.tip.setAttribute("role", "status");
      this.reset = htmlNode("button", "reset screen", "Reset zoom");
      this.reset.type = "button";
      this.plot.append(this.tip, this.reset);
      this.cursor = null; // index into xs
      this.listen();
      this.zoom(...this.whole);
    }

    listen() {
      const { svg } = this;
      svg.addEventListener("pointerdown", (event) => {
        if (event.button) return;
        this.pressed = this.at(event);
        svg.setPointerCapture(event.pointerId);
      });
      svg.addEventListener("pointermove", (event) => this.point(this.at(event)));
      svg.addEventListener("pointerup", (event) => this.release(this.at(event)));
      svg.addEventListener("pointercancel", () => this.release(null));
      svg.addEventListener("pointerleave", () => this.pressed === undefined && this.leave());
      svg.addEventListener("blur", () => this.leave());
      svg.addEventListener("dblclick", () => this.zoom(...this.whole));
      svg.addEventListener("keydown", (event) => this.key(event));
      this.reset.addEventListener("click", () => {
        this.zoom(...this.whole);
        svg.focus();
      });
    }

    // px of the drawing, wherever and however large it is shown
    at(event) {
      const box = this.svg.getBoundingClientRect();
      const px = ((event.clientX - box.left) / box.width) * WIDTH;
      return Math.min(WIDTH - RIGHT, Math.max(LEFT, px));
    }
    px(x) { return LEFT + (INNER * (x - this.x0)) / (this.x1 - this.x0 || 1); }
    py(y) { return HEIGHT - BOTTOM - ((HEIGHT - TOP - BOTTOM) * (y - this.y0)) / (this.y1 - this.y0); }
    value(px) { return this.x0 + ((px - LEFT) / INNER) * (this.x1 - this.x0); }

    point(px) {
      const x = this.value(px);
      let nearest = null;
      this.xs.forEach((candidate, i) => {
        const inside = candidate >= this.x0 && candidate <= this.x1;
        if (inside && (nearest === null || Math.abs(candidate - x) < Math.abs(this.xs[nearest] - x))) nearest = i;
      });
      this.show(nearest, px);
    }

    release(px) {
      const from = this.pressed;
      this.pressed = undefined;
      if (from !== undefined && px !== null && Math.abs(px - from) >= LEAST) {
        const ends = [this.value(from), this.value(px)].sort((a, b) => a - b);
        if (this.xs.filter((x) => x >= ends[0] && x <= ends[1]).length >= 2) this.zoom(...ends);
      }
      this.draw();
    }

    leave() {
      this.cursor = null;
      this.tip.replaceChildren();
      this.draw();
    }

    key(event) {
      const inside = this.xs.map((x, i) => [x, i]).filter(([x]) => x >= this.x0 && x <= this.x1).map(([, i]) => i);
      const now = Math.max(0, inside.indexOf(this.cursor));
      const moves = { ArrowLeft: now - 1, ArrowRight: this.cursor === null ? 0 : now + 1, Home: 0, End: inside.length - 1 };
      if (event.key in moves) {
        this.show(inside[Math.min(inside.length - 1, Math.max(0, moves[event.key]))]);
      } else if (event.key === "+" || event.key === "-") {
        const centre = this.cursor === null ? (this.x0 + this.x1) / 2 : this.xs[this.cursor];
        const half = ((this.x1 - this.x0) / 2) * (event.key === "+" ? 0.5 : 2);
        const ends = [Math.max(this.whole[0], centre - half), Math.min(this.whole[1], centre + half)];
        if (this.xs.filter((x) => x >= ends[0] && x <= ends[1]).length >= 2) this.zoom(...ends);
      } else if (event.key === "Escape") {
        this.zoom(...this.whole);
      } else {
        return;
      }
      event.preventDefault();
    }

    // Shows the part from x0 to x1; the vertical range is that of the values in it, and of those to include.
    zoom(x0, x1) {
      [this.x0, this.x1] = [x0, x1];
      const values = this.lines
        .flatMap((line) => line.points.filter((p) => p[0] >= x0 && p[0] <= x1).flatMap((p) => p.slice(1)))
        .filter((v) => v !== null)
        .concat(this.include);
      const [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
      const room = 0.06 * (high - low) || 0.5 * Math.abs(high) || 0.5;
      [this.y0, this.y1] = [low - room, high + room];
      this.reset.hidden = x0 === this.whole[0] && x1 === this.whole[1];
      this.draw();
    }

    show(index, px) {
      if (index === null || index === undefined) return;
      this.cursor = index;
      const x = this.xs[index];
      const rows = [htmlNode("b", "", `${this.x} ${number(x)}`)];
      this.lines.forEach((line, n) => {
        const p = line.points.find((candidate) => candidate[0] === x);
        if (!p || p[1] === null) return;
        const row = htmlNode("div", `hue-${(n % HUES) + 1}`);
        const range = p[2] === null || p[3] === null ? "" : ` (${number(p[2])} to ${number(p[3])})`;
        row.append(htmlNode("span", "hue", line.name), htmlNode("span", "", `${number(p[1])}${this.unit}${range}`));
        rows.push(row);
      });
      this.tip.replaceChildren(...rows);
      const right = this.px(x) > LEFT + INNER / 2; // beside the cursor, on the side with more room
      this.tip.style.left = right ? "auto" : `${((this.px(x) + 10) / WIDTH) * 100}%`;
      this.tip.style.right = right ? `${((WIDTH - this.px(x) + 10) / WIDTH) * 100}%` : "auto";
      this.draw(px);
    }

    draw(px) {
      const nodes = [];
      const rule = (kind, y) => svgNode("line", { class: kind, x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y });
      const text = (x, y, anchor, words) => svgNode("text", { x, y, "text-anchor": anchor }, words);
      for (const y of ticks(this.y0, this.y1)) {
        nodes.push(rule("grid", this.py(y)), text(LEFT - 6, this.py(y) + 4, "end", number(y) + this.unit));
      }
      for (const x of ticks(this.x0, this.x1)) {
        nodes.push(text(this.px(x), HEIGHT - BOTTOM + 17, "middle", number(x)));
      }
      nodes.push(text(LEFT + INNER / 2, HEIGHT - 5, "middle", this.x));
      this.lines.forEach((line, n) => nodes.push(this.curve(line, n)));
      if (this.level !== null) nodes.push(rule("level", this.py(this.level)));
      if (this.cursor !== null) {
        const x = this.px(this.xs[this.cursor]);
        nodes.push(svgNode("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: HEIGHT - BOTTOM }));
      }
      if (this.pressed !== undefined && px !== undefined) {
        const x = Math.min(px, this.pressed), width = Math.abs(px - this.pressed);
        nodes.push(svgNode("rect", { class: "chosen", x, width, y: TOP, height: HEIGHT - TOP - BOTTOM }));
      }
      this.svg.replaceChildren(...nodes);
    }

    curve(line, n) {
      const group = svgNode("g", { class: `hue-${(n % HUES) + 1}` });
      const inside = line.points.filter((p) => p[0] >= this.x0 && p[0] <= this.x1);
      const banded = inside.filter((p) => p[2] !== null && p[3] !== null);
      if (banded.length > 1) {
        const corner = (p, i) => `${this.px(p[0])},${this.py(p[i])}`;
        const points = [...banded.map((p) => corner(p, 3)), ...banded.reverse().map((p) => corner(p, 2))];
        group.append(svgNode("polygon", { class: "band", points: points.join(" ") }));
      }
      let path = "", pen = "M";
      for (const p of inside) {
        path += p[1] === null ? "" : `${pen}${this.px(p[0])},${this.py(p[1])}`;
        pen = p[1] === null ? "M" : "L";
      }
      group.append(svgNode("path", { class: "curve", d: path }));
      const marked = this.cursor === null ? null : this.xs[this.cursor];
      for (const p of inside) {
        if (p[1] !== null && (inside.length <= SHORT || p[0] === marked)) {
          const r = p[0] === marked ? 5 : 3;
          group.append(svgNode("circle", { class: "dot", cx: this.px(p[0]), cy: this.py(p[1]), r }));
        }
      }
      return group;
    }
  }

  for (const figure of document.querySelectorAll("figure.chart")) new Chart(figure);

  let opened = []; // for paper: all but the values of charts, which their curves show
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")].filter((details) => !details.closest(".chart"));
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
})();
