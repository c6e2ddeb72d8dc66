// What the page knows and how it counts: the same steps as xtf_plugin/whatif.py and selection.py, on the same data.
"use strict";

const PROTECTED = 1, FORCED = 2, TRAINS = 4;
const D = JSON.parse(document.getElementById("data").textContent);
const S = D.summary;

function bytes(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}

function shorts(text) {
  const raw = bytes(text), out = new Uint16Array(raw.length / 2);
  for (let i = 0; i < out.length; i++) out[i] = raw[2 * i] | (raw[2 * i + 1] << 8);
  return out;
}

function longs(text) {
  const raw = bytes(text), view = new DataView(raw.buffer);
  return Array.from({length: raw.length / 4}, (_, i) => view.getUint32(4 * i, true));
}

function halves(text) {  // IEEE 754 binary16
  return Array.from(shorts(text), (bits) => {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    if (exponent === 31) return fraction ? NaN : sign * Infinity;
    return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
  });
}

const sliders = D.whatif.sliders.map((slider) => ({
  ...slider, fires: slider.patterns.map((text) => Array.from(text, (bit) => bit === "1")),
}));
const voters = [];  // {name, sliders: indices}
sliders.forEach((slider, index) => {
  const last = voters[voters.length - 1];
  if (last && last.name === slider.voter) last.sliders.push(index);
  else voters.push({name: slider.voter, sliders: [index]});
});
const cells = {codes: bytes(D.whatif.cells), flags: bytes(D.whatif.flags), weights: D.whatif.weights};
const lasting = {codes: bytes(D.whatif.lasting), tokens: longs(D.whatif.lasting_tokens)};
const start = sliders.map((slider) => slider.at);
const state = {at: start.slice(), combine: S.config.combine};

// A rule that is off is none: its voter is not counted.
function activeVoters(at) {
  const on = (i) => sliders[i].key === "" || sliders[i].stops[at[i]] !== null;
  return voters.filter((voter) => voter.sliders.some(on)).length;
}

function needed(combine, at) {
  const active = activeVoters(at);
  const named = {union: 1, intersection: active, majority: Math.floor(active / 2) + 1};
  return Math.max(1, typeof combine === "string" ? named[combine] : combine.at_least);
}

// The bits of the voters that fire on a token whose pattern of slider i is code(i).
function fired(code, at) {
  let bits = 0;
  voters.forEach((voter, place) => {
    if (voter.sliders.some((i) => sliders[i].fires[code(i)][at[i]])) bits |= 1 << place;
  });
  return bits;
}

const same = (one, other) => JSON.stringify(one) === JSON.stringify(other);

function ones(bits) {
  let count = 0;
  for (; bits; bits &= bits - 1) count++;
  return count;
}

function count(at, combine) {
  const width = sliders.length, least = needed(combine, at);
  const result = {tokens: 0, dropped: 0, rescued: 0, fired: {}, by: {}};
  voters.forEach((voter) => { result.fired[voter.name] = 0; result.by[voter.name] = 0; });
  for (let cell = 0; cell < cells.weights.length; cell++) {
    const weight = cells.weights[cell], bits = fired((i) => cells.codes[cell * width + i], at);
    const flags = cells.flags[cell];
    const gone = (ones(bits) >= least || flags & FORCED) && !(flags & PROTECTED);
    result.tokens += weight;
    if (gone) result.dropped += weight;
    voters.forEach((voter, place) => {
      if (!(bits >> place & 1)) return;
      result.fired[voter.name] += weight;
      if (gone) result.by[voter.name] += weight;
    });
  }
  let from = 0;
  for (const [occurrences, kept, wanted, tokens] of D.whatif.floored) {
    let left = kept;
    for (const end = from + tokens; from < end; from++) {
      if (ones(fired((i) => lasting.codes[from * width + i], at)) < least) left += lasting.tokens[from];
    }
    result.rescued += occurrences * Math.max(0, wanted - left);
  }
  result.dropped -= result.rescued;
  return result;
}

// What each token shows: a character that is spread over several stands in the first, the others have "◌".
function shownTokens(ids, joined) {
  const texts = Array.from(ids, (id) => D.tokens[id]);
  for (const [first, length, text] of joined) texts.fill("◌", first, first + length)[first] = text;
  return texts;
}

const documents = D.documents.map((raw) => ({...raw, ids: shorts(raw.ids)})).map((raw) => ({
  ...raw, shown: shownTokens(raw.ids, raw.joined),
})).map((raw) => ({
  ...raw, at: shorts(raw.at), codes: raw.codes.map(bytes), flags: bytes(raw.flags),
  kept: bytes(raw.kept), reasons: shorts(raw.reasons), order: shorts(raw.order),
  scores: Object.fromEntries(Object.entries(raw.scores).map(([name, text]) => [name, halves(text)])),
  text: raw.shown.filter((text) => text !== "◌").join(""),
}));

// What becomes of each completion token of a document: {kept, bits, why}; `why` is what decided against the rules.
function decide(doc, at, combine) {
  const least = needed(combine, at), moved = at.some((place, i) => place !== start[i]) || !same(combine, S.config.combine);
  if (!moved) return own(doc);
  const found = Array.from(doc.flags, (flags, i) => {
    const bits = fired((s) => doc.codes[s][i], at), rules = ones(bits) >= least;
    const wanted = rules || Boolean(flags & FORCED), kept = !wanted || Boolean(flags & PROTECTED);
    const why = wanted && kept ? "protected" : !kept && !rules ? "forced" : "";
    return {kept, bits, why};
  });
  const trains = found.map((_, i) => i).filter((i) => doc.flags[i] & TRAINS);
  let lacking = doc.whole ? S.config.min_kept - trains.filter((i) => found[i].kept).length : 0;
  for (const i of trains.filter((i) => !found[i].kept).sort((a, b) => doc.order[a] - doc.order[b])) {
    if (lacking-- <= 0) break;
    found[i] = {...found[i], kept: true, why: "floor"};
  }
  return found;
}

function own(doc) {  // as the run decided
  return Array.from(doc.kept, (kept, i) => {
    const names = D.reasons[doc.reasons[i]] || [];
    let bits = 0;
    voters.forEach((voter, place) => { if (names.includes(voter.name)) bits |= 1 << place; });
    return {kept: kept === 1, bits, why: names.find((name) => !voters.some((v) => v.name === name)) || ""};
  });
}

const spaced = (value) => JSON.stringify(value, null, 1).replace(/([{[])\n */g, "$1").replace(/\n *([}\]])/g, "$1").replace(/\n */g, " ");

// The block with the sliders' values, as YAML: top keys as lines, values in flow style, which JSON is.
function block() {
  const made = structuredClone(D.block);
  if (!same(state.combine, S.config.combine)) made.combine = state.combine;
  for (const voter of voters) {
    const moved = voter.sliders.filter((i) => state.at[i] !== start[i]);
    if (!moved.length) continue;
    const own = selector(voter.name), part = structuredClone(own || S.config[voter.name]);
    for (const i of moved) {
      const stop = sliders[i].stops[state.at[i]];
      if (stop === null) delete part.drop[sliders[i].key];
      else part.drop[sliders[i].key] = stop;
    }
    const value = Object.keys(part.drop).some((key) => key !== "of") ? part : false;
    if (own) made.selectors = {...made.selectors, [voter.name]: value};
    if (own && value === false && !D.preset_selectors.includes(voter.name)) delete made.selectors[voter.name];
    if (!own) made[voter.name] = value;
  }
  return "xtf:\n" + Object.entries(made).map(([key, value]) => `  ${key}: ${spaced(value)}\n`).join("");
}
