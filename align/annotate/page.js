"use strict";

// Texts of models and data become text nodes, always: nothing here makes markup of a string.

const by = (id) => document.getElementById(id);
const LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";
// Characters that turn the order of what follows, and control characters, are shown by name and have no effect.
const HIDDEN = /[\u202A-\u202E\u2066-\u2069\u0000-\u0008\u000B\u000C\u000E-\u001F\u007F]/g;
const token = location.hash.slice(1);

let item = null;      // what is shown
let ranks = {};       // by the answer's id
let good = true;
let here = 0;         // the marked answer
let since = 0;        // when it was shown
let busy = false;

function element(kind, className, text) {
  const made = document.createElement(kind);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function name(index) {
  return index < 26 ? LETTERS[index] : LETTERS[Math.floor(index / 26) - 1] + LETTERS[index % 26];
}

// A text in pieces: what stands in code fences is set as code, the fences themselves stay where they are.
function write(into, text) {
  if (!text.trim()) {
    into.append(element("div", "empty", "(empty)"));
    return;
  }
  let lines = [], fenced = false;
  const flush = (code) => {
    if (lines.some((line) => line.trim())) {
      const piece = element("div", code ? "code" : "text");
      piece.dir = code ? "ltr" : "auto";
      plain(piece, lines.join("\n").replace(/^\n+|\n+$/g, ""));
      into.append(piece);
    }
    lines = [];
  };
  for (const line of text.split("\n")) {
    if (/^\s*```/.test(line)) {
      if (!fenced) flush(false);
      lines.push(line);
      if (fenced) flush(true);
      fenced = !fenced;
    } else {
      lines.push(line);
    }
  }
  flush(fenced);
}

function plain(into, text) {
  let from = 0;
  for (const found of text.matchAll(HIDDEN)) {
    into.append(text.slice(from, found.index));
    const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    into.append(element("span", "mark", `U+${code}`));
    from = found.index + 1;
  }
  into.append(text.slice(from));
}

function turns(into, said, named) {
  for (const turn of said) {
    if (named) into.append(element("p", "who", turn.role));
    write(into, turn.text);
  }
}

function show(state) {
  const { progress } = state;
  const judged = progress.ranked + progress.skipped;
  by("bar").style.width = `${(100 * judged) / progress.all}%`;
  const parts = [`${progress.ranked} of ${progress.all} ranked`];
  if (progress.skipped) parts.push(`${progress.skipped} skipped`);
  if (progress.minutes_left !== null) {
    parts.push(progress.minutes_left < 1 ? "less than a minute left" : `about ${Math.round(progress.minutes_left)} min left`);
  }
  by("progress").textContent = parts.join(" · ");
  by("annotator").textContent = progress.annotator;
  document.title = `${progress.ranked} of ${progress.all} · align`;
  item = state.item;
  ranks = item ? { ...item.ranks } : {};
  good = item ? item.good : true;
  here = 0;
  since = performance.now();
  by("prompt").hidden = by("answers").hidden = item === null;
  by("done").hidden = item !== null;
  for (const id of ["save", "none", "skip"]) by(id).disabled = item === null;
  by("undo").disabled = judged === 0;
  if (item) {
    draw();
  } else {
    by("done").querySelector("h1").textContent = "That was the last one.";
    by("done").querySelector("p").textContent =
      `${progress.ranked} ranked, ${progress.skipped} skipped; all of it is saved. You may close this page and stop the server with Ctrl-C.`;
    by("again").hidden = progress.skipped === 0;
  }
  scrollTo(0, 0);
}

function draw() {
  const prompt = by("prompt"), answers = by("answers"), count = item.answers.length;
  prompt.replaceChildren();
  turns(prompt, item.prompt, item.prompt.length > 1);
  prompt.scrollTop = prompt.scrollHeight;  // the turn that is answered is the last one
  answers.replaceChildren();
  answers.dataset.columns = count <= 3 ? count : count === 4 ? 2 : count <= 6 ? 3 : 4;
  answers.classList.toggle("many", count > 3);
  item.answers.forEach((answer, index) => {
    const card = element("article", "card");
    const head = element("div", "head"), chips = element("div", "chips");
    head.append(element("span", "letter", name(index)), chips);
    for (let rank = 1; rank <= Math.min(count, 9); rank += 1) {
      const chip = element("button", "", String(rank));
      chip.type = "button";
      chip.setAttribute("aria-label", `${name(index)}: rank ${rank}`);
      chip.addEventListener("click", () => { here = index; give(ranks[answer.id] === rank ? 0 : rank, false); });
      chips.append(chip);
    }
    const body = element("div", "body");
    body.tabIndex = 0;
    turns(body, answer.turns, answer.turns.length > 1);
    card.addEventListener("click", () => { here = index; mark(false); });
    body.addEventListener("focus", () => { here = index; mark(false); });
    card.append(head, body);
    answers.append(card);
  });
  mark(true);
}

function mark(move) {
  [...by("answers").children].forEach((card, index) => {
    const rank = ranks[item.answers[index].id];
    card.classList.toggle("here", index === here);
    card.classList.toggle("ranked", rank !== undefined);
    card.querySelector(".letter").textContent = rank === undefined ? name(index) : `${name(index)} · ${rank}`;
    card.querySelectorAll(".chips button").forEach((chip, place) => chip.setAttribute("aria-pressed", String(place + 1 === rank)));
    card.querySelector(".body").setAttribute("aria-label", `Answer ${name(index)}${rank === undefined ? "" : `, rank ${rank}`}`);
    if (index === here && move) {
      card.querySelector(".body").focus({ preventScroll: true });
      card.scrollIntoView({ block: "nearest" });
    }
  });
  by("none").setAttribute("aria-pressed", String(!good));
  const left = item.answers.flatMap((answer, index) => (ranks[answer.id] === undefined ? [name(index)] : []));
  by("save").disabled = left.length > 0;
  if (!left.length) say("All ranked. Enter saves.");
  else if (left.length < item.answers.length) say(`Still without a rank: ${left.join(", ")}`);
}

function give(rank, move) {
  const { id } = item.answers[here];
  if (rank > Math.min(item.answers.length, 9)) return;
  if (rank) ranks[id] = rank; else delete ranks[id];
  if (rank && move) {
    const count = item.answers.length;
    for (let step = 1; step < count; step += 1) {
      const next = (here + step) % count;
      if (ranks[item.answers[next].id] === undefined) { here = next; break; }
    }
  }
  mark(move);
}

function say(text, bad) {
  by("message").textContent = text;
  by("message").classList.toggle("bad", Boolean(bad));
}

async function call(path, sent, done) {
  if (busy) return;
  busy = true;
  try {
    const how = { headers: { "X-Align-Token": token }, cache: "no-store" };
    if (sent) {
      how.method = "POST";
      how.headers["Content-Type"] = "application/json";
      how.body = JSON.stringify(sent);
    }
    let answer;
    try {
      answer = await fetch(path, how);
    } catch {
      say("The server does not answer. What was saved is kept; this one is not saved yet. Start the command again and open the address that it prints.", true);
      return;
    }
    const found = await answer.json();
    if (answer.ok) {
      show(found);
      if (done) say(done);
    } else {
      say(found.problem, true);
    }
  } finally {
    busy = false;
  }
}

function save() {
  if (!item || by("save").disabled) return;
  const seconds = (performance.now() - since) / 1000;
  call("/api/rank", { prompt_id: item.prompt_id, ranks, good, seconds }, "Saved.");
}
function skip() { if (item) call("/api/skip", { prompt_id: item.prompt_id }, "Skipped."); }
function undo() { if (!by("undo").disabled) call("/api/undo", {}, "Taken back; save it again."); }
function monospace() { document.body.classList.toggle("plain"); }
function none() { if (item) { good = !good; mark(false); } }

by("save").addEventListener("click", save);
by("skip").addEventListener("click", skip);
by("undo").addEventListener("click", undo);
by("none").addEventListener("click", none);
by("again").addEventListener("click", () => call("/api/skipped"));
by("ask").addEventListener("click", () => by("help").showModal());
by("close").addEventListener("click", () => by("help").close());

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || by("help").open) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const acts = { Enter: save, s: skip, u: undo, x: none, m: monospace, "?": () => by("help").showModal() };
  if (item) {
    const count = item.answers.length;
    acts.ArrowRight = () => { here = (here + 1) % count; mark(true); };
    acts.ArrowLeft = () => { here = (here + count - 1) % count; mark(true); };
    acts.Backspace = () => give(0, false);
    if (/^[0-9]$/.test(key)) acts[key] = () => give(Number(key), key !== "0");
  }
  if (acts[key]) {
    event.preventDefault();
    acts[key]();
  }
});

if (token) call("/api/next", null, "Rank the answers: 1 is best. ? shows the keys.");
else say("This address lacks its token: open the one that the command printed, to its end.", true);
