// Sliders, marks and the block: other thresholds, counted over the whole dataset and shown in the sampled documents.
"use strict";

const rangeOf = (score) => {
  const data = lookup(S.distributions, score);
  return data && data.edges.length ? [data.edges[0], data.edges[data.edges.length - 1]] : null;
};

// Thresholds at a slider's value, in units of the score; between two known ones, what lies between.
function limitsOf(slider, value) {
  if (slider.kind === "fixed") return slider.limits[0];
  if (value === null) return [];
  if (slider.kind === "line") return [threshold(slider, value)];
  const [low, high] = placesOf(slider, value), one = slider.limits[low] || [], other = slider.limits[high] || [];
  if (low === high || !one.length || !other.length) return other.length ? other : one;
  const part = (value - slider.places[low]) / (slider.places[high] - slider.places[low]);
  return [one[0] + part * (other[0] - one[0])];
}

// The value whose threshold is at a place of the histogram, short enough to read.
function valueAt(slider, limit) {
  if (slider.kind === "step") {
    const far = (i) => (slider.limits[i].length ? Math.abs(slider.limits[i][0] - limit) : Infinity);
    return slider.places[slider.places.map((_, i) => i).reduce((best, i) => (far(i) < far(best) ? i : best), 0)];
  }
  const [low, high] = rangeOf(slider.score), value = (limit - slider.line[0]) / slider.line[1];
  const digits = Math.ceil(-Math.log10((high - low) / Math.abs(slider.line[1]) / 300));
  return clamped(slider, Number(value.toFixed(Math.max(0, Math.min(20, digits)))));
}

// Legal values of a key: [least, most].
const BOUNDS = {of_median: [0, 1], known_above: [0, 1], unknown_below: [0, 1], quantile: [0, 1], fence: [0, Infinity]};
const boundsOf = (slider) => (slider.kind === "class" ? [1, slider.places.length] : lookup(BOUNDS, slider.key) || [-Infinity, Infinity]);
const clamped = (slider, value) => Math.min(boundsOf(slider)[1], Math.max(boundsOf(slider)[0], value));

// The histogram of a score; lines are the thresholds, and what they drop is tinted.
function histogram(score) {
  const data = lookup(S.distributions, score), height = 70, most = Math.max(...data.tokens, 1), step = 100 / data.tokens.length;
  const [low, high] = rangeOf(score), middle = (i) => (data.edges[i] + data.edges[i + 1]) / 2;
  const label = `${named(score)}: from ${short(low)} to ${short(high)}, median ${short(data.median)}`;
  const picture = make("svg", {viewBox: `0 0 100 ${height}`, preserveAspectRatio: "none", class: "histogram", role: "img", "aria-label": label});
  const own = sliders.map((slider, i) => ({slider, limits: limitsOf(slider, state.values[i])})).filter(({slider}) => slider.score === score);
  const lost = (value) => own.some(({slider, limits}) => limits.length && (slider.kind === "class" ? inClass(slider, limits, value)
    : above(slider) ? value > limits[0] : value < limits[0]));
  data.tokens.forEach((tokens, i) => {
    const tall = tokens ? Math.max(1, height * Math.sqrt(tokens / most)) : 0;
    picture.append(make("rect", {class: lost(middle(i)) ? "lost" : "kept", x: i * step + step * 0.06, y: height - tall, width: step * 0.88, height: tall}));
  });
  for (const limit of own.flatMap(({limits}) => limits)) {
    const x = Math.min(100, Math.max(0, (limit - low) / (high - low) * 100));
    picture.append(make("line", {x1: x, x2: x, y1: 0, y2: height, "vector-effect": "non-scaling-stroke"}));
  }
  return picture;
}

// Whether a score is in the class that a slider of classes drops; its limits are one bound or both.
function inClass(slider, limits, value) {
  if (limits.length === 2) return value > Math.min(...limits) && value <= Math.max(...limits);
  return state.values[sliders.findIndex((each) => each.score === slider.score)] === 1 ? value <= limits[0] : value > limits[0];
}

