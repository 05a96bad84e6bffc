// The stepper: draws one step of a search after another, without asking the server. Text comes as data and is set
// as text. Called again whenever the page runs; keeps its nodes and its place as long as the run is the same.

const SVG = "http://www.w3.org/2000/svg";
const SPEEDS = { slow: 1800, normal: 900, fast: 350 };
const TELL_AFTER = 350; // ms of rest before the server hears of a step

export default function ({ data, parentElement, setStateValue }) {
  const root = parentElement.querySelector(".stepper");
  let stepper = root.stepper;
  if (!stepper) stepper = root.stepper = new Stepper(root);
  stepper.tell = (step) => setStateValue("step", step);
  stepper.show(data);
  return () => stepper.leave();
}

class Stepper {
  constructor(root) {
    this.root = root;
    this.step = 0;
    this.value = "rises";
    this.find = (name) => root.querySelector(`.${name}`);
    this.bars = new Bars(this.find("bars"), this.find("tip"), (step) => this.go(step));
    this.curve = new Curve(this.find("curve"), (step) => this.go(step));
    this.find("first").onclick = () => this.go(0);
    this.find("previous").onclick = () => this.go(this.step - 1);
    this.find("next").onclick = () => this.go(this.step + 1);
    this.find("last").onclick = () => this.go(this.count);
    this.find("play").onclick = () => (this.timer ? this.pause() : this.play());
    this.find("slider").oninput = (event) => this.go(Number(event.target.value));
    this.find("speed").onchange = () => this.timer && this.play();
    this.find("value").onchange = (event) => { this.value = event.target.value; this.draw(); };
    this.onKey = (event) => this.key(event);
    document.addEventListener("keydown", this.onKey);
    this.resized = new ResizeObserver(() => this.data && this.draw());
    this.resized.observe(this.find("bars"));
    this.resized.observe(this.find("curve"));
  }

  leave() {
    clearInterval(this.timer);
    clearTimeout(this.telling);
    document.removeEventListener("keydown", this.onKey);
    this.resized.disconnect();
    delete this.root.stepper;
  }

  get count() { return this.data.steps.length; }

  show(data) {
    const before = this.data;
    this.data = data;
    if (!before || before.run !== data.run) {
      this.pause();
      this.step = Math.min(Math.max(data.step ?? this.count, 0), this.count);
    } else if (data.live && data.steps.length > before.steps.length && this.step === before.steps.length) {
      this.step = this.count; // whoever looks at the newest step goes on looking at it
      this.tellSoon();
    }
    this.draw();
  }

  go(step) {
    const wanted = Math.min(Math.max(step, 0), this.count);
    if (wanted === this.step) return;
    this.step = wanted;
    this.draw();
    if (!this.timer) this.tellSoon(); // while it plays, the server is left in peace
  }

  tellSoon() {
    clearTimeout(this.telling);
    this.telling = setTimeout(() => this.tell(this.step), TELL_AFTER);
  }

  play() {
    clearInterval(this.timer);
    if (this.step >= this.count) this.go(0);
    this.timer = setInterval(() => {
      if (this.step >= this.count) this.pause();
      else this.go(this.step + 1);
    }, SPEEDS[this.find("speed").value]);
    this.drawControls();
  }

  pause() {
    if (this.timer) this.tellSoon();
    clearInterval(this.timer);
    this.timer = null;
    if (this.data) this.drawControls();
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
    const at = event.composedPath()[0];
    const inside = this.root.contains(at);
    // Elsewhere keys belong to whatever has the focus. A click on plain text gives it to the page itself.
    const free = [document, document.documentElement, document.body].includes(at) || at.matches?.("main");
    if (!inside && (!free || document.querySelector("[role=dialog]") || !this.inSight())) return;
    if (inside && at.matches?.("select, input:not(.slider)")) return;
    if (inside && !at.matches?.("input") && (event.key === "ArrowUp" || event.key === "ArrowDown")) {
      event.preventDefault();
      return this.bars.walk(event.key === "ArrowDown" ? 1 : -1);
    }
    if (inside && event.key === "Escape") return this.bars.unpoint();
    const act = {
      ArrowLeft: () => this.go(this.step - 1),
      ArrowRight: () => this.go(this.step + 1),
      Home: () => this.go(0),
      End: () => this.go(this.count),
      " ": () => (at.matches?.("button") ? null : this.timer ? this.pause() : this.play()),
    }[event.key];
    if (!act || (event.key === " " && at.matches?.("button"))) return;
    event.preventDefault();
    act();
  }

