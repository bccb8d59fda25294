// Eight questions at once, so that there is something to see.
import { inWords, request } from "./api.js";
import { byId, make } from "./elements.js";
import { number, say } from "./i18n.js";
import { claim, colourOf } from "./owners.js";
import { sampling } from "./settings.js";
import { Measure, stream } from "./stream.js";

// Longer than two blocks of 16 tokens, so that the eight have something to share.
const SYSTEM =
  "You are the Mini-Infer tutor. You explain the terms of LLM inference in English and in Chinese, in one or two sentences.";
const QUESTIONS = [
  "What is continuous batching?",
  "什么是预填充？",
  "Explain chunked prefill.",
  "什么是连续批处理？",
  "What does TTFT mean?",
  "抢占是什么意思？",
  "Tell me a story.",
  "给我讲个故事",
];
const MAX_TOKENS = 256;

let running = null; // the AbortController of the demo under way
let demoId = null; // what its requests' ids begin with

export function setUpDemo() {
  byId("demo-send").addEventListener("click", () => (running ? stopDemo() : send()));
}

/** End the demo, if it is under way; says whether it was. */
export function stopDemo() {
  const stopped = running !== null;
  running?.abort();
  return stopped;
}

/** Give the questions under way the colours of their requests. */
export function colourDemo({ running: sequences }) {
  if (!demoId) return;
  const present = new Set(sequences.map((sequence) => sequence.request_id));
  [...byId("demo-answers").children].forEach((row, i) => {
    const id = `${demoId}-${i}`;
    if (present.has(id)) row.style.setProperty("--swatch", `var(${colourOf(id)})`);
  });
}

async function send() {
  running = new AbortController();
  const { signal } = running;
  const measure = new Measure();
  const texts = QUESTIONS.map(() => make("p", { className: "text" }));
  demoId = null;
  byId("demo-answers").replaceChildren(
    ...QUESTIONS.map((question, i) => make("li", { translate: false }, make("h4", { textContent: question }), texts[i])),
  );
  byId("demo-result").replaceChildren();
  byId("demo").hidden = false;
  setBusy(true);
  try {
    // All eight travel in one request: a browser opens only six connections to one server.
    const prompt = await Promise.all(QUESTIONS.map((question) => tokenize(question, signal)));
    measure.sent = performance.now();
    const body = { max_tokens: MAX_TOKENS, ...sampling(), prompt };
    const queued = (id) => {
      demoId = id;
      QUESTIONS.forEach((question, i) => claim(`${id}-${i}`, "demo", question));
    };
    for await (const event of stream("v1/completions", body, measure, signal, queued)) {
      for (const { index, text } of event.choices) texts[index].append(text);
    }
    const seconds = (performance.now() - measure.sent) / 1000;
    say(byId("demo-result"), "demo_took", {
      tokens: measure.tokens,
      seconds: () => number(seconds, 1),
      rate: Math.round(measure.tokens / seconds),
    });
  } catch (error) {
    if (!signal.aborted) {
      byId("demo-result").append(make("span", { className: "error", attributes: { role: "alert" }, say: inWords(error) }));
    } else say(byId("demo-result"), "answer_stopped");
  } finally {
    running = null;
    setBusy(false);
  }
}

/** A question as the chat template puts it, so that the eight are what a chat would send. */
async function tokenize(question, signal) {
  const messages = [
    { role: "system", content: SYSTEM },
    { role: "user", content: question },
  ];
  return (await (await request("tokenize", { body: { messages }, signal })).json()).tokens;
}

function setBusy(busy) {
  byId("demo-answers").ariaBusy = String(busy);
  say(byId("demo-send"), busy ? "demo_stop" : "demo_send");
}
