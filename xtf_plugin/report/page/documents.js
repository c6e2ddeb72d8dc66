// Documents as text: completion tokens shaded as kept or dropped, and the scores of one token in words.
"use strict";

// `current`: the token that the tip describes. `held`: the token chosen by keyboard or click; the tip returns to it when the
// mouse leaves.
const view = {reason: "", text: "", order: "given", shown: PAGE, current: null, held: null, pointer: "", list: []};

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

const lost = (doc) => decide(doc).filter((token) => !token.kept).length / doc.flags.length;

function listDocuments() {
  view.list = documents.filter(matches);
  if (view.order === "most") view.list.sort((a, b) => lost(b) - lost(a));
  if (view.order === "least") view.list.sort((a, b) => lost(a) - lost(b));
  view.shown = PAGE;
  showDocuments();
}

function showDocuments() {
  hold(null);
  put("documents", ...view.list.slice(0, view.shown).map(article));
  const left = view.list.length - view.shown;
  document.getElementById("more").hidden = left <= 0;
  put("more", `show ${Math.min(PAGE, Math.max(left, 0))} more`);
  put("found", `${number(view.list.length)} of ${number(documents.length)} sampled documents; the dataset has ${number(S.totals.documents)}`);
  shade();
}

function article(doc) {
  const text = make("div", {class: "text document", tabindex: 0, role: "group", dir: "auto",
    "aria-label": `document of row ${doc.row}: use the arrow keys to go from token to token`});
  doc.shown.forEach((shown, i) => {
    if (doc.gaps.has(i)) text.append(make("span", {class: "prompt"}, `⟨prompt: ${number(doc.gaps.get(i))} tokens⟩ `));
    if (shown.startsWith("·")) text.append(make("wbr", {}));  // browsers do not break lines at a "·"
    const token = make("span", {class: "token"}, shown);
    token.dataset.token = i;
    text.append(token);
  });
  text.doc = doc;
  const left = doc.length - doc.shown.length;
  if (left) text.append(make("p", {class: "note"}, `${number(left)} more completion tokens are not shown`));
  const often = doc.occurrences > 1 ? ` · occurs ${number(doc.occurrences)} times` : "";
  return make("article", {}, make("h3", {}, `row ${doc.row}`,
    make("small", {}, ` · document ${doc.key.slice(0, 12)} · ${doc.why}${often} · `, make("span", {class: "kept-count"}))), text);
}

// Which underline belongs to which rule.
function legend() {
  const names = scores.map((score, i) => make("span", {class: `token rule-${i % 6}`}, named(score.name)));
  if (scores.length > 1) names.push(make("span", {class: "token rules"}, "several"));
  put("rules", "The underline shows which rule fired: ", make("span", {class: "text"}, ...names));
}

function shade() {
  for (const text of document.querySelectorAll(".document")) {
    const found = decide(text.doc);
    text.found = found;
    for (const span of text.querySelectorAll(".token")) {
      const token = found[span.dataset.token], names = ["token"];
      if (!token.kept) names.push("dropped");
      else if (token.bits) names.push("spared");
      const rules = scores.findIndex((_, i) => token.bits >> i & 1);
      if (rules >= 0 && ones(token.bits) === 1) names.push(`rule-${rules % 6}`);
      else if (rules >= 0) names.push("rules");
      span.className = names.join(" ");
    }
    const kept = found.filter((token) => token.kept).length;
    text.parentElement.querySelector(".kept-count").textContent = `kept ${number(kept)} of ${number(found.length)}`;
  }
  if (view.current) describe(view.current);
}

function describe(span) {
  const text = span.closest(".document"), doc = text.doc, i = Number(span.dataset.token), token = text.found[i];
  const lines = [make("p", {class: "verdict"}, make("span", {class: "text"}, span.textContent), " ", verdict(token))];
  for (const score of scores) {
    if (!Object.hasOwn(doc.scores, score.name)) continue;
    const hit = token.bits >> scores.indexOf(score) & 1;
    lines.push(make("p", {class: hit ? "hit" : ""}, `${hit ? "✗ " : "· "}${named(score.name)}: ${inWords(score.name, doc.scores[score.name][i])}${averaged(score.name)}`));
  }
  const tip = document.getElementById("tip");
  tip.replaceChildren(...lines);
  tip.hidden = false;
  const box = span.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, document.documentElement.clientWidth - own.width - 8));
  const above = box.top - own.height - 6;
  tip.style.left = `${left + scrollX}px`;
  tip.style.top = `${(above > 0 ? above : box.bottom + 6) + scrollY}px`;
}

function point(span) {
  if (view.current) view.current.classList.remove("current");
  view.current = span;
  if (!span) { document.getElementById("tip").hidden = true; return; }
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
  if (event.key === "d") steps.d = tokens.findIndex((span, i) => i > at && span.classList.contains("dropped"));
  if (!(event.key in steps)) return;
  event.preventDefault();
  const next = tokens[Math.max(0, Math.min(tokens.length - 1, steps[event.key]))];
  if (!next || steps[event.key] < 0) return;
  next.scrollIntoView({block: "nearest"});
  hold(next);
}

function startDocuments() {
  const reasons = [["", "all"], ["dropped", "that lose tokens"], ["emptied", "dropped in full"],
    ...scores.map((score) => [`rule:${score.name}`, `where ${named(score.name)} fired`]),
    ...Object.entries(DECISIONS).map(([name, text]) => [`decided:${name}`, text])];
  const select = document.getElementById("reason");
  select.replaceChildren(...reasons.map(([value, text]) => make("option", {value}, text)));
  select.addEventListener("change", () => { view.reason = select.value; listDocuments(); });
  const order = document.getElementById("order");
  order.addEventListener("change", () => { view.order = order.value; listDocuments(); });
  const search = document.getElementById("search");
  search.addEventListener("input", () => {
    view.text = search.value.toLowerCase().replaceAll(" ", "·");
    listDocuments();
  });
  document.getElementById("more").addEventListener("click", () => { view.shown += PAGE; showDocuments(); });
  const box = document.getElementById("documents");
  box.addEventListener("pointermove", follow);
  box.addEventListener("pointerleave", () => point(view.held));
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
showRecurring();
showTotals();
showTokens();
showRun();
showSliders();
startDocuments();
legend();
listDocuments();
refresh();
