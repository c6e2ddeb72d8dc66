// The page's data and its counts: the same steps as xtf_plugin/selection/select.py, without the floor (min_kept).
"use strict";

const PROTECTED = 1, FORCED = 2, KEPT = 4;
const D = JSON.parse(document.getElementById("data").textContent);
const S = D.summary;

const bytes = (text) => Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
const shorts = (text) => new Uint16Array(bytes(text).buffer);
const floats = (text) => new Float32Array(bytes(text).buffer);

const sliders = D.whatif.sliders.map((slider) => ({
  ...slider, fires: slider.patterns.map((text) => Array.from(text, (bit) => bit === "1")),
}));
const scores = [];  // {name, sliders: indices}, in the block's order
sliders.forEach((slider, index) => {
  const last = scores[scores.length - 1];
  if (last && last.name === slider.score) last.sliders.push(index);
  else scores.push({name: slider.score, sliders: [index]});
});
const cells = {codes: bytes(D.whatif.cells), flags: bytes(D.whatif.flags), weights: D.whatif.weights};
const start = sliders.map((slider) => slider.at);
const state = {at: start.slice(), combine: S.config.combine};

// Whether a score's rule is on.
const isOn = (score, at) => score.sliders.some((i) => sliders[i].key === "" || sliders[i].stops[at[i]] !== null);
const activeScores = (at) => scores.filter((score) => isOn(score, at)).length;

function needed(combine, at) {
  const active = activeScores(at);
  const named = {union: 1, intersection: active, majority: Math.floor(active / 2) + 1};
  return Math.max(1, typeof combine === "string" ? named[combine] : combine.at_least);
}

// The bits of the scores whose rule fires on a token; code(i) is the token's pattern of slider i.
function fired(code, at) {
  let bits = 0;
  scores.forEach((score, place) => {
    if (score.sliders.some((i) => sliders[i].fires[code(i)][at[i]])) bits |= 1 << place;
  });
  return bits;
}

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

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

function count(at, combine) {
  const width = sliders.length, least = needed(combine, at);
  const result = {tokens: 0, dropped: 0, fired: Object.fromEntries(scores.map((score) => [score.name, 0]))};
  cells.weights.forEach((weight, cell) => {
    const bits = fired((i) => cells.codes[cell * width + i], at);
    result.tokens += weight;
    if (!verdictOf(bits, cells.flags[cell], least).kept) result.dropped += weight;
    scores.forEach((score, place) => { if (bits >> place & 1) result.fired[score.name] += weight; });
  });
  return result;
}

// The text of each token. A character spread over several tokens is in the first; the others show "◌".
function shownTokens(ids, joined) {
  const texts = Array.from(ids, (id) => D.tokens[id]);
  for (const [first, length, text] of joined) texts.fill("◌", first, first + length)[first] = text;
  return texts;
}

const documents = D.documents.map((raw) => {
  const shown = shownTokens(shorts(raw.ids), raw.joined);
  return {...raw, shown, codes: raw.codes.map(bytes), flags: bytes(raw.flags), reasons: shorts(raw.reasons), gaps: new Map(raw.gaps),
    scores: Object.fromEntries(Object.entries(raw.scores).map(([name, text]) => [name, floats(text)])),
    text: shown.filter((text) => text !== "◌").join("")};
});

const moved = () => state.at.some((place, i) => place !== start[i]) || !same(state.combine, S.config.combine);

// {kept, bits, why} of each completion token of a document, with the sliders where they are.
function decide(doc) {
  if (!moved()) return own(doc);
  const least = needed(state.combine, state.at);
  return Array.from(doc.flags, (flags, i) => verdictOf(fired((s) => doc.codes[s][i], state.at), flags, least));
}

function own(doc) {  // the run's own decisions
  return Array.from(doc.reasons, (reason, i) => ({
    kept: Boolean(doc.flags[i] & KEPT),
    bits: scores.reduce((bits, score, place) => (reason & D.bits[score.name] ? bits | 1 << place : bits), 0),
    why: Object.keys(DECISIONS).find((name) => reason & D.bits[name]) || "",
  }));
}

const spaced = (value) => JSON.stringify(value, null, 1).replace(/([{[])\n */g, "$1").replace(/\n *([}\]])/g, "$1").replace(/\n */g, " ");

// The block with the sliders' values as YAML: a line for each top key, values in flow style (JSON).
function block() {
  const made = structuredClone(D.block);
  if (!same(state.combine, S.config.combine)) made.combine = state.combine;
  for (const score of scores) {
    const moved = score.sliders.filter((i) => state.at[i] !== start[i]);
    if (!moved.length) continue;
    const own = lookup(S.config.selectors, score.name), part = structuredClone(partOf(score.name));
    for (const i of moved) {
      const stop = sliders[i].stops[state.at[i]];
      if (stop === null) delete part.drop[sliders[i].key];
      else part.drop[sliders[i].key] = stop;
    }
    const value = Object.keys(part.drop).some((key) => key !== "of") ? part : false;
    if (own) made.selectors = {...made.selectors, [score.name]: value};
    if (own && value === false && !D.preset_selectors.includes(score.name)) delete made.selectors[score.name];
    if (!own) made[score.name] = value;
  }
  return "xtf:\n" + Object.entries(made).map(([key, value]) => `  ${key}: ${spaced(value)}\n`).join("");
}
