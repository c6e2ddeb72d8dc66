// Tables and elements of the page. Tokens are untrusted: everything is inserted as elements and text nodes, never as markup.
"use strict";

const PAGE = 20;

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const put = (id, ...children) => document.getElementById(id).replaceChildren(...children);

function table(heads, rows, caption) {
  const numeric = heads.map((_, i) => i > 0 && rows.every((row) => typeof row[i] === "string" && /^[\d.,\s%−]*$/.test(row[i])));
  const line = (kind, texts) => make("tr", {}, ...texts.map((text, i) => {
    const cell = make(i === 0 && kind === "td" ? "th" : kind, i === 0 ? {scope: kind === "th" ? "col" : "row"} : {}, text);
    if (numeric[i]) cell.className = "number";
    return cell;
  }));
  return make("div", {class: "scroll"}, make("table", {}, caption ? make("caption", {}, caption) : null,
    make("thead", {}, line("th", heads)), make("tbody", {}, ...rows.map((row) => line("td", row)))));
}

function bar(part, whole, label) {
  const fill = make("span", {class: "fill"});
  fill.style.width = (whole ? 100 * part / whole : 0) + "%";
  return make("span", {class: "bar", role: "img", "aria-label": label}, fill);
}

function showHeader() {
  const totals = S.totals, reference = S.reference;
  put("facts", make("b", {}, share(totals.kept_tokens, totals.completion_tokens)), " of ",
    make("b", {}, number(totals.completion_tokens)), " completion tokens are trained on, ",
    make("b", {}, number(totals.dropped_tokens)), " are dropped · ", number(totals.documents), " documents · reference ",
    make("b", {}, String(reference.name)), ` (${reference.source})`);
  if (S.streaming) {
    put("sampled", `The data is streamed: all figures are of its first ${number(S.streaming.documents)} documents.`);
  }
  put("advice", lookup(S.familiarity, "advice") || "");
  put("warnings", ...S.warnings.map((text) => make("li", {}, text)));
}

const MOST_FORMATS = 12;

// Tables of earlier versions lack both lists.
function showRecurring() {
  const texts = S.recurring || [], formats = S.formats || [], all = S.totals.documents;
  for (const id of ["recurring", "to-recurring"]) document.getElementById(id).hidden = !texts.length && !formats.length;
  const part = (value) => `${(100 * value).toFixed(0)} %`;
  const rows = texts.map((each) => [make("span", {class: "text"}, each.text), `${number(each.documents)} (${part(each.documents / all)})`,
    decided(each), make("code", {}, each.setting)]);
  const note = "These sentences or lines stand in several documents. A format is to be learned, a phrase that says nothing is not; only a " +
    "reader can tell. To change a decision add its line to the block, beside the patterns that are there.";
  if (rows.length) put("repeated", make("p", {class: "note"}, note), table(["text", "documents", "decision", "line that would change it"], rows));
  put("formats", ...formats.slice(0, MOST_FORMATS).map((each) => make("li", {}, "kept as format: ",
    make("span", {class: "text"}, each.text), ` opens a line in ${part(each.share)} of documents`)),
  formats.length > MOST_FORMATS ? make("li", {}, `and ${number(formats.length - MOST_FORMATS)} more, see summary.json`) : "");
}

function showTotals() {
  const totals = S.totals, all = totals.completion_tokens, rows = [];
  rows.push(["kept", bar(totals.kept_tokens, all, "kept"), number(totals.kept_tokens), share(totals.kept_tokens, all), "", ""]);
  rows.push(["dropped", bar(totals.dropped_tokens, all, "dropped"), number(totals.dropped_tokens), share(totals.dropped_tokens, all), "", ""]);
  for (const [name, facts] of Object.entries(totals.scores)) {
    rows.push([named(name), bar(facts.fired, all, `${named(name)} fired`), number(facts.fired), share(facts.fired, all),
      number(facts.dropped), number(facts.dropped_alone)]);
  }
  for (const [name, tokens] of Object.entries(totals.decided_by)) {
    if (tokens) rows.push([DECISIONS[name], bar(tokens, all, DECISIONS[name]), number(tokens), share(tokens, all), "", ""]);
  }
  put("totals", table(["", "", "tokens", "share", "of these dropped", "by it alone"], rows));
  const emptied = totals.fully_dropped_documents;
  put("emptied", emptied ? `${number(emptied)} documents are dropped in full.` : "No document is dropped in full.");
  const most = Math.max(1, ...S.combinations.filter((c) => c.rules.length).map((c) => c.tokens));
  put("combinations", table(["rules that fired together", "", "tokens", "share"], S.combinations.map((c) => [
    c.rules.map(named).join(" and ") || "none",
    c.rules.length ? bar(c.tokens, most, "tokens") : "", number(c.tokens), share(c.tokens, all)])));
}

function example(entry) {
  const word = make("mark", {}, entry.example.token || "(nothing)");
  return make("span", {class: "text"}, entry.example.before, word, entry.example.after);
}

function showTokens() {
  const heads = ["token", "dropped", "of", "for example"];
  const rows = (entries) => entries.map((e) => [make("span", {class: "text"}, e.token), number(e.tokens), number(e.of), example(e)]);
  const note = (text) => make("p", {}, text);
  const {most_dropped: dropped, borderline_kept: border} = S.tokens;
  put("dropped", dropped.length ? table(heads, rows(dropped), "Most often dropped") : note("Nothing is dropped."));
  heads[1] = "on the border";
  put("border", border.length ? table(heads, rows(border), "Kept, but near a threshold: within two stops of a slider")
    : note("No kept token is within two stops of a threshold."));
  const ends = S.endings;
  put("endings", ends.special_tokens.length ? table(["special token", "labelled", "dropped"], ends.special_tokens.map((e) =>
    [make("span", {class: "text"}, e.token), number(e.labelled), number(e.dropped)])) : note("No special token carries a label."),
    note(`${number(ends.documents_ending_without_one)} of ${number(S.totals.documents)} documents train no end of turn: they were cut off ` +
      "(max_length), their template writes none, or it has no label. The model does not learn to stop from them."));
}

function showRun() {
  const lines = (facts) => Object.entries(facts).map(([name, value]) =>
    [name, make("code", {}, typeof value === "string" ? value : spaced(value))]);
  put("reference", table(["reference", ""], lines(S.reference)));
  put("versions", table(["package", "version"], lines(S.versions)));
  put("settings", table(["setting", ""], lines(S.config)));
  put("scoring", table(["scoring", ""], lines(S.scoring)));
}
