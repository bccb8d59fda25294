// The conversation: what was asked, what was answered, and what each answer took.
import { inWords } from "./api.js";
import { CanvasView, canvasOptions } from "./canvas.js";
import { byId, make } from "./elements.js";
import { number, say } from "./i18n.js";
import { claim } from "./owners.js";
import { sampling, systemMessages } from "./settings.js";
import { Measure, stream } from "./stream.js";
import { Calls, laidOut, toolFields } from "./tools.js";

// In order: the messages sent (a question, or results of calls), the text and calls of the answer, and whose elements
// they are. Those that failed are not sent again.
const turns = [];
let running = null; // the AbortController of the answer that is being written

export function setUpChat() {
  const [form, input] = [byId("ask"), byId("prompt")];
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    const question = input.value.trim();
    if (!question || running || !ask(question)) return;
    input.value = "";
    fit(input);
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

/** Ask a question; whether it could be. */
function ask(question) {
  const shown = make(
    "article",
    { className: "question" },
    speaker("you"),
    make("p", { className: "text", textContent: question, attributes: { translate: "no" } }),
  );
  return answer(question, [{ role: "user", content: question }], shown);
}

/** Have messages answered; whether they could be sent. `shown` is what shows them, if that is not in the log yet. */
function answer(question, sent, shown) {
  const options = toolFields(shown !== undefined);
  if (!options) return false;
  turns.at(-1)?.calls.settle();
  const calls = new Calls();
  const text = make("p", { className: "text", attributes: { translate: "no" } });
  const facts = make("p", { className: "facts" });
  const canvas = new CanvasView();
  const element = make("article", { className: "answer", ariaBusy: "true" }, speaker("model"), canvas.element, text, calls.element, facts);
  text.classList.toggle("json", "response_format" in options);
  const log = byId("log");
  log.append(...(shown ? [shown] : []), element);
  byId("chat").classList.add("begun");
  log.scrollTop = log.scrollHeight;
  write({ question, sent, shown, text: "", calls, canvas, element }, text, facts, options);
  return true;
}

async function write(turn, text, facts, options) {
  const { calls, canvas, element, question } = turn;
  const log = byId("log");
  const measure = new Measure();
  const controller = new AbortController();
  running = controller;
  setBusy(true);
  tell(facts, measure);
  turns.push(turn);
  try {
    const body = { messages: conversation(), ...sampling(), ...canvasOptions(), ...options };
    const queued = (id) => claim(id, "chat", question);
    for await (const event of stream("v1/chat/completions", body, measure, controller.signal, queued)) {
      const choice = event.choices[0];
      const { content, tool_calls } = choice?.delta ?? {};
      turn.text += content ?? "";
      follow(log, () => {
        text.append(content ?? "");
        calls.add(tool_calls ?? []);
        if (choice?.canvas) canvas.add(choice.canvas);
        tell(facts, measure);
      });
    }
    if (measure.finishReason === null) throw new TypeError("the stream ended early");
    tell(facts, measure);
    if (text.classList.contains("json")) text.textContent = laidOut(turn.text);
    if (measure.finishReason === "tool_calls") {
      follow(log, () => calls.askForResults((results) => !running && answer(question, results)));
    }
  } catch (error) {
    if (controller.signal.aborted) {
      measure.finishReason = "stopped";
      tell(facts, measure);
    } else {
      if (measure.tokens === 0) facts.replaceChildren();
      fail(turn, error);
    }
    if (!turn.text) forget(turn);
  } finally {
    element.ariaBusy = "false";
    if (running === controller) {
      running = null;
      setBusy(false);
    }
  }
}

function forget(turn) {
  if (turns.includes(turn)) turns.splice(turns.indexOf(turn), 1);
}

/** Everything said, as messages. Calls are among it if their results are; otherwise it is as if they were not made. */
function conversation() {
  const said = turns.flatMap(({ sent, text, calls }, i) => {
    const wereAnswered = turns[i + 1]?.sent[0].role === "tool";
    if (!text && !wereAnswered) return sent;
    return [...sent, { role: "assistant", content: text, ...(wereAnswered && { tool_calls: calls.made }) }];
  });
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

function fail(turn, error) {
  const again = make("button", { type: "button", className: "small", say: ["try_again"] });
  const began = turn.text && !error.status;
  const note = make(
    "div",
    { className: "error", attributes: { role: "alert" } },
    make("p", { say: began ? ["error_broken"] : inWords(error) }),
    again,
  );
  again.addEventListener("click", () => {
    if (running) return;
    forget(turn);
    turn.element.remove();
    byId("prompt").focus();
    answer(turn.question, turn.sent, turn.shown);
  });
  follow(byId("log"), () => turn.element.append(note));
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
