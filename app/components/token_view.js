// The token view: a passage whose tokens can be picked, and what each block would have predicted after the picked one.
// Draws without asking the server. Texts come from anywhere: they are only ever set through textContent.

const TELL_AFTER = 300; // ms of rest before the server hears of a token that arrow keys passed

export default function ({ data, parentElement, setStateValue }) {
  const root = parentElement.querySelector(".view");
  if (!root.view) root.view = new View(root);
  root.view.tell = (token) => setStateValue("token", token);
  root.view.show(data);
  return () => root.view && root.view.leave();
}

class View {
  constructor(root) {
    this.root = root;
    this.legend = root.appendChild(make("div", "legend"));
    this.passage = root.appendChild(make("div", "passage"));
    this.passage.setAttribute("role", "listbox");
    this.passage.setAttribute("aria-label", "Passage: pick a token to see its predictions");
    this.passage.setAttribute("aria-orientation", "horizontal");
    this.about = root.appendChild(make("div", "about"));
    this.about.setAttribute("aria-live", "polite");
    this.table = root.appendChild(make("div", "predictions"));
    this.table.setAttribute("role", "table");
    this.table.setAttribute("aria-label", "The five most likely next tokens after each block");
    this.key_ = root.appendChild(make("div", "key"));
    this.passage.onclick = (event) => {
      const span = event.target.closest(".token");
      if (span) this.pick(Number(span.dataset.place), { now: true });
    };
    this.passage.onkeydown = (event) => this.key(event);
  }

  leave() {
    clearTimeout(this.telling);
  }

  show(data) {
    const before = this.data;
    this.data = data;
    if (!before || before.run !== data.run) {
      this.picked = this.announced = data.token;
      this.build();
    } else if (before.token !== data.token && this.announced === this.picked) {
      this.picked = this.announced = data.token; // back and forth in the browser
    }
    this.draw();
  }

  build() {
    this.spans = this.data.tokens.map((token, place) => {
      const span = make("span", "token", passageText(token.text));
      span.dataset.place = place;
      span.setAttribute("role", "option");
      span.dir = "auto";
      return span;
    });
    const nodes = [];
    this.spans.forEach((span, place) => {
      nodes.push(span);
      const text = this.data.tokens[place].text;
      if (text.includes("\n")) nodes.push(make("br"));
      else if (!text.trim()) nodes.push(make("wbr")); // its spaces are drawn as marks, which keep a line together
    });
    this.passage.replaceChildren(...nodes);
  }

  pick(place, { now = false, focus = true } = {}) {
    const wanted = Math.min(Math.max(place, 0), this.spans.length - 1);
    const changed = wanted !== this.picked;
    this.picked = wanted;
    this.draw();
    if (focus) this.spans[wanted].focus();
    clearTimeout(this.telling);
    if (changed || this.announced !== wanted) this.telling = setTimeout(() => this.say(), now ? 0 : TELL_AFTER);
  }

