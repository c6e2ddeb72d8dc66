// Answers as text: dropped words tinted, the scores of a word beside it, and marks by mouse or keyboard.
"use strict";

// `current`: the token that the tip describes. `held`: the token chosen by keyboard or click; the tip returns to it when the
// mouse leaves.
const view = {group: "most", reason: "", text: "", shown: PAGE, current: null, held: null, pointer: "", list: [], whitespace: false};
const GROUPS = {
  most: ["dropped most", "Answers that lose the largest share."],
  near: ["borderline", "Answers with much text whose score is near a threshold: another setting would decide otherwise. Such words are underlined."],
  format: ["suspected format", "Text that begins alike is dropped at the same place in several answers. A model may have to learn it; if so, mark it “keep”."],
  random: ["at random", "Answers drawn at random."],
};

function matches(doc) {
  if (view.text && !doc.text.toLowerCase().includes(view.text)) return false;
  if (!view.reason) return true;
  const found = decide(doc);
  if (view.reason === "dropped") return found.some((token) => !token.kept);
  if (view.reason === "emptied") return found.every((token) => !token.kept);
  const [kind, name] = view.reason.split(":");
  if (kind === "decided") return found.some((token) => token.why === name);
  const place = scores.findIndex((score) => score.name === name);
  return found.some((token) => token.bits >> place & 1);
}

function listDocuments() {
  const group = D.groups[view.group].map((i) => documents[i]);
  view.list = (view.text ? documents : group).filter(matches);
  view.shown = PAGE;
  put("about-group", view.text ? "All answers of this page that hold the text." : GROUPS[view.group][1]);
  showDocuments();
}

function showDocuments() {
  hold(null);
  put("documents", ...view.list.slice(0, view.shown).map(article));
  const left = view.list.length - view.shown;
  byId("more").hidden = left <= 0;
  put("more", `show ${Math.min(PAGE, Math.max(left, 0))} more`);
  put("found", `${plural(view.list.length, "answer")} here; the page has ${number(documents.length)} of the ${number(S.totals.documents)} of the data set`);
  shade();
}

function article(doc) {
  const text = make("div", {class: "text document", tabindex: 0, role: "group", dir: "auto",
    "aria-label": `answer of row ${doc.row}: use the arrow keys to go from word to word`});
  (view.whitespace ? doc.visible : doc.plain).forEach((shown, i) => {
    if (doc.gaps.has(i)) text.append(make("span", {class: "prompt", dir: "auto", title: "the end of the prompt"}, doc.gaps.get(i)));
    if (view.whitespace && shown.startsWith("·")) text.append(make("wbr"));  // browsers do not break lines at a "·"
    const token = make("span", {class: "token"}, shown);
    token.dataset.token = i;
    text.append(token);
  });
  text.doc = doc;
  const left = doc.length - doc.plain.length;
  if (left) text.append(make("p", {class: "note"}, `${plural(left, "more token")} not shown`));
  const often = doc.occurrences > 1 ? ` · occurs ${number(doc.occurrences)} times` : "";
  const begins = view.group === "format" && !view.text && doc.suspect ? ` · text that begins “${doc.suspect}”` : "";
  return make("article", {}, make("h3", {}, `row ${doc.row}`, make("small", {}, " · ", make("span", {class: "kept-count"}), often + begins,
    make("span", {class: "key-of"}, ` · ${doc.key.slice(0, 12)}`))), text);
}

function shade() {
  for (const text of document.querySelectorAll(".document")) {
    const {doc} = text, found = decide(doc);
    text.found = found;
    for (const span of text.querySelectorAll(".token")) {
      const i = span.dataset.token, token = found[i], names = ["token"];
      if (token.mark) names.push(`marked-${token.mark}`);
      if (!token.kept) names.push("dropped");
      else if (token.bits) names.push("spared");
      if (view.group === "near" && doc.flags[i] & NEAR) names.push("near");
      span.className = names.join(" ");
    }
    const kept = found.filter((token) => token.kept).length;
    text.parentElement.querySelector(".kept-count").textContent =
      isCounted(kept) ? `kept ${number(kept)} of ${plural(found.length, "token")}` : `${plural(found.length, "token")}, not counted`;
  }
  if (view.current) describe(view.current);
}

// [first, end) of the sentence or line of a token.
function unitOf(doc, token) {
  const after = doc.units.findIndex((first) => first > token);
  return [after < 0 ? doc.units.at(-1) || 0 : doc.units[after - 1] || 0, after < 0 ? doc.plain.length : doc.units[after]];
}

// Marks the sentence of a token, or the token alone; `keep` undefined: takes the mark back.
function markToken(span, keep, alone) {
  const {doc} = span.closest(".document"), i = Number(span.dataset.token);
  if (keep === undefined) {
    const over = state.marks.find((each) => matched(doc, each).includes(i));
    return over && mark(over.text, over.pattern, over.keep);
  }
  const made = patternOf(doc, ...(alone ? [i, i + 1] : unitOf(doc, i)));
  if (made) mark(made.text, made.pattern, keep);
}

