// Whose request is whose, and in which colour: this page knows what it asked, and nothing about other clients.

export const NUM_COLOURS = 8; // --owner-0 … --owner-7 in style.css
const FORGET_AFTER = 500; // requests

const claims = new Map(); // request id → { kind: "chat" | "demo", question }
const colours = new Map(); // request id → number of its colour, while it is under way

/** Say that this request was made here. The id of a chat's response is also that of its request. */
export function claim(requestId, kind, question) {
  claims.set(requestId, { kind, question });
  if (claims.size > FORGET_AFTER) claims.delete(claims.keys().next().value);
}

/** What was asked here and became this request; undefined if it is somebody else's. */
export function claimOf(requestId) {
  return claims.get(requestId);
}

/** The CSS variable of a request's colour. */
export function colourOf(requestId) {
  return claimOf(requestId)?.kind === "chat" ? "--mine" : `--owner-${colours.get(requestId) ?? 0}`;
}

/** Give every request under way a colour, the same for as long as it lasts, no two the same if that is possible. */
export function assignColours(requestIds) {
  const present = new Set(requestIds);
  for (const id of colours.keys()) if (!present.has(id)) colours.delete(id);
  const uses = new Array(NUM_COLOURS).fill(0);
  for (const colour of colours.values()) uses[colour]++;
  for (const id of present) {
    if (colours.has(id)) continue;
    const colour = uses.indexOf(Math.min(...uses));
    colours.set(id, colour);
    uses[colour]++;
  }
}

/** A request in words: the arguments of say(). */
export function nameOf(requestId) {
  const known = claimOf(requestId);
  if (known?.kind === "chat") return ["owner_chat"];
  if (known) return ["owner_demo", { question: known.question }];
  return ["owner_other", { id: requestId.length > 14 ? `${requestId.slice(0, 13)}…` : requestId }];
}
