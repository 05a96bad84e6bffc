// Two continuations, and the places of one where the other model predicts another token. Draws without asking the
// server. Texts come from anywhere: they are only ever set through textContent.

export default function ({ data, parentElement }) {
  const root = parentElement.querySelector(".view");
  if (root.dataset.id === data.id) return;
  root.dataset.id = data.id;
  root.replaceChildren(texts(data), ...strip(data));
}

function texts(data) {
  const row = make("div", "texts");
  for (const each of data.texts) {
    const card = row.appendChild(make("section", "card"));
    card.setAttribute("aria-label", each.title);
    const head = card.appendChild(make("div", "head"));
    head.append(make("b", "", each.title), make("span", "about", each.about));
    const text = card.appendChild(make("div", "text"));
    text.appendChild(make("span", "prompt", data.prompt.map(visible).join("")));
    const differs = new Set(each.differs);
    each.tokens.forEach((token, place) => {
      text.appendChild(make(differs.has(place) ? "mark" : "span", differs.has(place) ? "differs" : "", visible(token)));
    });
    for (const mark of text.querySelectorAll("mark")) mark.style.color = "inherit";
  }
  return row;
}

function strip(data) {
  const tokens = [...data.prompt, ...data.texts[0].tokens];
  const flips = new Map(data.flips.map((each) => [each.place, each]));
  const share = data.compared ? `${flips.size} of ${data.compared}` : "None";
  const words = make("p", "words");
  words.append(
    make("b", "", `${share} predictions flipped`),
    " on the baseline’s text: at the marked tokens the smaller model predicts another one."
      + (flips.size ? " Point at one, or use the arrow keys." : ""),
  );
  const box = make("div", "strip");
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", "The baseline’s text; flipped predictions can be focused");
  const tip = make("div", "tip");
  tip.hidden = true;
  const marked = [];
  tokens.forEach((token, place) => {
    const flip = flips.get(place);
    const span = box.appendChild(make("span", flip ? "token flip" : "token", flip ? filled(token) : visible(token)));
    if (place < data.prompt.length) span.classList.add("prompt");
    if (flip) {
      span.style.setProperty("--sure", flip.after_share.toFixed(3));
      span.tabIndex = marked.length ? -1 : 0;
      span.setAttribute("role", "note");
      span.setAttribute("aria-label", flipText(flip));
      span.onpointerenter = span.onfocus = () => show(box, tip, span, flip);
      span.onpointerleave = span.onblur = () => { tip.hidden = true; };
      marked.push(span);
    }
  });
  box.appendChild(tip);
  box.onkeydown = (event) => {
    const at = marked.indexOf(event.target);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: marked.length - 1 }[event.key];
    if (event.key === "Escape") tip.hidden = true;
    if (at < 0 || next === undefined || !marked[next]) return;
    event.preventDefault();
    marked[at].tabIndex = -1;
    marked[next].tabIndex = 0;
    marked[next].focus();
  };
  return [words, box];
}

function show(box, tip, span, flip) {
  tip.replaceChildren(row("Baseline", flip.before, flip.before_share), row("Smaller", flip.after, flip.after_share));
  tip.hidden = false;
  const [line] = span.getClientRects();
  const outer = box.getBoundingClientRect();
  const left = Math.min(line.left - outer.left, outer.width - tip.offsetWidth - 4);
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${line.bottom - outer.top + 7}px`;
}

function row(who, token, share) {
  const found = make("div", "row");
  found.append(make("span", "", who), make("code", "", filled(token)), make("span", "", percent(share)));
  return found;
}

function flipText(flip) {
  return `Baseline: ${filled(flip.before)}, ${percent(flip.before_share)}. `
    + `Smaller: ${filled(flip.after)}, ${percent(flip.after_share)}.`;
}

function percent(share) {
  return share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
}

function make(tag, name = "", text = "") {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text) node.textContent = text;
  return node;
}

// What hides or reorders text gets some ink; a token of spaces alone too, where it stands for itself.
const HIDDEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]/g;

function visible(text) {
  return text.replace(HIDDEN, (char) => `U+${char.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`);
}

function filled(text) {
  const shown = visible(text).replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  return shown.trim() === "" ? shown.replace(/[ \u00a0]/g, "␣") || "∅" : shown;
}
