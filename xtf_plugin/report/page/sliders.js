// The sliders: other thresholds, counted over the whole dataset and shown in the sampled documents.
"use strict";

const SVG = "http://www.w3.org/2000/svg";

function drawn(tag, properties) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
  return element;
}

// The histogram of a score; lines are the thresholds at the sliders' stops.
function histogram(score) {
  const data = lookup(S.distributions, score);
  if (!data || !data.edges.length) return make("p", {}, "no scores");
  const width = 320, height = 70, most = Math.max(...data.tokens, 1), step = width / data.tokens.length;
  const low = data.edges[0], high = data.edges[data.edges.length - 1];
  const label = `${named(score)}: from ${short(low)} to ${short(high)}, median ${short(data.median)}`;
  const picture = drawn("svg", {viewBox: `0 0 ${width} ${height}`, class: "histogram", role: "img", "aria-label": label});
  data.tokens.forEach((tokens, i) => {
    const tall = tokens ? Math.max(1, height * Math.sqrt(tokens / most)) : 0;
    picture.append(drawn("rect", {x: i * step + 0.5, y: height - tall, width: step - 1, height: tall}));
  });
  const own = sliders.map((slider, i) => ({...slider, place: state.at[i]})).filter((slider) => slider.score === score);
  const limits = own.flatMap((slider) => slider.limits[slider.place]);
  for (const limit of limits) {
    const x = Math.min(width - 1, Math.max(1, (limit - low) / (high - low) * width));
    picture.append(drawn("line", {x1: x, x2: x, y1: 0, y2: height}));
  }
  const lacks = (slider) => slider.stops[slider.place] !== null && !slider.limits[slider.place].length;
  const outside = limits.some((limit) => limit < low || limit > high);
  const caption = own.some(lacks) ? "no threshold at this stop" : outside ? "a threshold lies outside" : "heights: square root";
  return make("figure", {}, picture, make("figcaption", {}, make("span", {}, short(low)), make("span", {}, caption),
    make("span", {}, short(high))),
    own.some((slider) => slider.per_document) ? make("p", {class: "note"}, "each document has its own threshold; the line is their median") : null);
}

function showSliders() {
  const boxes = scores.map((score) => {
    const parts = score.sliders.map((index) => {
      const slider = sliders[index], id = `slider-${index}`;
      if (slider.key === "") return make("p", {class: "note"}, slider.note);
      const output = make("output", {for: id, id: `${id}-text`});
      const input = make("input", {type: "range", id, min: 0, max: slider.stops.length - 1, step: 1, value: start[index],
        "data-score": slider.score, "data-key": slider.key, oninput: (event) => move(index, Number(event.target.value))});
      return make("div", {class: "slider"}, make("label", {for: id}, `drop: ${slider.key}`), input, output,
        slider.note ? make("p", {class: "note"}, slider.note) : null);
    });
    return make("section", {class: "score"}, make("h3", {}, named(score.name)), make("p", {class: "note"}, lookup(D.measures, score.name)),
      make("div", {id: `histogram-${score.name}`}), ...parts, make("p", {id: `counts-${score.name}`, class: "counts"}));
  });
  put("sliders", ...boxes);
  put("promise", sliders.some((slider) => slider.key)
    ? "Move a threshold: counts of the whole dataset and the documents below follow, without the tokens that only min_kept keeps."
    : "No threshold of this block can be moved.");
  const combine = document.getElementById("combine"), own = S.config.combine;
  const choices = ["union", "majority", "intersection"];
  if (typeof own !== "string") choices.push(own);
  combine.replaceChildren(...choices.map((choice) => make("option", {value: JSON.stringify(choice)},
    typeof choice === "string" ? choice : `at least ${choice.at_least}`)));
  combine.value = JSON.stringify(own);
  combine.disabled = Boolean(S.config.control);
  combine.parentElement.hidden = scores.length < 2;
  combine.addEventListener("change", () => { state.combine = JSON.parse(combine.value); refresh(); });
  document.getElementById("reset").addEventListener("click", reset);
  document.getElementById("copy").addEventListener("click", copy);
}

function move(index, place) {
  state.at[index] = place;
  refresh();
}

function reset() {
  state.at = start.slice();
  state.combine = S.config.combine;
  document.getElementById("combine").value = JSON.stringify(state.combine);
  sliders.forEach((_, i) => {
    const input = document.getElementById(`slider-${i}`);
    if (input) input.value = start[i];
  });
  refresh();
}

async function copy() {
  const text = document.getElementById("yaml").textContent, said = document.getElementById("copied");
  try {
    await navigator.clipboard.writeText(text);
    said.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(document.getElementById("yaml"));
    said.textContent = "selected: press Ctrl+C";
  }
}

function refresh() {
  const before = count(start, S.config.combine), now = count(state.at, state.combine);
  const dropped = moved() ? now.dropped : S.totals.dropped_tokens;  // the run's own count includes control and floor
  sliders.forEach((slider, i) => {
    const input = document.getElementById(`slider-${i}`), text = stopText(slider, slider.stops[state.at[i]]);
    if (!input) return;
    input.setAttribute("aria-valuetext", text);
    document.getElementById(`slider-${i}-text`).textContent = text + (state.at[i] === start[i] ? " (this run)" : "");
  });
  scores.forEach((score) => {
    put(`histogram-${score.name}`, histogram(score.name));
    put(`counts-${score.name}`, `fires on ${number(now.fired[score.name])} tokens (${share(now.fired[score.name], now.tokens)})`);
  });
  put("now-dropped", number(dropped));
  put("now-kept", number(now.tokens - dropped));
  put("now-share", share(now.tokens - dropped, now.tokens));
  const change = now.dropped - before.dropped;
  put("change", !moved() ? "as in the run" : `${change < 0 ? "−" : "+"}${number(Math.abs(change))} dropped, compared with the run`);
  put("yaml", block());
  put("illegal", illegal());
  document.getElementById("illegal").hidden = !illegal();
  document.body.classList.toggle("moved", moved());
  if (view.reason || view.order !== "given") listDocuments();  // other documents may match now
  else shade();
}

// Why a run would refuse the block; "" if it would not.
function illegal() {
  const active = activeScores(state.at);
  for (const score of scores) {
    const stop = (key) => score.sliders.filter((i) => sliders[i].key === key).map((i) => sliders[i].stops[state.at[i]])[0] ?? null;
    const known = stop("known_above"), unknown = stop("unknown_below");
    if (known !== null && unknown !== null && unknown >= known) {
      return "A run refuses this pair: unknown_below must be smaller than known_above.";
    }
  }
  const off = scores.filter((score) => !isOn(score, state.at)).map((score) => score.name);
  const asking = scores.find((score) => isOn(score, state.at) && off.includes(partOf(score.name).among));
  if (asking) {
    const other = named(partOf(asking.name).among);
    return `A run refuses this block: ${named(asking.name)} asks only about units that ${other} finds doubtful (among), and ${other} is off.`;
  }
  if (!active && !S.config.force_drop.length) return "No rule is left: a run refuses this block. Write xtf: false.";
  if (typeof state.combine !== "string" && state.combine.at_least > active) {
    return `A run refuses this block: ${active} rules are left, and combine asks for ${state.combine.at_least}.`;
  }
  return "";
}