  say() {
    this.announced = this.picked;
    this.tell(this.picked);
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const act = {
      ArrowLeft: () => this.pick(this.picked - 1),
      ArrowRight: () => this.pick(this.picked + 1),
      ArrowUp: () => this.pick(this.nearest(-1)),
      ArrowDown: () => this.pick(this.nearest(1)),
      Home: () => this.pick(0),
      End: () => this.pick(this.spans.length - 1),
      Enter: () => this.pick(this.picked, { now: true }),
      " ": () => this.pick(this.picked, { now: true }),
    }[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  // The token of the next line up or down that is closest to the picked one.
  nearest(direction) {
    const middle = (box) => [box.left + box.width / 2, box.top + box.height / 2];
    const boxes = this.spans.map((span) => middle(span.getClientRects()[0] ?? span.getBoundingClientRect()));
    const [x, y] = boxes[this.picked];
    let best = this.picked, cost = Infinity;
    boxes.forEach(([left, top], place) => {
      const down = (top - y) * direction;
      if (down < 8) return;
      const here = down * 1000 + Math.abs(left - x);
      if (here < cost) [best, cost] = [place, here];
    });
    return best;
  }

  draw() {
    const { tokens, colours, exit, blocks } = this.data;
    this.spans.forEach((span, place) => {
      const [background, ink] = colours[Math.min(tokens[place][exit], blocks - 1)];
      const here = place === this.picked;
      span.style.backgroundColor = background;
      span.style.color = ink;
      span.tabIndex = here ? 0 : -1;
      span.setAttribute("aria-selected", String(here));
      span.title = `first agrees after block ${tokens[place].first}, settles after block ${tokens[place].settled}`;
    });
    this.drawLegend();
    this.drawPredictions();
  }

  drawLegend() {
    const { colours, exit, blocks } = this.data;
    const what = exit === "first" ? "First agrees with the final prediction after block" : "Settles on the final prediction after block";
    const bar = make("span", "bar");
    for (const [background] of colours) bar.appendChild(make("i")).style.backgroundColor = background;
    const scale = make("span", "scale");
    const marks = make("span", "marks");
    const shown = blocks > 4 ? [0, Math.round((blocks - 1) / 4), Math.round((blocks - 1) / 2), Math.round((3 * (blocks - 1)) / 4), blocks - 1] : [0, blocks - 1];
    for (const block of new Set(shown)) {
      const mark = marks.appendChild(make("b", "", String(block)));
      mark.style.left = `${(100 * (block + 0.5)) / blocks}%`;
    }
    scale.append(bar, marks);
    this.legend.replaceChildren(make("span", "", what), scale);
  }

  drawPredictions() {
    const { tokens, words, blocks, removed, known } = this.data;
    const token = tokens[this.picked];
    const final = token.top.length ? token.top[token.top.length - 1][0] : null;
    const next = tokens[this.picked + 1];
    const about = [part("Token "), piece(token.text), part(`, position ${this.picked}: the model goes on with `)];
    if (final) about.push(piece(words[final[0]]), part(` (${share(final[1])})`));
    const same = known && final && next && final[0] === next.word; // by their ids: different tokens may look the same
    if (next) about.push(part(same ? ", as the text does" : ", the text with "));
    if (next && !same) about.push(piece(next.text));
    about.push(part(". First predicted "));
    about.push(make("strong", "", `after block ${token.first}`), part(token.first === token.settled ? ", and " : "; "));
    about.push(part("settled "), make("strong", "", token.first === token.settled ? "from there on" : `after block ${token.settled}`));
    about.push(part("."));
    this.about.replaceChildren(...about);
    const isRemoved = new Set(removed);
    const rows = token.top.map((best, block) => {
      const row = make("div", "row");
      row.setAttribute("role", "row");
      const settled = block >= token.settled;
      const agrees = final != null && best.length && (known ? best[0][0] === final[0] : settled || block === token.first);
      row.classList.toggle("agrees", agrees);
      row.classList.toggle("settled", settled);
      const head = row.appendChild(make("span", "block", String(block)));
      head.setAttribute("role", "rowheader");
      head.classList.toggle("removed", isRemoved.has(block));
      const [background, ink] = this.data.colours[block];
      head.style.setProperty("--depth", background);
      head.style.setProperty("--ink", ink);
      head.title = `after block ${block}${isRemoved.has(block) ? ", which this run removes" : ""}`;
      const mark = row.appendChild(make("span", "mark", block === token.first ? "◆" : block === token.settled ? "■" : agrees ? "✓" : ""));
      mark.title = block === token.first ? "first agreement" : block === token.settled ? "settles here" : agrees ? "agrees" : "";
      for (const [rank, [word, mille]] of best.entries()) {
        const cell = row.appendChild(make("span", "cell"));
        cell.setAttribute("role", "cell");
        cell.classList.toggle("final", known ? final != null && word === final[0] : agrees && rank === 0);
        cell.style.setProperty("--share", `${Math.min(mille / 10, 100)}%`);
        cell.title = `${cellText(words[word])} ${share(mille)}`;
        cell.append(make("span", "word", cellText(words[word])), make("span", "share", share(mille)));
        cell.firstChild.dir = "auto";
      }
      return row;
    });
    this.table.replaceChildren(...rows);
    this.table.style.setProperty("--rows", String(blocks));
    this.key_.replaceChildren(
      make("span", "", "Each row: a block and its five most likely next tokens, best first; the bar is the probability."),
      legendItem("cell final", "word", "the final prediction"),
      legendItem("", "◆", "first agreement"),
      legendItem("", "■", "settles"),
      legendItem("", "✓", "agrees"),
      ...(removed.length ? [legendItem("block removed", "7", "removed by this run")] : []),
    );
  }
}

function legendItem(kind, mark, text) {
  const item = make("span", "item");
  item.append(make("span", kind, mark), make("span", "", text));
  return item;
}

function make(name, kind = "", text = "") {
  const node = document.createElement(name);
  if (kind) node.className = kind;
  if (text) node.textContent = text;
  return node;
}

function part(text) { return document.createTextNode(text); }

function piece(text) {
  const node = make("code", "", cellText(text));
  node.dir = "auto";
  return node;
}

function share(mille) {
  return mille >= 1000 ? "100 %" : mille < 1 ? "< 0.1 %" : mille < 100 ? `${(mille / 10).toFixed(1)} %` : `${Math.round(mille / 10)} %`;
}

// What has no ink gets some: spaces alone, line ends, and characters that hide or reorder text.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

function visible(text) {
  const shown = text
    .replace(/\n/g, "⏎").replace(/\t/g, "⇥")
    .replace(HIDDEN, (char) => `U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
  return shown === "" ? "∅" : shown;
}

function passageText(text) {
  return visible(/^[ \u00a0\n\t]*$/.test(text) ? text.replace(/[ \u00a0]/g, "␣") : text);
}

function cellText(text) {
  return visible(text.replace(/^[ \u00a0]+|[ \u00a0]+$/g, (spaces) => "␣".repeat(spaces.length)));
}