function describe(span) {
  const text = span.closest(".document"), doc = text.doc, i = Number(span.dataset.token), token = text.found[i];
  const lines = [make("p", {class: "verdict"}, make("span", {class: "text"}, doc.visible[i]), " ", verdict(token))];
  for (const score of scores) {
    if (!Object.hasOwn(doc.scores, score.name)) continue;
    const hit = token.bits >> scores.indexOf(score) & 1;
    lines.push(make("p", {class: hit ? "hit" : ""}, `${hit ? "✗ " : "· "}${named(score.name)}: ${inWords(score.name, doc.scores[score.name][i])}${averaged(score.name)}`));
  }
  const tip = byId("tip"), held = span === view.held;
  if (held) lines.push(buttons(span, token));
  tip.replaceChildren(...lines);
  tip.classList.toggle("held", held);
  tip.hidden = false;
  const box = span.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - own.width - 8));
  const over = box.top - own.height - 6;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(over > 0 ? over : box.bottom + 6) + scrollY}px`;
}

function buttons(span, token) {
  const button = (label, ...how) => make("button", {type: "button", tabindex: -1, onclick: () => markToken(span, ...how)}, label);
  return make("p", {class: "controls"}, button("keep sentence", true), button("drop sentence", false), button("keep word", true, true),
    button("drop word", false, true), token.mark ? button("undo") : null);
}

function point(span) {
  if (view.current) view.current.classList.remove("current");
  view.current = span;
  if (!span) { byId("tip").hidden = true; return; }
  span.classList.add("current");
  describe(span);
}

function hold(span) {
  view.held = span;
  point(span);
}

// Ignores a mouse at rest while the page scrolls beneath it.
function follow(event) {
  const pointer = `${event.screenX} ${event.screenY}`, moved = view.pointer !== pointer;
  view.pointer = pointer;
  if (!moved || event.pointerType === "touch") return;
  const span = event.target.closest(".token");
  if (span !== view.current && (span || !event.target.closest(".document"))) point(span || view.held);
}

function walk(event) {
  const text = event.target.closest(".document");
  if (!text || event.altKey || event.ctrlKey || event.metaKey) return;
  const tokens = Array.from(text.querySelectorAll(".token"));
  const at = tokens.indexOf(view.held);
  const steps = {ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: tokens.length - 1};
  if (event.key === "Escape") return hold(null);
  const asked = {k: [true], x: [false], u: []}[event.key.toLowerCase()];
  if (asked && view.held) return markToken(view.held, ...asked, ...(asked.length ? [event.shiftKey] : []));
  if (event.key === "d") steps.d = tokens.findIndex((span, i) => i > at && span.classList.contains("dropped"));
  if (!(event.key in steps)) return;
  event.preventDefault();
  const next = tokens[Math.max(0, Math.min(tokens.length - 1, steps[event.key]))];
  if (!next || steps[event.key] < 0) return;
  next.scrollIntoView({block: "nearest"});
  hold(next);
}

function startDocuments() {
  view.group = Object.keys(GROUPS).find((name) => D.groups[name].length) || view.group;
  byId("groups").append(...Object.entries(GROUPS).map(([name, [label]]) => {
    const input = make("input", {type: "radio", name: "group", value: name, onchange: () => { view.group = name; listDocuments(); }});
    input.checked = name === view.group;
    return make("label", {}, input, make("span", {}, `${label} (${number(D.groups[name].length)})`));
  }));
  const reasons = [["", "any decision"], ["dropped", "something dropped"], ["emptied", "all of it dropped"],
    ...scores.map((score) => [`rule:${score.name}`, `${named(score.name)} firing`]),
    ...Object.entries(DECISIONS).map(([name, text]) => [`decided:${name}`, text])];
  const select = byId("reason");
  select.replaceChildren(...reasons.map(([value, text]) => make("option", {value}, text)));
  select.addEventListener("change", () => { view.reason = select.value; listDocuments(); });
  const search = byId("search");
  search.addEventListener("input", () => { view.text = search.value.toLowerCase(); listDocuments(); });
  byId("whitespace").addEventListener("change", (event) => { view.whitespace = event.target.checked; showDocuments(); });
  byId("more").addEventListener("click", () => { view.shown += PAGE; showDocuments(); });
  byId("tip").addEventListener("pointerdown", (event) => event.preventDefault());  // the focus stays on the answer
  const box = byId("documents");
  box.addEventListener("pointermove", follow);
  box.addEventListener("pointerleave", (event) => { if (!byId("tip").contains(event.relatedTarget)) point(view.held); });
  box.addEventListener("click", (event) => { const span = event.target.closest(".token"); if (span) hold(span); });
  box.addEventListener("scroll", () => point(view.held), true);
  box.addEventListener("keydown", walk);
  box.addEventListener("focusin", (event) => {
    const text = event.target.closest(".document");
    if (text) hold(view.current && text.contains(view.current) ? view.current : text.querySelector(".token"));
  });
  box.addEventListener("focusout", () => hold(null));
}

showHeader();
showKinds();
showPlaces();
showFormats();
showRun();
showSliders();
startDocuments();
listDocuments();
refresh();