  inSight() {
    const place = this.root.getBoundingClientRect();
    return place.bottom > 80 && place.top < innerHeight - 80;
  }

  draw() {
    const shown = this.step ? this.data.steps[this.step - 1] : null;
    this.bars.draw(this.data, this.step, this.value);
    this.curve.draw(this.data, this.step);
    this.find("words").textContent = shown ? shown.words : this.data.words;
    this.find("interval").textContent = this.data.interval;
    this.find("whisker").hidden = !this.data.interval;
    this.root.querySelector(".legend .guarded").hidden = !this.data.protected.length;
    this.root.querySelector(".legend .back").hidden = !this.data.steps.some((each) => each.swap);
    this.drawNumbers();
    this.drawList(shown);
    this.drawControls();
  }

  drawNumbers() {
    const now = this.data.curve[this.step], first = this.data.curve[0];
    for (const text of ["calibration", "held_out"]) {
      const place = this.find(text);
      place.hidden = first[text] == null;
      place.querySelector(".number").textContent = number(now[text]);
      place.querySelector(".rise").textContent = this.step ? now[`${text}_rise`] ?? "" : "baseline";
    }
  }

  drawList(shown) {
    const list = this.find("list");
    list.replaceChildren();
    const blocks = shown ? shown.list : [];
    const fresh = new Set(shown ? shown.removed : []);
    if (!blocks.length) list.append(element("span", "none", "nothing removed yet"));
    for (const block of blocks) list.append(element("span", fresh.has(block) ? "block fresh" : "block", String(block)));
    for (const block of shown?.restored ?? []) list.append(element("span", "block back", `${block} back`));
  }

  drawControls() {
    const slider = this.find("slider");
    slider.max = this.count;
    slider.value = this.step;
    slider.setAttribute("aria-valuetext", `step ${this.step} of ${this.count}`);
    this.find("where").textContent = this.step ? `Step ${this.step} of ${this.count}` : `Before step 1 of ${this.count}`;
    const play = this.find("play");
    play.textContent = this.timer ? "Pause" : "Play";
    play.setAttribute("aria-pressed", String(Boolean(this.timer)));
    this.find("words").setAttribute("aria-live", this.timer ? "off" : "polite");
    for (const name of ["first", "previous"]) this.find(name).disabled = this.step === 0;
    for (const name of ["next", "last"]) this.find(name).disabled = this.step === this.count;
  }
}

// Candidates of a step as bars over the strip of all blocks. Every block has one column that stays; only its state changes.
class Bars {
  constructor(svg, tip, go) {
    this.svg = svg;
    this.tip = tip;
    this.go = go;
  }

  build(data) {
    this.svg.querySelectorAll(".drawn").forEach((each) => each.remove());
    this.axis = this.svg.appendChild(shape("g", { class: "drawn axis" }));
    this.columns = [];
    for (let block = 0; block < data.blocks; block++) {
      const group = this.svg.appendChild(shape("g", { class: "drawn column" }));
      const parts = { group };
      for (const name of ["removed", "bar", "texture", "stem", "cap low", "cap high", "cell"])
        parts[name] = group.appendChild(shape("rect", { class: name, rx: name === "cell" ? 2 : 0 }));
      for (const name of ["mark", "when", "label"])
        parts[name] = group.appendChild(shape("text", { class: name, "text-anchor": "middle" }));
      const hit = group.appendChild(shape("rect", { class: "hit" }));
      hit.addEventListener("pointerenter", () => this.point(block));
      hit.addEventListener("pointerleave", () => this.unpoint());
      hit.addEventListener("click", () => { // a removed block leads to the step that removed it
        const removed = this.step ? this.data.steps[this.step - 1].removed_at : {};
        if (block in removed) this.go(removed[block]);
      });
      parts.hit = hit;
      this.columns.push(parts);
    }
    this.run = data.run;
  }

