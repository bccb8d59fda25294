// The server, as the rest of the page sees it: JSON in, server-sent events out, errors with a status.

const KEY = "mini-infer-key"; // in sessionStorage: for this tab, and no longer

/** What the server refused or gave up. `status` is null if the answer had begun; `message` is the server's own. */
export class HttpError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

let askForKey = null;
let declined = false; // the person has no key; only what they do themselves asks again

/** Say how a person is asked for the key: an async function (wasWrong) → the key, or null. */
export function askKeyWith(ask) {
  let asking = null; // several requests may fail at once, but one question is enough
  askForKey = (wasWrong) => (asking ??= ask(wasWrong).finally(() => (asking = null)));
}

/**
 * Fetch a path of this server; on 401 the key is asked for and the request repeated.
 *
 * @param background nobody waits for it, so somebody who has no key is not asked again and again.
 */
export async function request(path, { body, signal, background = false } = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY);
    const response = await fetch(path, {
      method: body ? "POST" : "GET",
      headers: { ...(body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) },
      body: body && JSON.stringify(body),
      cache: "no-store",
      signal,
    });
    if (response.ok) return response;
    if (response.status !== 401) throw new HttpError(response.status, await message(response));
    if (sessionStorage.getItem(KEY) !== key) continue; // another request was told meanwhile
    if (background && declined) throw new HttpError(401, await message(response));
    const entered = await askForKey(key !== null);
    signal?.throwIfAborted();
    declined = entered === null;
    if (declined) throw new HttpError(401, await message(response));
    sessionStorage.setItem(KEY, entered);
  }
}

/** The JSON of every event of a stream, until it ends or says [DONE]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue; // comments keep the line alive
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new HttpError(null, event.error.message);
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** An error as the arguments of say(): what to tell a person. */
export function inWords(error) {
  if (!(error instanceof HttpError)) return ["error_gone"];
  const { status, message } = error;
  if (status === null) return ["error_given_up", { message }];
  if (status === 401) return ["error_key"];
  if (status === 429) return ["error_busy"];
  return status < 500 ? ["error_refused", { message }] : ["error_failed", { status: String(status), message }];
}

async function message(response) {
  const text = await response.text();
  try {
    return JSON.parse(text).error.message;
  } catch {
    return text.slice(0, 300) || response.statusText;
  }
}
