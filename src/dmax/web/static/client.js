/**
 * The server's API, as the playground uses it. What goes wrong is a sentence.
 */

import { serverEvents } from "dmax/stream.js";

/** What the server or the connection says, fit to be shown. */
export class ServerError extends Error {
  /**
   * @param {string} message
   * @param {number} [status] of the answer; 0: there was none.
   */
  constructor(message, status = 0) {
    super(message);
    this.name = "ServerError";
    this.status = status;
  }

  /** Whether the server wants another key. */
  get wantsKey() {
    return this.status === 401;
  }

  /** Whether the server is about to be ready. */
  get isLoading() {
    return this.status === 503;
  }
}

const NOT_OURS = "The answer is not one of dmax serve. Is another program at this address?";
const UNREACHABLE = "The server does not answer. Is dmax serve still running?";
const BROKEN = "The connection broke before the answer was finished.";

/**
 * The models that are served.
 *
 * @param {string} key "" without one.
 * @returns {Promise<object[]>} the entries of /v1/models.
 * @throws {ServerError}
 */
export async function listModels(key) {
  const response = await call("/v1/models", key, {});
  const listed = parse(await response.text());
  if (!Array.isArray(listed?.data)) {
    throw new ServerError(NOT_OURS);
  }
  return listed.data;
}

/**
 * A chat completion, chunk by chunk.
 *
 * @param {object} body of the request; it asks for a stream.
 * @param {string} key "" without one.
 * @param {AbortSignal} signal closes the connection, which cancels the request.
 * @yields {object} the chunks as the server sends them.
 * @throws {ServerError} also when the stream ends before the server has said that it is done.
 */
export async function* streamChat(body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  const request = { method: "POST", headers, body: JSON.stringify(body), signal };
  const response = await call("/v1/chat/completions", key, request);
  for await (const data of unbroken(serverEvents(response.body), signal)) {
    if (data === "[DONE]") {
      return;
    }
    const chunk = parse(data);
    if (chunk.error) {
      throw new ServerError(sentence(chunk.error.message));
    }
    yield chunk;
  }
  throw new ServerError(BROKEN);
}

/** The same events; a connection that breaks is an error with a sentence. */
async function* unbroken(events, signal) {
  try {
    yield* events;
  } catch (error) {
    throw signal.aborted ? error : new ServerError(BROKEN);
  }
}

/** Send a request; an answer that is not a success is an error. */
async function call(path, key, request) {
  if (!/^[\x21-\x7e]*$/.test(key)) {
    throw new ServerError("An API key has letters, digits and punctuation of ASCII only.");
  }
  const authorization = key ? { Authorization: `Bearer ${key}` } : {};
  const headers = { ...request.headers, ...authorization };
  const response = await fetch(path, { ...request, headers }).catch((error) => {
    throw request.signal?.aborted ? error : new ServerError(UNREACHABLE);
  });
  if (!response.ok) {
    throw new ServerError(await refusal(response), response.status);
  }
  return response;
}

/** What an answer that is not a success says. */
async function refusal(response) {
  const body = await response.json().catch(() => null); // a proxy in between answers with HTML
  const said = body?.error?.message ?? `the server answered with status ${response.status}`;
  const wait = response.headers.get("Retry-After");
  return wait ? `${sentence(said)} Try again in ${wait} s.` : sentence(said);
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new ServerError(NOT_OURS);
  }
}

/** A message with a capital letter and a full stop. */
function sentence(message) {
  const text = String(message).trim();
  const end = /[.!?]$/.test(text) ? "" : ".";
  return text.charAt(0).toUpperCase() + text.slice(1) + end;
}
