// The page's data and its counts: the same steps as xtf_plugin/selection/select.py.
"use strict";

const PROTECTED = 1, FORCED = 2, LOOSE = 4;  // of a cell
const KEPT = 4, NEAR = 8, GIVEN = 16;  // of a token in a document
const D = JSON.parse(document.getElementById("data").textContent);
const S = D.summary;

const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
const shorts = (text) => new Uint16Array(bytes(text).buffer);
const floats = (text) => new Float32Array(bytes(text).buffer);
const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

const sliders = D.whatif.sliders;
const scores = [];  // {name, sliders: indices}, in the block's order
sliders.forEach((slider, index) => {
  const last = scores[scores.length - 1];
  if (last && last.name === slider.score) last.sliders.push(index);
  else scores.push({name: slider.score, sliders: [index]});
});
const cells = {codes: bytes(D.whatif.cells), flags: bytes(D.whatif.flags), weights: D.whatif.weights};
// `values` by slider, null: off; `marks`: {text, pattern, keep}.
const state = {values: sliders.map((slider) => slider.own), combine: S.config.combine, marks: []};

// Whether a score's rule is on.
const isOn = (score) => score.sliders.some((i) => sliders[i].key === "" || state.values[i] !== null);
const activeScores = () => scores.filter(isOn).length;
const isMoved = (slider, i) => state.values[i] !== slider.own;
const moved = () => sliders.some(isMoved) || !same(state.combine, S.config.combine);

function needed() {
  const active = activeScores();
  const named = {union: 1, intersection: active, majority: Math.floor(active / 2) + 1};
  return Math.max(1, typeof state.combine === "string" ? named[state.combine] : state.combine.at_least);
}

// The threshold of a value of a "line" slider, in units of the score, as the rule compares it.
function threshold(slider, value) {
  const limit = slider.line[0] + slider.line[1] * value;
  return slider.key === "known_above" || slider.key === "unknown_below" ? Math.fround(limit) : limit;
}

const above = (slider) => slider.key === "unknown_below";  // it drops what is above its threshold

// [low, high]: the place of a slider's value, or the two that it lies between; null: beyond the last known one.
function placesOf(slider, value) {
  const {places, kind} = slider;
  if (kind === "fixed") return [0, 0];
  if (value === null) return [-1, -1];
  if (kind === "class") return [places.indexOf(value), places.indexOf(value)];
  const limit = kind === "line" ? threshold(slider, value) : value;
  const falling = kind === "line" ? above(slider) : places[0] > places[places.length - 1];
  const found = places.findIndex((place) => (falling ? place <= limit : place >= limit));
  const place = found < 0 ? places.length : found;
  if (places[place] === limit || (kind === "line" && slider.dense)) return [place, place];
  return [place - 1, kind === "step" && found < 0 ? null : place];
}

const firesAt = (slider, code, place) => (slider.kind === "class" ? code === place : code <= place);

function ones(bits) {
  let count = 0;
  for (; bits; bits &= bits - 1) count++;
  return count;
}

// {kept, bits, why} of a token; `bits` are the scores whose rule fires, `why` is what decided against the rules.
function verdictOf(bits, flags, least) {
  const rules = ones(bits) >= least, wanted = rules || Boolean(flags & FORCED), kept = !wanted || Boolean(flags & PROTECTED);
  return {kept, bits, why: wanted && kept ? "protected" : !kept && !rules ? "forced" : ""};
}

// Counts of the dataset with each slider at a place, without min_kept.
function count(places) {
  const width = sliders.length, least = needed();
  const result = {tokens: 0, dropped: 0, loose: 0, fired: Object.fromEntries(scores.map((score) => [score.name, 0]))};
  cells.weights.forEach((weight, cell) => {
    let bits = 0;
    scores.forEach((score, place) => {
      if (score.sliders.some((i) => firesAt(sliders[i], cells.codes[cell * width + i], places[i]))) bits |= 1 << place;
    });
    result.tokens += weight;
    const lost = verdictOf(bits, cells.flags[cell], least).kept ? 0 : weight;
    result.dropped += lost;
    if (cells.flags[cell] & LOOSE) result.loose += lost;  // kept if another token of its character is
    scores.forEach((score, place) => { if (bits >> place & 1) result.fired[score.name] += weight; });
  });
  return result;
}

// Why a run with this block would have other scores; "" if it would not.
function unknown() {
  if (state.marks.length) return "marks";
  return sliders.some((slider, i) => slider.rescored && isMoved(slider, i)) ? "rescored" : "";
}

// {dropped: [low, high], fired: {name: [low, high]}} of a run with this block; null where only a run can tell.
function counted() {
  const ranges = sliders.map((slider, i) => placesOf(slider, state.values[i]));
  if (unknown() || ranges.some((range) => range[1] === null)) return null;
  const [low, high] = [0, 1].map((end) => count(ranges.map((range) => range[end])));
  const fired = Object.fromEntries(scores.map(({name}) => [name, [low.fired[name], high.fired[name]]]));
  const own = S.totals.dropped_tokens;
  return {fired, dropped: moved() ? [Math.max(0, low.dropped - low.loose - D.whatif.slack), high.dropped] : [own, own]};
}