  draw(data, step, value) {
    if (this.run !== data.run || this.columns.length !== data.blocks) this.build(data);
    Object.assign(this, { data, step, value });
    const width = this.svg.clientWidth || 800, height = this.svg.clientHeight || 380;
    const left = 54, right = 6, top = 36, strip = 24, foot = 20;
    const floor = height - foot - strip - 12;
    const band = (width - left - right) / data.blocks;
    // Before the first step: what it is about to compare, with nothing chosen yet.
    const shown = data.steps[Math.max(step, 1) - 1];
    const [low, high] = data.axis[value];
    const y = (score) => floor - (Math.min(Math.max(score, low), high) - low) / (high - low) * (floor - top);
    this.drawAxis(low, high, y, left, width - right, (shown?.swap ? data.swap_unit : data.unit)[value]);
    this.places = new Map(shown ? shown.blocks.map((block, index) => [block, index]) : []);
    const removed = step ? shown.removed_at : {};
    const before = step > 1 ? data.steps[step - 2].removed_at : {};
    const guarded = new Set(data.protected), tied = new Set(step && shown ? shown.tied : []);
    const fresh = new Set(step && shown ? shown.removed : []), back = new Set(step && shown ? shown.restored : []);
    const every = [1, 2, 5, 10, 20, 50].find((each) => each * band >= 24) ?? 100;
    this.columns.forEach((column, block) => {
      const index = this.places.get(block);
      const x = left + block * band, inner = Math.max(band * 0.72, 1.5), bar = x + (band - inner) / 2, middle = x + band / 2;
      const score = index == null ? null : shown[value][index];
      const known = score != null;
      const half = known ? shown.half_widths[index] : null;
      const chosen = step && index === shown?.chosen;
      const kind = chosen ? "chosen" : tied.has(index) && index != null ? "tied" : "candidate";
      column.group.setAttribute("class", `drawn column ${kind}${block in removed ? " out" : ""}${guarded.has(block) ? " guarded" : ""}`);
      const end = known ? y(score) : floor, base = y(Math.max(0, low));
      place(column.bar, bar, Math.min(end, base), inner, known ? Math.max(Math.abs(base - end), 1) : 0);
      place(column.texture, bar, Math.min(end, base), inner, known && kind === "tied" ? Math.max(Math.abs(base - end), 1) : 0);
      const whole = known && half != null && half > 0;
      const up = whole ? y(score + half) : end, down = whole ? y(score - half) : end;
      place(column.stem, middle - 0.75, up, 1.5, whole ? Math.max(down - up, 0) : 0);
      const cap = Math.min(inner * 0.6, 9);
      place(column["cap high"], middle - cap / 2, up, cap, whole && score + half < high ? 1.5 : 0);
      place(column["cap low"], middle - cap / 2, down - 1.5, cap, whole ? 1.5 : 0);
      const hatched = block in before && index == null;
      place(column.removed, bar, top, inner, hatched ? floor - top : 0);
      const cut = known && score > high;
      const mark = chosen ? "▼" : kind === "tied" ? "≈" : cut ? "↑" : index != null && !known ? "×" : back.has(block) ? "▲" : "";
      column.mark.textContent = mark;
      at(column.mark, middle, Math.min(whole ? up : end, base) - 5); // a bar that hangs below zero has it on the line
      place(column.cell, bar, floor + 8, inner, strip);
      column.cell.classList.toggle("fresh", fresh.has(block) || back.has(block));
      column.when.textContent = block in removed && band > 7 ? String(removed[block]) : "";
      column.when.classList.toggle("upright", band <= 14);
      at(column.when, middle + (band <= 14 ? 3.5 : 0), floor + 8 + strip / 2 + (band <= 14 ? 0 : 4), band <= 14 ? -90 : 0);
      column.label.textContent = block % every === 0 ? String(block) : "";
      at(column.label, middle, height - 5);
      place(column.hit, x, 0, band, height);
    });
    this.svg.setAttribute("aria-label", step && shown ? shown.words : data.words);
    if (!this.tip.hidden && this.pointed != null) this.point(this.pointed);
  }

