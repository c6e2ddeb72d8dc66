// Elements of the page, its first screen and its tables. Texts are untrusted: everything is inserted as elements and text nodes,
// never as markup.
"use strict";

const PAGE = 6, FEW = 8;
const SVG = "http://www.w3.org/2000/svg";

function make(tag, properties = {}, ...children) {
  const element = tag in DRAWN ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const DRAWN = {svg: 1, rect: 1, line: 1, text: 1, title: 1};
const byId = (id) => document.getElementById(id);
const put = (id, ...children) => byId(id).replaceChildren(...children);

function table(heads, rows) {
  const numeric = heads.map((_, i) => i > 0 && rows.every((row) => typeof row[i] === "string" && /^[\d.,\s%−]*$/.test(row[i])));
  const line = (kind, texts) => make("tr", {}, ...texts.map((text, i) => {
    const cell = make(i === 0 && kind === "td" ? "th" : kind, i === 0 ? {scope: kind === "th" ? "col" : "row"} : {}, text);
    if (numeric[i]) cell.className = "number";
    return cell;
  }));
  return make("div", {class: "scroll"}, make("table", {},
    make("thead", {}, line("th", heads)), make("tbody", {}, ...rows.map((row) => line("td", row)))));
}

// Bars of kept and dropped tokens: {label, kept, dropped, title}; above each the share that is dropped.
function chart(bars, label) {
  const width = 400, height = 150, top = 16, bottom = 18, step = width / Math.max(bars.length, 4);
  const most = Math.max(1, ...bars.map((bar) => bar.kept + bar.dropped)), tall = height - top - bottom;
  const picture = make("svg", {viewBox: `0 0 ${width} ${height}`, class: "chart", role: "img", "aria-label": label});
  bars.forEach((bar, i) => {
    const all = bar.kept + bar.dropped, x = i * step + step * 0.12, wide = step * 0.76, middle = i * step + step / 2;
    const low = tall * bar.dropped / most, high = tall * all / most, base = height - bottom;
    const group = [make("rect", {class: "kept", x, width: wide, y: base - high, height: high - low}),
      make("rect", {class: "lost", x, width: wide, y: base - low, height: low})];
    for (const rect of group) rect.append(make("title", {}, `${bar.title}: ${number(bar.dropped)} of ${number(all)} tokens dropped`));
    picture.append(...group, make("text", {x: middle, y: base - high - 4}, all ? percentOf(bar.dropped, all) : ""),
      make("text", {x: middle, y: height - 4, class: "axis"}, bar.label));
  });
  return picture;
}

const percentOf = (part, whole) => {
  const value = whole ? 100 * part / whole : 0;
  return `${value > 0 && value < 1 ? "<1" : value.toFixed(0)} %`;
};

function showHeader() {
  const totals = S.totals, all = totals.completion_tokens, emptied = totals.fully_dropped_documents;
  put("headline", `${(all ? 100 * totals.kept_tokens / all : 0).toFixed(1)} % of the answer text is trained on`);
  const part = make("span", {class: "lost"});
  part.style.width = `${all ? 100 * totals.dropped_tokens / all : 0}%`;
  put("share", part);
  put("facts", make("b", {}, number(totals.dropped_tokens)), " of ", make("b", {}, number(all)), " tokens are dropped, from ",
    make("b", {}, number(D.places.touched)), " of ", make("b", {}, number(totals.documents)), " answers",
    emptied ? `; ${number(emptied)} answers are dropped in full` : "", ". Scored by ", make("b", {}, String(S.reference.name)), ".");
  if (S.streaming) {
    put("sampled", `The data is streamed: all figures are of its first ${number(S.streaming.documents)} documents.`);
  }
  put("warnings", ...S.warnings.map(warning));
}

// A warning; the line to paste that it may end with stands alone.
function warning(text) {
  const [, said, setting] = /^(.*add to the block: )(.+)$/s.exec(text) || [];
  return setting ? make("li", {}, said, make("code", {class: "line"}, setting)) : make("li", {}, text);
}

// A button that marks a text; it follows the marks.
function marker(text, pattern, keep) {
  const label = keep ? "keep" : "drop";
  const button = make("button", {type: "button", class: "marker", "aria-pressed": "false", title: `${label}: write a pattern for this text into the block`,
    onclick: () => mark(text, pattern, keep)}, label);
  button.dataset.pattern = pattern;
  button.dataset.keep = keep;
  return button;
}

function showKinds() {
  const all = S.totals.dropped_tokens;
  put("about-kinds", D.kinds.length ? "By reason, with the share of the dropped text that each accounts for." : "");
  put("reasons", ...D.kinds.map((kind) => {
    const lines = kind.listed.map((each) => make("li", {}, make("span", {class: "said"}, each.text),
      make("span", {class: "often"}, each.number > 1 ? `×${number(each.number)}` : "",
        each.spellings > 1 ? make("span", {title: "they differ in digits or capitals"}, ` in ${number(each.spellings)} forms`) : null),
      each.pattern === null ? "" : marker(each.text, each.pattern, true)));
    const more = kind.texts - Math.min(FEW, lines.length), rest = lines.slice(FEW);
    return make("section", {class: "card"}, make("h3", {}, make("b", {}, percentOf(kind.tokens, all)), kindTitle(kind.why)),
      make("p", {class: "note"}, `${Object.hasOwn(D.measures, kind.why) ? `${named(kind.why)} · ` : ""}${plural(kind.pieces, "piece")}, ${plural(kind.texts, "different text")}`),
      make("ul", {class: "said-list"}, ...lines.slice(0, FEW)),
      more > 0 ? make("details", {}, make("summary", {}, `${number(more)} more`), make("ul", {class: "said-list"}, ...rest),
        kind.texts > lines.length ? make("p", {class: "note"}, `The page lists ${number(lines.length)} of ${number(kind.texts)} texts.`) : null) : null);
  }), ...(D.kinds.length ? [] : [make("p", {}, "Nothing is dropped.")]));
}

const plural = (count, name) => `${number(count)} ${name}${count === 1 ? "" : "s"}`;

function showPlaces() {
  const tenths = D.places.tenths.map((bar, i) => ({...bar, label: ["first", ...Array(8).fill(""), "last"][i], title: `tenth ${i + 1} of 10`}));
  const lengths = D.places.lengths.map((bar) => ({...bar, label: bar.from === bar.to ? `${bar.from}` : `${short(bar.from)}–${short(bar.to)}`,
    title: `${plural(bar.documents, "answer")} of ${number(bar.from)} to ${number(bar.to)} tokens`}));
  const key = () => make("span", {class: "key"}, make("span", {class: "kept"}), "kept ", make("span", {class: "lost"}), "dropped, with its share");
  const figure = (title, bars) => make("figure", {}, make("figcaption", {}, make("b", {}, title), key()), chart(bars, title));
  put("charts", figure("By tenth of the answer", tenths), figure("By length of the answer, in tokens", lengths));
  put("by", ...Object.entries(S.by || {}).map(([column, values]) => table([`By ${column}`, "answers", "tokens", "dropped", "share"],
    values.map((each) => [each.values === 1 ? each.value : `${number(each.values)} ${each.value}`, number(each.documents), number(each.tokens),
      number(each.dropped_tokens), share(each.dropped_tokens, each.tokens)]))));
}

// Texts that are kept as format, and those that nothing drops although several answers share them.
function showFormats() {
  const all = S.totals.documents, part = (value) => `${(100 * value).toFixed(0)} %`;
  const kept = (S.recurring || []).filter((each) => !each.dropped);
  const shown = new Set(kept.map((each) => each.text)), openings = (S.formats || []).filter((each) => !shown.has(each.text));
  byId("formats").hidden = !kept.length && !openings.length;
  const rows = kept.map((each) => [make("span", {class: "text"}, each.text), `${number(each.documents)} (${part(each.documents / all)})`,
    each.why.includes("format") ? "format" : each.dropped_in ? `dropped in ${number(each.dropped_in)} of them` : "no rule drops it", dropButton(each)]);
  rows.push(...openings.slice(0, 12).map((each) => [make("span", {class: "text"}, each.text), part(each.share), "opens a line or sentence: format", ""]));
  put("repeated", make("p", {class: "note"}, "A format is to be learned, a phrase that says nothing is not; only a reader can tell."),
    table(["text", "answers", "why it is kept", ""], rows));
}

function dropButton(entry) {
  const [, quoted] = /^force_drop: (\[.*\])$/s.exec(entry.setting) || [];
  return quoted ? marker(entry.text, JSON.parse(quoted)[0], false) : "";
}

function showRun() {
  put("advice", lookup(S.familiarity, "advice") || "");
  const ends = S.endings, totals = S.totals, all = totals.completion_tokens;
  put("endings", ends.special_tokens.length ? table(["special token", "labelled", "dropped"], ends.special_tokens.map((e) =>
    [make("span", {class: "text"}, e.token), number(e.labelled), number(e.dropped)])) : "",
    make("p", {}, `${number(ends.documents_ending_without_one)} of ${number(totals.documents)} answers train no end of turn` +
      (ends.documents_ending_without_one ? ": they were cut off (max_length), their template writes none, or it has no label. The model does not learn to stop from them." : ".")));
  const rows = Object.entries(totals.scores).map(([name, facts]) => [named(name), number(facts.fired), share(facts.fired, all), number(facts.dropped), number(facts.dropped_alone)]);
  rows.push(...Object.entries(totals.decided_by).filter(([, tokens]) => tokens).map(([name, tokens]) => [DECISIONS[name], number(tokens), share(tokens, all), "", ""]));
  put("totals", table(["rule", "fires on tokens", "share", "of these dropped", "by it alone"], rows));
  const lines = (facts) => Object.entries(facts).map(([name, value]) =>
    [name, make("code", {}, typeof value === "string" ? value : JSON.stringify(value))]);
  put("reference", table(["reference", ""], lines(S.reference)));
  put("versions", table(["package", "version"], lines(S.versions)));
  put("settings", table(["setting", ""], lines(S.config)));
  put("scoring", table(["scoring", ""], lines(S.scoring)));
}