// Whether a run keeps as many tokens of an answer as the page shows. min_kept brings tokens back where fewer are left, and
// between two known values of a slider the page shows the lower one.
function isCounted(kept) {
  const known = (slider, i) => { const [low, high] = placesOf(slider, state.values[i]); return slider.kind === "line" || low === high; };
  return !unknown() && (!moved() || (kept > S.config.min_kept && sliders.every(known)));
}

// The text of each token. A character spread over several tokens is in the first; the others show "◌".
function textsOf(raw, shown) {
  const texts = Array.from(raw.ids, shown);
  for (const [first, length, text] of raw.joined) texts.fill("◌", first, first + length)[first] = text;
  return texts;
}

const plainOf = (id) => (Object.hasOwn(D.odd, id) ? D.odd[id][0] : D.tokens[id].replaceAll("·", " ").replaceAll("↵\n", "\n").replaceAll("⇥", "\t"));

// The regular expression of each token that is shown with codes, by token; null: it is not text. See `odd` in Python.
function expressionsOf(raw) {
  const found = new Map();
  raw.ids.forEach((id, i) => { if (Object.hasOwn(D.odd, id)) found.set(i, D.odd[id][1]); });
  for (const [first, length, , expression] of raw.joined) {
    for (let i = first; i < first + length; i++) found.delete(i);
    found.set(first, expression);
  }
  return found;
}

// The text that such an expression matches.
const spelt = (expression) => expression.replace(/\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U([0-9a-f]{8})|(.))/gs,
  (_, byte, short, long, char) => char ?? String.fromCodePoint(parseInt(byte ?? short ?? long, 16)));

const documents = D.documents.map((given) => {
  const raw = {...given, ids: shorts(given.ids)};
  const plain = textsOf(raw, plainOf), expressions = expressionsOf(raw);
  const begins = [], ends = [];  // where each token begins and ends in `spelling`
  let spelling = "";
  plain.forEach((text, i) => {
    const inside = text === "◌" && i > 0 && !expressions.has(i), known = expressions.get(i);
    begins[i] = inside ? begins[i - 1] : spelling.length;
    if (!inside) spelling += typeof known === "string" ? spelt(known) : text;
    ends[i] = spelling.length;
  });
  return {...raw, plain, expressions, begins, ends, spelling, visible: textsOf(raw, (id) => D.tokens[id]), codes: raw.codes.map(bytes),
    flags: bytes(raw.flags), reasons: shorts(raw.reasons), units: shorts(raw.units), gaps: new Map(raw.gaps),
    scores: Object.fromEntries(Object.entries(raw.scores).map(([name, text]) => [name, floats(text)])),
    text: plain.filter((text) => text !== "◌").join("")};
});

// Whether a slider's rule fires on a token of a document; between two known values, as at the lower one.
function firesOn(doc, index, token, place) {
  const slider = sliders[index], value = state.values[index];
  if (slider.kind !== "line") return firesAt(slider, doc.codes[index][token], place);
  if (value === null) return false;
  const score = doc.scores[slider.score][token], limit = threshold(slider, value);
  return above(slider) ? score > limit : score < limit;
}

// {kept, bits, why, mark} of each completion token of a document, with sliders and marks where they are. As in a run,
// what is marked keep or protected by the block is not dropped by a mark; what is protected as format is.
function decide(doc) {
  const found = moved() ? movedTo(doc) : own(doc);
  const marks = (keep) => state.marks.filter((mark) => mark.keep === keep).flatMap((mark) => matched(doc, mark));
  for (const token of marks(false)) Object.assign(found[token], doc.flags[token] & GIVEN ? {why: "protected"} : {kept: false, mark: "drop"});
  for (const token of marks(true)) Object.assign(found[token], {kept: true, mark: "keep"});
  return found;
}

function movedTo(doc) {
  const least = needed(), places = sliders.map((slider, i) => placesOf(slider, state.values[i])[0]);
  const found = Array.from(doc.flags, (flags, token) => {
    let bits = 0;
    scores.forEach((score, place) => { if (score.sliders.some((i) => firesOn(doc, i, token, places[i]))) bits |= 1 << place; });
    return verdictOf(bits, flags, least);
  });
  for (const [first, length] of doc.joined) {  // a character of which a token is kept is kept whole
    const tokens = found.slice(first, first + length), some = tokens.some((token) => token.kept);
    for (const token of tokens) if (some && !token.kept) Object.assign(token, {kept: true, why: "protected"});
  }
  return found;
}

function own(doc) {  // the run's own decisions
  return Array.from(doc.reasons, (reason, i) => ({
    kept: Boolean(doc.flags[i] & KEPT),
    bits: scores.reduce((bits, score, place) => (reason & D.bits[score.name] ? bits | 1 << place : bits), 0),
    why: Object.keys(DECISIONS).find((name) => reason & D.bits[name]) || "",
  }));
}