  drawAxis(low, high, y, left, right, unit) {
    this.axis.replaceChildren();
    for (const tick of ticks(low, high)) {
      const line = shape("line", { x1: left, x2: right, y1: y(tick.value), y2: y(tick.value), class: tick.value === 0 ? "zero" : "grid" });
      const text = shape("text", { x: left - 8, y: y(tick.value) + 4, "text-anchor": "end" });
      text.textContent = tick.text;
      this.axis.append(line, text);
    }
    const title = shape("text", { x: left, y: 10, class: "unit" });
    title.textContent = unit;
    this.axis.append(title);
  }

  unpoint() {
    this.tip.hidden = true;
    this.columns?.forEach((column) => column.group.classList.remove("pointed", "within"));
  }

  walk(by) { // from block to block by keyboard
    const from = this.tip.hidden ? (by > 0 ? -1 : this.columns.length) : this.pointed;
    this.point(Math.min(Math.max(from + by, 0), this.columns.length - 1));
  }

  point(block) {
    this.unpoint();
    this.pointed = block;
    const { data, step } = this;
    const shown = data.steps[Math.max(step, 1) - 1];
    const index = this.places.get(block);
    const lines = [];
    const chunk = index == null ? null : shown.chunks[index];
    const [start, end] = chunk ?? [block, block];
    for (let each = start; each <= end; each++) this.columns[each].group.classList.add("within");
    this.columns[block].group.classList.add("pointed");
    if (index != null) {
      const name = shown.names[index];
      lines.push(["strong", shown.swap ? name : chunk ? `Blocks ${name}` : `Block ${block}`]);
      lines.push(["span", `score ${number(shown.scores[index], 4)} ${data.score_name}`]);
      if (shown.perplexities[index] != null) lines.push(["span", `perplexity ${number(shown.perplexities[index])}`]);
      if (step && index === shown.chosen) lines.push(["em", shown.swap ? "swapped in this step" : "removed in this step"]);
      else if (shown.differences[index] == null) lines.push(["em", "its predictions were not numbers"]);
      else {
        const half = shown.half_widths[index] == null ? "" : ` ± ${number(shown.half_widths[index], 4)}`;
        lines.push(["span", `${number(shown.differences[index], 4)}${half} above the best`]);
        lines.push(["em", data.verdicts[shown.tied.includes(index) ? "tied" : "different"]]);
      }
    } else if (step && shown.restored.includes(block)) lines.push(["strong", `Block ${block}`], ["em", "taken back in this step"]);
    else if (step && block in shown.removed_at) lines.push(["strong", `Block ${block}`], ["em", `removed in step ${shown.removed_at[block]}`]);
    else if (data.protected.includes(block)) lines.push(["strong", `Block ${block}`], ["em", "protected: never a candidate"]);
    else lines.push(["strong", `Block ${block}`], ["em", "not a candidate in this step"]);
    this.tip.replaceChildren(...lines.map(([name, text]) => element(name, "", text)));
    this.tip.hidden = false;
    const hit = this.columns[block].hit.getBoundingClientRect(), frame = this.tip.parentElement.getBoundingClientRect();
    // Beside the bar, on the side where there is more room, so that it hides neither the bar nor its error bar.
    const from = hit.left - frame.left, wide = this.tip.offsetWidth + 8;
    this.tip.style.left = `${from + hit.width / 2 < frame.width / 2 ? from + hit.width + 8 : from - wide}px`;
  }
}

// Perplexity after each step: what is behind is drawn in full, what is ahead faintly.
class Curve {
  constructor(svg, go) {
    this.svg = svg;
    svg.addEventListener("click", (event) => {
      const across = event.clientX - svg.getBoundingClientRect().left;
      if (this.width) go(Math.round((across - this.left) / this.width * this.steps));
    });
  }

