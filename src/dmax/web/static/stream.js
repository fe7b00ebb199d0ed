/**
 * Server-sent events over `fetch`: what `EventSource` does, for requests with a body and a header.
 */

/**
 * The data of every event of a response, as it comes.
 *
 * Comments and the fields `event`, `id` and `retry` are passed over. An event that the stream ends
 * within is dropped, as the standard has it.
 *
 * @param {ReadableStream<Uint8Array>} body of a response; it is cancelled when the caller stops.
 * @yields {string} the lines of one event's `data`, joined by line breaks.
 */
export async function* serverEvents(body) {
  let data = [];
  for await (const line of lines(body)) {
    if (line === "" && data.length > 0) {
      yield data.join("\n");
      data = [];
    } else if (line === "data" || line.startsWith("data:")) {
      data.push(line.slice("data:".length).replace(/^ /, ""));
    }
  }
}

/**
 * The lines of a stream of UTF-8, ended by LF, CR LF or CR; an unfinished last one is left out.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @yields {string}
 */
async function* lines(body) {
  let rest = "";
  for await (const text of texts(body)) {
    const parts = (rest + text).split(/\r\n|\n|\r(?!$)/); // a CR at the end may be half of a CR LF
    rest = parts.pop();
    yield* parts;
  }
  if (rest.endsWith("\r")) {
    yield rest.slice(0, -1);
  }
}

/**
 * The pieces of a stream as text, however its bytes are cut.
 *
 * @param {ReadableStream<Uint8Array>} body
 * @yields {string}
 */
async function* texts(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) {
        return;
      }
      yield decoder.decode(value, { stream: true });
    }
  } finally {
    // A broken connection has said so already; nobody is left to be told that it is cancelled.
    reader.cancel().catch(() => {});
  }
}