// Python's classes, which know all scripts; JavaScript's `\b` and `\d` know ASCII alone.
const WORD = "[\\p{L}\\p{N}_]";
const CLASSES = {"\\b": `(?:(?<=${WORD})(?!${WORD})|(?<!${WORD})(?=${WORD}))`, "\\d": "\\p{Nd}", "\\s": "[\\p{Z}\\t-\\r\\x1c-\\x1f\\x85]"};

// Tokens of a document that a mark's pattern matches; Python's syntax, as `pattern_of` writes it.
function matched(doc, mark) {
  const folded = mark.pattern.startsWith("(?i:"), body = folded ? mark.pattern.slice(4, -1) : mark.pattern;
  const text = body.replace(/\\(?:[\\bds]|U([0-9a-f]{8}))/g, (all, hex) => (hex ? String.fromCodePoint(parseInt(hex, 16)) : CLASSES[all] || all));
  const found = [];
  for (const match of doc.spelling.matchAll(new RegExp(text, folded ? "giu" : "gu"))) {
    const start = match.index, end = start + match[0].length;
    doc.ends.forEach((until, i) => { if (until > start && doc.begins[i] < end) found.push(i); });
  }
  return found;
}

// A regular expression for the tokens from `first` up to `end`; null if they are not text. See `pattern_of` in Python.
function patternOf(doc, first, end) {
  let text = "", body = "", missing = false;
  for (let i = first; i < end; i++) {
    const known = doc.expressions.get(i);
    if (doc.plain[i] === "◌" && known === undefined) continue;
    missing ||= known === null;
    text += doc.plain[i];
    body += known === undefined ? doc.plain[i].replace(/[\\.^$*+?{}[\]|()]/g, "\\$&") : known;
  }
  const bare = text.trim();
  if (missing || !bare) return null;
  body = body.trim().replaceAll("\n", "\\n").replaceAll("\t", "\\t");
  const edge = (char) => (/[\p{L}\p{N}_]/u.test(char) ? "\\b" : "");
  if (bare.split(/\s+/).length < 3) body = edge(Array.from(bare)[0]) + body + edge(Array.from(bare).at(-1));
  return {text: bare, pattern: body + (text.slice(text.trimEnd().length).includes("\n") ? "\\n*" : "")};
}

// A mark on a pattern; the same one again takes it back.
function mark(text, pattern, keep) {
  const before = state.marks.find((each) => each.pattern === pattern);
  state.marks = state.marks.filter((each) => each !== before);
  if (!before || before.keep !== keep) state.marks.push({text, pattern, keep});
  refresh();
}

// The block with sliders and marks as they are.
function block() {
  const made = structuredClone(D.block);
  if (!same(state.combine, S.config.combine)) made.combine = state.combine;
  for (const score of scores) {
    const changed = score.sliders.filter((i) => isMoved(sliders[i], i));
    if (!changed.length) continue;
    const mine = lookup(S.config.selectors, score.name), drop = {...partOf(score.name).drop};
    for (const i of changed) {
      if (state.values[i] === null) delete drop[sliders[i].key];
      else drop[sliders[i].key] = state.values[i];
    }
    const on = Object.keys(drop).some((key) => key !== "of");
    const home = mine ? made.selectors = {...made.selectors} : made;
    home[score.name] = on ? {...lookup(home, score.name), drop} : false;
    if (mine && !on && !D.preset_selectors.includes(score.name)) delete home[score.name];
  }
  const patterns = (keep) => state.marks.filter((each) => each.keep === keep).map((each) => each.pattern);
  if (patterns(true).length) made.protect = {...made.protect, patterns: [...S.config.protect.patterns, ...patterns(true)]};
  if (patterns(false).length) made.force_drop = [...S.config.force_drop, ...patterns(false)];
  return "xtf:\n" + yaml(made, "  ");
}

const escapedChar = (char) => "\\u" + char.charCodeAt(0).toString(16).padStart(4, "0");

function scalar(value) {
  if (typeof value === "number") return String(value).replace(/^(-?\d+)e/, "$1.0e");  // YAML 1.1 reads 1e-5 as text
  if (typeof value !== "string") return String(value);
  const plain = /^[A-Za-z][\w/]*$/.test(value) && !/^(y|n|yes|no|on|off|true|false|null)$/i.test(value);
  return plain ? value : JSON.stringify(value).replace(/[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]/g, escapedChar);
}

// Mappings and lists over several lines, a mapping of numbers and names on one.
function yaml(mapping, indent) {
  return Object.entries(mapping).map(([key, value]) => {
    const head = `${indent}${scalar(key)}:`;
    if (value === null || typeof value !== "object") return `${head} ${scalar(value)}\n`;
    const parts = Object.entries(value);
    if (Array.isArray(value) && value.length) return `${head}\n` + value.map((each) => `${indent}  - ${scalar(each)}\n`).join("");
    if (!parts.length) return `${head} ${Array.isArray(value) ? "[]" : "{}"}\n`;
    if (indent.length > 2 && parts.every(([, each]) => each === null || typeof each !== "object")) {
      return `${head} {${parts.map(([name, each]) => `${scalar(name)}: ${scalar(each)}`).join(", ")}}\n`;
    }
    return `${head}\n${yaml(value, indent + "  ")}`;
  }).join("");
}