  draw(data, step) {
    const width = this.svg.clientWidth || 320, height = this.svg.clientHeight || 200;
    const left = 46, right = 10, top = 18, bottom = height - 22;
    const points = data.curve, count = points.length - 1;
    Object.assign(this, { left, width: width - left - right, steps: count });
    const values = points.flatMap((each) => [each.calibration, each.held_out, each.held_out_high]).filter((each) => each != null);
    this.svg.replaceChildren();
    if (!values.length) return;
    const lowest = Math.min(...values), highest = Math.max(...values), curved = highest / lowest > 6;
    const scale = curved ? Math.log : (value) => value;
    const start = curved ? scale(lowest * 0.95) : Math.max(0, lowest - 0.08 * (highest - lowest)), end = scale(highest * 1.03);
    const x = (index) => left + (width - left - right) * index / Math.max(count, 1);
    const y = (value) => bottom - (scale(value) - start) / Math.max(end - start, 1e-9) * (bottom - top);
    for (const tick of curved ? powers(lowest, highest) : ticks(start, end, 4)) {
      const value = tick.value ?? tick;
      this.svg.append(shape("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "grid" }));
      this.write(left - 6, y(value) + 4, tick.text ?? number(value, 0), "end", "tick");
    }
    this.write(0, 10, curved ? "Perplexity (log)" : "Perplexity", "start", "unit");
    const every = [1, 2, 5, 10, 20, 50].find((each) => count / each <= 10) ?? 100;
    for (let index = 0; index <= count; index += every) this.write(x(index), height - 5, String(index), "middle", "tick");
    const banded = points.map((each, index) => ({ ...each, index })).filter((each) => each.held_out_low != null);
    if (banded.length) {
      const there = banded.map((each) => `${x(each.index)},${y(each.held_out_high)}`);
      const back = banded.reverse().map((each) => `${x(each.index)},${y(each.held_out_low)}`);
      this.svg.append(shape("polygon", { points: [...there, ...back].join(" "), class: "band" }));
    }
    for (const text of ["calibration", "held_out"]) {
      const known = points.map((each, index) => [index, each[text]]).filter(([, value]) => value != null);
      const path = (chosen) => chosen.map(([index, value]) => `${x(index)},${y(value)}`).join(" ");
      this.svg.append(shape("polyline", { points: path(known), class: `ahead ${text}` }));
      const behind = known.filter(([index]) => index <= step);
      this.svg.append(shape("polyline", { points: path(behind), class: `behind ${text}` }));
      const [index, value] = behind.at(-1) ?? [];
      if (value == null) continue;
      const dot = text === "calibration" ? { r: 4.5, cx: x(index), cy: y(value) } : null;
      this.svg.append(dot ? shape("circle", { ...dot, class: `dot ${text}` })
        : shape("rect", { x: x(index) - 4, y: y(value) - 4, width: 8, height: 8, class: `dot ${text}` }));
    }
  }

  write(x, y, text, anchor, name) {
    const node = shape("text", { x, y, "text-anchor": anchor, class: name });
    node.textContent = text;
    this.svg.append(node);
  }
}

function shape(name, attributes) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function element(name, className, text) {
  const node = document.createElement(name);
  if (className) node.className = className;
  node.textContent = text;
  return node;
}

function place(node, x, y, width, height) { // as styles, which the style sheet lets move
  node.style.x = `${x}px`;
  node.style.y = `${y}px`;
  node.style.width = `${width}px`;
  node.style.height = `${height}px`;
}

function at(node, x, y, turned = 0) {
  node.style.transform = `translate(${x}px, ${y}px)` + (turned ? ` rotate(${turned}deg)` : "");
}

function ticks(low, high, wanted = 5) {
  const rough = (high - low) / wanted, power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].map((each) => each * power).find((each) => each >= rough) ?? power;
  const digits = Math.max(0, -Math.floor(Math.log10(size)));
  const found = [];
  for (let value = Math.ceil(low / size) * size; value <= high + size * 1e-6; value += size)
    found.push({ value: Math.abs(value) < size * 1e-6 ? 0 : value, text: value.toFixed(digits) });
  return found;
}

function powers(low, high) {
  const found = [], wide = Math.log10(high / low);
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const each of wide > 4 ? (power % Math.ceil(wide / 6) ? [] : [1]) : wide > 2 ? [1, 3] : [1, 2, 5]) {
      const value = each * 10 ** power;
      if (value >= low && value <= high) found.push({ value, text: number(value, 0) });
    }
  return found;
}

function number(value, digits = 2) {
  if (value == null) return "–";
  if (Math.abs(value) >= 1e5) return value.toExponential(Math.min(digits, 2)).replace("e+", "e");
  return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
}
