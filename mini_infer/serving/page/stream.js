// One streamed answer, and what it took.
import { events, request } from "./api.js";

/** How an answer goes: tokens, times (ms of performance.now()), and why it ended. */
export class Measure {
  sent = performance.now();
  first = null; // token
  last = null; // token
  tokens = 0;
  promptTokens = null;
  finishReason = null;

  /** Take in one event of the stream. */
  add({ choices, usage }) {
    const now = performance.now();
    for (const { delta, text, finish_reason } of choices) {
      if (delta?.content || delta?.tool_calls || text) {
        this.first ??= now;
        this.last = now;
        this.tokens += 1; // about right; the server's own count replaces it
      }
      this.finishReason = finish_reason ?? this.finishReason;
    }
    if (usage) {
      this.tokens = usage.completion_tokens;
      this.promptTokens = usage.prompt_tokens;
    }
  }

  /** ms until the first token came; null before. */
  get ttft() {
    return this.first === null ? null : this.first - this.sent;
  }

  /** Tokens per second after the first; null while there is nothing to divide. */
  get rate() {
    return this.tokens > 1 && this.last > this.first ? ((this.tokens - 1) * 1000) / (this.last - this.first) : null;
  }
}

/**
 * Send a request that streams, and hand over its events; `measure` takes each of them in first. `queued` is told the
 * request's id before, when the server has taken it.
 */
export async function* stream(path, body, measure, signal, queued) {
  const stream_options = { include_usage: true, continuous_usage_stats: true, ...body.stream_options };
  const response = await request(path, { body: { ...body, stream: true, stream_options }, signal });
  queued(response.headers.get("x-request-id"));
  for await (const event of events(response)) {
    measure.add(event);
    yield event;
  }
}
