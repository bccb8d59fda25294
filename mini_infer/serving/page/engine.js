// What the engine says about itself, as it comes, and what follows from it.
import { events, HttpError, request } from "./api.js";
import { assignColours, claimOf } from "./owners.js";

const PAUSES = [500, 1000, 2000, 5000]; // ms before each new attempt
const SILENCE = 10_000; // ms; the server speaks at least once a second

/** Hand over every state of the engine, for ever; `onConnection` gets what to say() about the connection. */
export async function watch(onState, onConnection) {
  for (let attempt = 0; ; attempt++) {
    const silence = new AbortController();
    let timer = null; // not yet: a person may be typing the key
    try {
      const response = await request("engine/events", { signal: silence.signal, background: true });
      for await (const snapshot of events(response)) {
        clearTimeout(timer);
        timer = setTimeout(() => silence.abort(), SILENCE);
        attempt = 0;
        onConnection("connection_live");
        onState(derive(snapshot));
      }
      onConnection("connection_lost");
    } catch (error) {
      if (!(error instanceof HttpError)) onConnection("connection_lost");
      else if (error.status === 401) onConnection("connection_key");
      else onConnection("connection_refused", { status: String(error.status) });
    }
    clearTimeout(timer);
    await new Promise((resolve) => setTimeout(resolve, PAUSES[Math.min(attempt, PAUSES.length - 1)]));
  }
}

/**
 * A snapshot, with `holders` (block → the sequences that hold it), `cached` (a set), and `counts` of blocks:
 * used, mine, shared, cached, free.
 */
function derive(snapshot) {
  const { running, waiting, num_blocks } = snapshot;
  assignColours([...running, ...waiting].map((sequence) => sequence.request_id));
  const holders = new Map();
  for (const sequence of [...running, ...waiting]) {
    for (const block of sequence.blocks) {
      if (holders.has(block)) holders.get(block).push(sequence);
      else holders.set(block, [sequence]);
    }
  }
  const cached = new Set(snapshot.cached_blocks);
  const count = (test) => [...holders.values()].filter(test).length;
  return {
    ...snapshot,
    holders,
    cached,
    counts: {
      used: holders.size,
      mine: count((sequences) => sequences.some(isMine)),
      shared: count((sequences) => sequences.length > 1),
      cached: cached.size,
      free: num_blocks - holders.size - cached.size,
    },
  };
}

/** Whether a sequence belongs to this page's chat. */
export function isMine(sequence) {
  return claimOf(sequence.request_id)?.kind === "chat";
}

/** How much of a block a sequence has filled, 0 to `blockSize` slots. */
export function filledSlots(sequence, block, blockSize) {
  const before = sequence.blocks.indexOf(block) * blockSize;
  return Math.max(0, Math.min(sequence.num_computed_tokens - before, blockSize));
}
