// Scores and decisions in words.
"use strict";

const SLOTS = {
  reasoning_importance: "reasoning importance", knowledge_novelty: "knowledge novelty", task_relevance: "task relevance",
};
const DECISIONS = {
  protected: "kept: protected", floor: "kept: min_kept", forced: "dropped: force_drop",
  control: "decided by the random control",
};
const FRACTIONS = [[0.1, "a tenth of"], [0.2, "a fifth of"], [0.25, "a quarter of"], [1 / 3, "a third of"], [0.5, "half of"]];

const number = (value) => value.toLocaleString("en-US");
const share = (part, whole) => (whole ? 100 * part / whole : 0).toFixed(2) + " %";
const short = (value) => String(Number(value.toPrecision(3)));
// A selector may have any name, `constructor` included, so only own properties are looked up.
const lookup = (mapping, name) => (mapping && Object.hasOwn(mapping, name) ? mapping[name] : undefined);
const named = (score) => lookup(SLOTS, score) || score;
const partOf = (score) => lookup(S.config.selectors, score) || S.config[score];

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

const rounded = (value) => `${(100 * value).toFixed(0).replace(/^-/, "−")} %`;

function explained(score, value, unit) {
  const median = (lookup(S.distributions, score) || {}).median;
  const usual = typeof median === "number" ? `; the median is ${rounded(median)}` : "";
  return value < -0.005 ? `its prompt and the text before it make this ${unit} less probable (${rounded(value)} explained)${usual}`
    : `its prompt and the text before it explain ${rounded(Math.max(0, value))} of this ${unit}${usual}`;
}

function influence(value, unit) {
  if (Math.abs(value) < 0.05) return `this ${unit} does not help to predict the text after it (${short(value)} nats)`;
  return `without this ${unit}, the text after it is ${short(Math.abs(value))} nats ${value < 0 ? "easier" : "harder"} in total`;
}

function repeats(value, unit) {
  return value < 1 ? `${rounded(1 - value)} of this ${unit} repeats earlier text` : `this ${unit} repeats no earlier text`;
}

// Why a scorer gives no score; scorers that have one for every token are left out.
function unscored(part) {
  const texts = {
    influence: () => `not asked${part.among ? `: ${named(part.among)} leaves no doubt, or too little text follows` : ", too little text follows"}`,
    new_text: () => `not asked, fewer than ${part.shortest} tokens`,
  };
  return (lookup(texts, part.scorer) || (() => "no score"))();
}

function inWords(score, value) {
  const part = partOf(score), {scorer, unit} = part;
  if (Number.isNaN(value)) return unscored(part);
  const texts = {
    column: () => `column ${part.column} ${value < 0.5 ? "marks" : "does not mark"} ${unit === "token" ? "it" : `most of this ${unit}`}`,
    explained: () => explained(score, value, unit), influence: () => influence(value, unit), new_text: () => repeats(value, unit),
    attention_received: () => attention(value), novelty: () => `the model gives it ${percent(1 - value)}`,
    embedding_similarity: () => `relevance ${short(value)} (0 to 1)`, typicality: () => surprise(value),
    running_text: () => `${number(Math.round(value))} characters of running text in and around this line`,
  };
  return (lookup(texts, scorer) || (() => `score ${short(value)}`))();
}

// The tokens that the score is a mean over; these scorers have one value for a unit anyway.
function averaged(score) {
  const {scorer, unit, window} = partOf(score);
  if (["explained", "influence", "new_text", "running_text"].includes(scorer)) return "";
  if (unit !== "token") return ` (mean over its ${unit})`;
  return window === 1 ? "" : ` (mean over ${window} tokens)`;
}

function verdict(token) {
  if (token.mark) return `you marked: ${token.mark}`;
  const rules = scores.filter((_, place) => token.bits >> place & 1).map((score) => named(score.name));
  const fired = rules.length ? ` (fired: ${rules.join(", ")})` : "";
  if (token.why) return DECISIONS[token.why] + fired;
  if (token.kept) return rules.length ? `kept: too few rules fired${fired}` : "kept";
  return `dropped: ${rules.join(", ")}`;
}

// Why a rule drops text, by scorer.
function reasonOf(score) {
  const part = partOf(score) || {}, {known_above: known, unknown_below: unknown} = part.drop || {};
  const both = known !== undefined && unknown !== undefined;
  const texts = {
    attention_received: "Gets little attention later", column: `Marked in the column ${part.column}`,
    embedding_similarity: "Far from the words of the domain", excess_loss: "No harder than another model finds it",
    explained: "Does not follow from the prompt", influence: "Doubtful, and not needed later",
    log_probability: "Improbable for the model", new_text: "Repeats earlier text",
    novelty: both ? "Known already, or very improbable" : unknown === undefined ? "The model knows it already" : "Very improbable for the model",
    running_text: "No running text",
    token_cleaning: "A better model finds it no more probable",
    typicality: "Less probable than usual",
  };
  return lookup(texts, part.scorer) || `Low ${named(score)}`;
}

// Of a kind of dropped text: the score whose rule fired, or what else decided. No score can have one of these names.
function kindTitle(why) {
  const others = {forced: "Matches force_drop", control: "Drawn at random by the control", "+": "Several rules fired"};
  return lookup(others, why) || reasonOf(why);
}

// "1,234" where both ends are equal.
const between = ([low, high]) => (low === high ? number(low) : `${number(low)} to ${number(high)}`);