function showSliders() {
  put("sliders", ...scores.map((score) => {
    const range = rangeOf(score.name), ends = range ? make("p", {class: "ends"}, ...range.map((end) => make("span", {}, short(end)))) : null;
    const rules = score.sliders.map((index, i) => control(index, i ? null : ends));
    return make("section", {class: "score"}, make("h3", {}, named(score.name)), make("div", {class: "scale", id: `histogram-${score.name}`}), ...rules,
      make("p", {id: `counts-${score.name}`, class: "note"}), make("p", {class: "note"}, "The score: ", lookup(D.measures, score.name), "."));
  }));
  put("promise", sliders.some((slider) => slider.key) ? "Move a threshold, or type any number. The figures are those of the whole data set; the bars grow with the square root of their tokens, so that small ones show."
    : "No threshold of this block can be moved.");
  const combine = byId("combine"), own = S.config.combine, choices = ["union", "majority", "intersection"];
  if (typeof own !== "string") choices.push(own);
  combine.replaceChildren(...choices.map((choice) => make("option", {value: JSON.stringify(choice)},
    typeof choice === "string" ? `${{union: "any score", majority: "most scores", intersection: "every score"}[choice]} (${choice})` : `at least ${choice.at_least} scores`)));
  combine.value = JSON.stringify(own);
  combine.disabled = Boolean(S.config.control);
  combine.closest("p").hidden = scores.length < 2;
  combine.addEventListener("change", () => { state.combine = JSON.parse(combine.value); refresh(); });
  byId("reset").addEventListener("click", reset);
  byId("copy").addEventListener("click", copy);
}

// The slider, the field and the switch of one rule; `ends` are those of the scale.
function control(index, ends) {
  const slider = sliders[index], range = rangeOf(slider.score);
  if (slider.kind === "fixed") return make("div", {}, ends, make("p", {class: "note"}, slider.note));
  const set = (value) => { if (value === null || Number.isFinite(value)) { state.values[index] = value; refresh(); } };
  const facts = {"data-score": slider.score, "data-key": slider.key, "data-slider": index};
  const [least, most] = boundsOf(slider), limits = {...(Number.isFinite(least) ? {min: least} : {}), ...(Number.isFinite(most) ? {max: most} : {})};
  const field = make("input", {type: "number", step: slider.kind === "class" ? 1 : "any", ...limits, ...facts, "aria-label": `${named(slider.score)}, ${slider.key}`,
    oninput: (event) => { if (event.target.value !== "") set(Number(event.target.value)); }});
  const on = make("input", {type: "checkbox", ...facts, onchange: (event) => set(event.target.checked ? slider.own : null)});
  const thumb = slider.kind === "class" || !range ? null : make("input", {type: "range", min: range[0], max: range[1], step: "any", ...facts,
    "aria-label": `${named(slider.score)}, threshold`, oninput: (event) => set(valueAt(slider, Number(event.target.value)))});
  return make("div", {class: "slider"}, thumb, ends, make("p", {class: "controls"}, make("label", {}, on, ` ${slider.key} `), field,
    make("span", {class: "note", id: `said-${index}`})), slider.per_document ? make("p", {class: "note"}, "each document has its own threshold; the line is their median") : null);
}

function reset() {
  Object.assign(state, {values: sliders.map((slider) => slider.own), combine: S.config.combine, marks: []});
  byId("combine").value = JSON.stringify(state.combine);
  refresh();
}

async function copy() {
  const said = byId("copied");
  try {
    await navigator.clipboard.writeText(byId("yaml").textContent);
    said.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(byId("yaml"));
    said.textContent = "selected: press Ctrl+C";
  }
}

const NOT_COUNTED = "Not counted: xtf score with this block counts it.";
const UNKNOWN = {
  marks: "Not counted: marks change what the rules see. Run xtf score with this block; stored scores are used again.",
  rescored: "Not counted: another threshold here changes the scores themselves. Run xtf score with this block; stored scores are used again.",
};

