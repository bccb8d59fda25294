// The conversation: what was asked, what was answered, and what each answer took.
import { inWords } from "./api.js";
import { CanvasView, canvasOptions } from "./canvas.js";
import { byId, make } from "./elements.js";
import { number, say } from "./i18n.js";
import { claim } from "./owners.js";
import { sampling, systemMessages } from "./settings.js";
import { Measure, stream } from "./stream.js";

const turns = []; // { question, answer }, in order; those that failed are not sent again
let running = null; // the AbortController of the answer that is being written

export function setUpChat() {
  const [form, input] = [byId("ask"), byId("prompt")];
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const question = input.value.trim();
    if (!question || running) return;
    input.value = "";
    fit(input);
    ask(question);
  });
  input.addEventListener("input", () => fit(input));
  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return; // 229: an IME
    event.preventDefault();
    form.requestSubmit();
  });
  byId("stop").addEventListener("click", stop);
  byId("new-chat").addEventListener("click", () => {
    stop();
    turns.length = 0;
    byId("log").replaceChildren();
    byId("chat").classList.remove("begun");
    input.focus();
  });
  for (const suggestion of byId("suggestions").children) {
    suggestion.addEventListener("click", () => {
      input.focus();
      if (!running) ask(suggestion.textContent);
    });
  }
}

/** End the answer that is being written, if there is one; says whether there was. */
export function stop() {
  if (!running) return false;
  running.abort();
  running = null;
  setBusy(false);
  return true;
}

async function ask(question) {
  const text = make("p", { className: "text", attributes: { translate: "no" } });
  const facts = make("p", { className: "facts" });
  const canvas = new CanvasView();
  const answer = make("article", { className: "answer", ariaBusy: "true" }, speaker("model"), canvas.element, text, facts);
  const log = byId("log");
  log.append(
    make(
      "article",
      { className: "question" },
      speaker("you"),
      make("p", { className: "text", textContent: question, attributes: { translate: "no" } }),
    ),
    answer,
  );
  byId("chat").classList.add("begun");
  log.scrollTop = log.scrollHeight;

  const measure = new Measure();
  const turn = { question, answer: "" };
  const controller = new AbortController();
  running = controller;
  setBusy(true);
  tell(facts, measure);
  turns.push(turn);
  try {
    const body = { messages: conversation(), ...sampling(), ...canvasOptions() };
    const queued = (id) => claim(id, "chat", question);
    for await (const event of stream("v1/chat/completions", body, measure, controller.signal, queued)) {
      const choice = event.choices[0];
      const piece = choice?.delta.content ?? "";
      turn.answer += piece;
      follow(log, () => {
        text.append(piece);
        if (choice?.canvas) canvas.add(choice.canvas);
        tell(facts, measure);
      });
    }
    if (measure.finishReason === null) throw new TypeError("the stream ended early");
    tell(facts, measure);
  } catch (error) {
    if (controller.signal.aborted) {
      measure.finishReason = "stopped";
      tell(facts, measure);
    } else {
      if (measure.tokens === 0) facts.replaceChildren();
      fail(answer, error, turn);
    }
    if (!turn.answer) forget(turn);
  } finally {
    answer.ariaBusy = "false";
    if (running === controller) {
      running = null;
      setBusy(false);
    }
  }
}

function forget(turn) {
  if (turns.includes(turn)) turns.splice(turns.indexOf(turn), 1);
}

function conversation() {
  const said = turns.flatMap(({ question, answer }) => [
    { role: "user", content: question },
    ...(answer ? [{ role: "assistant", content: answer }] : []),
  ]);
  return [...systemMessages(), ...said];
}

function speaker(who) {
  return make("h3", { className: "speaker", say: [who] });
}

/** Say below an answer what it took so far. */
function tell(facts, measure) {
  const { tokens, rate, ttft, promptTokens, finishReason } = measure;
  const said = [];
  if (tokens === 0 && finishReason === null) said.push(["answer_queued"]);
  else said.push(["answer_tokens", { tokens }]);
  if (rate !== null) said.push(["answer_rate", { rate: () => number(rate, rate < 100 ? 1 : 0) }]);
  if (ttft !== null) said.push(["answer_ttft", { ms: Math.round(ttft) }]);
  if (promptTokens !== null) said.push(["answer_prompt", { tokens: promptTokens }]);
  if (finishReason === "length") said.push(["answer_length"]);
  if (finishReason === "stopped" || finishReason === "abort") said.push(["answer_stopped"]);
  said.forEach(([key, values], i) => say(facts.children[i] ?? facts.appendChild(make("span")), key, values));
  while (facts.children.length > said.length) facts.lastChild.remove();
}

function fail(answer, error, turn) {
  const again = make("button", { type: "button", className: "small", say: ["try_again"] });
  const began = turn.answer && !error.status;
  const note = make(
    "div",
    { className: "error", attributes: { role: "alert" } },
    make("p", { say: began ? ["error_broken"] : inWords(error) }),
    again,
  );
  again.addEventListener("click", () => {
    if (running) return;
    forget(turn);
    answer.previousElementSibling.remove();
    answer.remove();
    byId("prompt").focus();
    ask(turn.question);
  });
  follow(byId("log"), () => answer.append(note));
}

/** Change a log, and stay at its end if that was in view. */
function follow(log, change) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function setBusy(busy) {
  const hadFocus = document.activeElement === byId(busy ? "send" : "stop");
  byId("log").ariaBusy = String(busy);
  byId("send").hidden = busy;
  byId("stop").hidden = !busy;
  if (hadFocus) byId(busy ? "stop" : "prompt").focus();
}

/** As high as its text, up to a limit that the style sheet sets. */
function fit(input) {
  input.style.height = "auto";
  input.style.height = `${input.scrollHeight + 2}px`;
}
