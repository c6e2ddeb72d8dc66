// What the page knows and how it counts: the same steps as xtf_plugin/selection.py, without the floor (min_kept).
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
const voters = [];  // {name, sliders: indices}
sliders.forEach((slider, index) => {
  const last = voters[voters.length - 1];
  if (last && last.name === slider.voter) last.sliders.push(index);
  else voters.push({name: slider.voter, sliders: [index]});
});
const cells = {codes: bytes(D.whatif.cells), flags: bytes(D.whatif.flags), weights: D.whatif.weights};
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

// {kept, bits, why} of a token that these voters fire on; `why` is what decided against the rules.
function verdictOf(bits, flags, least) {
  const rules = ones(bits) >= least, wanted = rules || Boolean(flags & FORCED), kept = !wanted || Boolean(flags & PROTECTED);
  return {kept, bits, why: wanted && kept ? "protected" : !kept && !rules ? "forced" : ""};
}

function count(at, combine) {
  const width = sliders.length, least = needed(combine, at);
  const result = {tokens: 0, dropped: 0, fired: Object.fromEntries(voters.map((voter) => [voter.name, 0]))};
  cells.weights.forEach((weight, cell) => {
    const bits = fired((i) => cells.codes[cell * width + i], at);
    result.tokens += weight;
    if (!verdictOf(bits, cells.flags[cell], least).kept) result.dropped += weight;
    voters.forEach((voter, place) => { if (bits >> place & 1) result.fired[voter.name] += weight; });
  });
  return result;
}

// What each token shows: a character that is spread over several stands in the first, the others have "◌".
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

// What becomes of each completion token of a document, {kept, bits, why}.
function decide(doc) {
  if (!moved()) return own(doc);
  const least = needed(state.combine, state.at);
  return Array.from(doc.flags, (flags, i) => verdictOf(fired((s) => doc.codes[s][i], state.at), flags, least));
}

function own(doc) {  // as the run decided
  return Array.from(doc.reasons, (reason, i) => ({
    kept: Boolean(doc.flags[i] & KEPT),
    bits: voters.reduce((bits, voter, place) => (reason & D.bits[voter.name] ? bits | 1 << place : bits), 0),
    why: Object.keys(DECISIONS).find((name) => reason & D.bits[name]) || "",
  }));
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