function refresh() {
  const now = counted(), all = S.totals.completion_tokens;
  const why = illegal() ? "A run refuses this block." : lookup(UNKNOWN, unknown()) || (now ? "" : NOT_COUNTED);
  for (const slot of ["kept", "dropped"]) byId(`now-${slot}`).parentElement.hidden = Boolean(why);
  if (!why) {
    const [low, high] = now.dropped, change = [low, high].map((value) => value - S.totals.dropped_tokens);
    put("now-dropped", between(now.dropped));
    put("now-kept", between([all - high, all - low]), ` (${share(all - high, all)})`);
    const signed = (value) => `${value < 0 ? "−" : "+"}${number(Math.abs(value))}`;
    put("change", !moved() ? "as in the run" : `${low === high ? signed(change[0]) : change.map(signed).join(" to ")} dropped, compared with the run`);
  } else put("change", why);
  sliders.forEach(refreshSlider);
  for (const {name} of scores) {
    put(`histogram-${name}`, rangeOf(name) ? histogram(name) : make("p", {class: "note"}, "no scores"));
    put(`counts-${name}`, why ? "" : `fires on ${between(now.fired[name])} tokens (${share(now.fired[name][1], all)})`);
  }
  put("yaml", block());
  put("illegal", illegal());
  byId("illegal").hidden = !illegal();
  refreshMarks();
  const changes = sliders.filter(isMoved).length + !same(state.combine, S.config.combine);
  byId("bar").hidden = !changes && !state.marks.length;
  put("bar-text", [state.marks.length ? plural(state.marks.length, "mark") : "", changes ? plural(changes, "setting") + " moved" : ""].filter(Boolean).join(", "));
  if (view.reason) listDocuments();  // other documents may match now
  else shade();
}

function refreshSlider(slider, i) {
  const value = state.values[i];
  for (const input of document.querySelectorAll(`[data-slider="${i}"]`)) {
    if (input.type === "checkbox") input.checked = value !== null;
    else if (input.type === "range") { if (value !== null && limitsOf(slider, value).length) input.value = limitsOf(slider, value)[0]; }
    else if (value === null) input.value = "";
    else if (input.value === "" || Number(input.value) !== value) input.value = value;
  }
  if (byId(`said-${i}`)) put(`said-${i}`, !isMoved(slider, i) ? "" : `${value === null ? "off; " : ""}was ${short(slider.own)}`);
}

function refreshMarks() {
  put("marks", ...state.marks.map((each) => make("li", {class: each.keep ? "keep" : "drop"}, make("b", {}, each.keep ? "keep" : "drop"), " ",
    make("span", {class: "text"}, each.text), ` · in ${plural(documents.filter((doc) => matched(doc, each).length).length, "answer")} of this page `,
    make("button", {type: "button", title: "take this mark back", onclick: () => mark(each.text, each.pattern, each.keep)}, "undo"))));
  for (const button of document.querySelectorAll(".marker")) {
    const set = state.marks.some((each) => each.pattern === button.dataset.pattern && String(each.keep) === button.dataset.keep);
    button.setAttribute("aria-pressed", set);
  }
}

// Why a run would refuse the block; "" if it would not.
function illegal() {
  const active = activeScores();
  for (const [i, slider] of sliders.entries()) {
    const value = state.values[i], [least, most] = boundsOf(slider), open = slider.key === "quantile";
    if (value !== null && slider.key && (value < least || value > most || (open && (value === least || value === most)) || (slider.kind === "class" && !Number.isInteger(value)))) {
      return `A run refuses ${slider.key}: ${value}; it must be ${slider.kind === "class" ? "a whole number " : ""}${open ? "between" : "from"} ${least} ${open ? "and" : "to"} ${most}.`;
    }
  }
  for (const score of scores) {
    const value = (key) => score.sliders.filter((i) => sliders[i].key === key).map((i) => state.values[i])[0] ?? null;
    const known = value("known_above"), unknown = value("unknown_below");
    if (known !== null && unknown !== null && unknown >= known) {
      return "A run refuses this pair: unknown_below must be smaller than known_above.";
    }
  }
  const off = scores.filter((score) => !isOn(score)).map((score) => score.name);
  const asking = scores.find((score) => isOn(score) && off.includes(partOf(score.name).among));
  if (asking) {
    const other = named(partOf(asking.name).among);
    return `A run refuses this block: ${named(asking.name)} asks only about units that ${other} finds doubtful (among), and ${other} is off.`;
  }
  if (!active && !S.config.force_drop.length && !state.marks.some((each) => !each.keep)) return "No rule is left: a run refuses this block. Write xtf: false.";
  if (typeof state.combine !== "string" && state.combine.at_least > active) {
    return `A run refuses this block: ${active} rules are left, and combine asks for ${state.combine.at_least}.`;
  }
  return "";
}
