// Scores and decisions in words.
"use strict";

const ATTRIBUTES = {
  reasoning_importance: "reasoning importance", knowledge_novelty: "knowledge novelty", task_relevance: "task relevance",
};
const DECISIONS = {
  protected: "kept: protected", floor: "kept: the document's floor (min_kept)", forced: "dropped: force_drop",
  control: "decided by the random control",
};
const FRACTIONS = [[0.1, "a tenth of"], [0.2, "a fifth of"], [0.25, "a quarter of"], [1 / 3, "a third of"], [0.5, "half of"]];

const number = (value) => value.toLocaleString("en-US");
const share = (part, whole) => (whole ? 100 * part / whole : 0).toFixed(2) + " %";
const short = (value) => String(Number(value.toPrecision(3)));
// Selectors are called what their users like, `constructor` included: only what an object holds itself is looked up.
const lookup = (mapping, name) => (mapping && Object.hasOwn(mapping, name) ? mapping[name] : undefined);
const named = (voter) => lookup(ATTRIBUTES, voter) || voter;
const selector = (voter) => lookup(S.config.selectors, voter);

function percent(probability) {
  const value = 100 * probability;
  if (value < 0.01) return "less than 0.01 %";
  if (value > 99.99) return "more than 99.99 %";
  return (value >= 10 && value <= 99 ? value.toFixed(0) : value.toFixed(2).replace(/\.?0+$/, "")) + " %";
}

function attention(value) {
  if (value < 0.05) return `next to no attention (${short(value)} of uniform)`;
  if (value > 0.9 && value < 1.1) return `about uniform attention (${short(value)})`;
  if (value >= 1.1) return `${short(value)} times uniform attention`;
  const nearest = FRACTIONS.reduce((a, b) => (Math.abs(b[0] - value) < Math.abs(a[0] - value) ? b : a));
  return value > 0.6 ? `${short(value)} of uniform attention` : `about ${nearest[1]} uniform attention (${short(value)})`;
}

function surprise(value) {
  const less = value >= 0 ? "less" : "more";
  return `${short(Math.abs(value))} nats ${less} surprising than the model expected`;
}

function inWords(voter, value) {
  if (Number.isNaN(value)) return "no score";
  if (voter === "reasoning_importance") return attention(value);
  if (voter === "knowledge_novelty") return `the model gives it ${percent(1 - value)}`;
  if (voter === "task_relevance") return `relevance ${short(value)} (0 to 1)`;
  const {scorer, unit} = selector(voter) || {};
  if (scorer === "typicality") return surprise(value);
  if (scorer === "opening") {
    return `its ${unit === "both" ? "sentence or line" : unit || "sentence"} begins ${surprise(value)}`;
  }
  return `score ${short(value)}`;
}

// Of a rule with a window, the score is the mean of several tokens.
function averaged(voter) {
  const {window} = selector(voter) || S.config[voter];
  return window === 1 ? "" : ` (mean over ${typeof window === "string" ? `its ${window}` : `${window} tokens`})`;
}

function verdict(token) {
  const rules = voters.filter((_, place) => token.bits >> place & 1).map((voter) => named(voter.name));
  const fired = rules.length ? ` (fired: ${rules.join(", ")})` : "";
  if (token.why) return DECISIONS[token.why] + fired;
  if (token.kept) return rules.length ? `kept: too few rules fired${fired}` : "kept";
  return `dropped: ${rules.join(", ")}`;
}

function stopText(slider, stop) {
  if (slider.key === "") return "as in the run";
  if (stop === null) return "off";
  const name = named(slider.voter);
  const texts = {
    below: () => `${name} below ${short(stop)}`, quantile: () => `the lowest ${short(100 * stop)} % of ${name}`,
    fence: () => `below Q1 − ${short(stop)} · IQR`, known_above: () => `given more than ${short(100 * stop)} % by the model`,
    unknown_below: () => `given less than ${short(100 * stop)} % by the model`, cluster: () => `class ${stop} of ${name}`,
  };
  return texts[slider.key]();
}
