/** The server's API: GraphQL, the stream of masks, uploads, downloads. */

import { randomName } from "./dom.js";
import { StreamError, framesOf } from "./stream.js";

/** The page's own folder, so that it works under any prefix of a proxy. */
const BASE = new URL(".", document.baseURI);

export const address = (path) => new URL(path.split("/").map(encodeURIComponent).join("/"), BASE).href;

/**
 * What went wrong, in the server's words or ours.
 * kind: "unreachable", "token", "session" (it ended), "busy", "large", "file" (it cannot be opened) or "other".
 */
export class ApiError extends Error {
  constructor(message, kind = "other") {
    super(message);
    this.kind = kind;
  }
}

const UNREACHABLE = "The server does not answer.";

function kindOf(status, message) {
  if (/^Cannot find session|process of the model died/i.test(message)) return "session";
  return { 401: "token", 404: "file", 413: "large", 503: "busy" }[status] ?? "other";
}

/** The words of an answer that is no success: GraphQL's form, JSON of ours, or a line of text. */
function wordsOf(text, status) {
  try {
    const answer = JSON.parse(text);
    const words = answer.errors?.[0]?.message ?? answer.error?.message ?? answer.error ?? answer.message;
    if (typeof words === "string") return words;
  } catch {
    // No JSON.
  }
  const plain = text.trim();
  return plain && plain.length < 300 && !plain.startsWith("<") ? plain : `The server answered with status ${status}.`;
}

let askForToken = async () => false;
let asking = null;

/** @param {() => Promise<boolean>} ask shows the person a field, and answers whether signing in succeeded. */
export function onTokenNeeded(ask) {
  askForToken = ask;
}

/** fetch() with errors in words; a token that is missing is asked for, once for all that wait, and the request repeated. */
export async function request(path, options = {}) {
  for (;;) {
    let response;
    try {
      response = await fetch(path instanceof URL ? path : new URL(path, BASE), { credentials: "same-origin", ...options });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(UNREACHABLE, "unreachable");
    }
    if (response.ok) return response;
    const words = wordsOf(await response.text(), response.status);
    const error = new ApiError(words, kindOf(response.status, words));
    if (error.kind !== "token") throw error;
    asking ??= askForToken().finally(() => (asking = null));
    if (!(await asking)) throw error;
  }
}

const json = (body) => ({ method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

/** data of a GraphQL answer. Throws ApiError. */
export async function graphql(query, variables = {}, signal = undefined) {
  const response = await request("graphql", { ...json({ query, variables }), signal });
  return dataOf(await response.json(), response.status);
}

function dataOf(answer, status) {
  if (answer.errors?.length) {
    const words = answer.errors[0].message;
    throw new ApiError(words, kindOf(status === 200 ? answer.errors[0].extensions?.status : status, words));
  }
  return answer.data;
}

const MASKS = "frameIndex rleMaskList { objectId rleMask { size counts } }";
const VIDEO = "id path posterPath width height url numFrames fps isPicture";

/** A mutation whose only argument is an input; its type is named as the mutation is. */
async function change(name, input, fields, signal) {
  const type = `${name[0].toUpperCase()}${name.slice(1)}Input`;
  const query = `mutation Page($input: ${type}!) { ${name}(input: $input) { ${fields} } }`;
  return (await graphql(query, { input }, signal))[name];
}

export const server = async () =>
  (
    await graphql(
      "query Page { server { device dtype model imageSize randomWeights ready failure canHover maxUploadBytes maxUploadSeconds } }",
    )
  ).server;

export async function samples() {
  const query = `query Page { videos(first: 100) { edges { node { ${VIDEO} } } } pictures { ${VIDEO} } }`;
  const { videos, pictures } = await graphql(query);
  return [...videos.edges.map(({ node }) => node), ...pictures];
}

export async function sessionState(sessionId) {
  const query = `query Page($id: String!) { session(sessionId: $id) {
    sessionId path numFrames width height fps isPicture guided tracking
    objects { objectId name prompts { frameIndex points labels box hasMask } }
    frames { ${MASKS} } } }`;
  return (await graphql(query, { id: sessionId })).session;
}

/** Throws where the session is no more. */
export const checkSession = (id) =>
  graphql("query Page($id: String!) { session(sessionId: $id) { sessionId } }", { id });

export const startSession = async (path, guided) => (await change("startSession", { path, guided }, "sessionId")).sessionId;
export const closeSession = (sessionId) => change("closeSession", { sessionId }, "success");
export const send = (mutation, input) => change(mutation, input, MASKS);
export const clearFrame = (input) => change("clearPointsInFrame", input, MASKS);
export const clearVideo = (sessionId) => change("clearPointsInVideo", { sessionId }, "success");
export const removeObject = (sessionId, objectId) => change("removeObject", { sessionId, objectId }, MASKS);
export const renameObject = (input) => change("renameObject", input, "success");
export const cancelTracking = (sessionId) => change("cancelPropagateInVideo", { sessionId }, "success");
export const preview = (input, signal) => change("preview", input, "size counts", signal);
export const findEverything = (input, signal) =>
  change("findEverything", input, "rleMask { size counts } score area box", signal);

/** Gives the session back when the page goes away; the server keeps it for a minute, in case this was a reload. */
export function leave(sessionId) {
  navigator.sendBeacon(new URL(`sessions/${encodeURIComponent(sessionId)}/leave`, BASE));
}

/** Whether the token was the server's, which then sets its cookie. */
export async function login(token) {
  try {
    return (await fetch(new URL("login", BASE), { ...json({ token }), credentials: "same-origin" })).ok;
  } catch {
    throw new ApiError(UNREACHABLE, "unreachable");
  }
}

/** The frames of a tracking as they come: {frame, masks}. Throws ApiError, also where it ends in the middle. */
export async function* propagate(sessionId, startFrame, signal) {
  const body = { session_id: sessionId, start_frame_index: startFrame };
  const response = await request("propagate_in_video", { ...json(body), signal });
  try {
    yield* framesOf(response);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    if (error instanceof StreamError) throw new ApiError(error.message, kindOf(0, error.message));
    throw new ApiError("The connection broke off while tracking. The frames that came are kept.", "unreachable");
  }
}

/** Asks twice a second how far the server is with what `key` names, until `signal` aborts; reported as by upload(). */
async function watch(key, onProgress, signal) {
  while (!signal.aborted) {
    await new Promise((resolve) => setTimeout(resolve, 500));
    if (signal.aborted) return;
    try {
      const response = await fetch(new URL(`progress/${key}`, BASE), { credentials: "same-origin", signal });
      if (!response.ok) continue;
      const { done, total, what } = await response.json();
      if (signal.aborted) return;
      const words = what ? what[0].toUpperCase() + what.slice(1) : "Preparing";
      onProgress(words, total ? done / total : null);
    } catch {
      // The request that is watched says what is wrong.
    }
  }
}

/**
 * Uploads a picture or a video.
 * @param {(words: string, share: number | null) => void} onProgress how far it is
 * @returns {Promise<object>} the Video. Throws ApiError, or an AbortError.
 */
export async function upload(file, isPicture, onProgress, signal) {
  const key = randomName();
  const name = isPicture ? "uploadPicture" : "uploadVideo";
  const query = `mutation Page($file: Upload!) { ${name}(file: $file) { ${VIDEO} } }`;
  const form = new FormData();
  form.append("operations", JSON.stringify({ query, variables: { file: null } }));
  form.append("map", JSON.stringify({ file: ["variables.file"] }));
  form.append("file", file);
  const watching = new AbortController();
  const onSent = (share) => {
    onProgress("Uploading", share);
    if (share < 1) return;
    onProgress("Preparing", null);
    watch(key, onProgress, watching.signal);
  };
  try {
    const { status, text } = await post(`graphql?upload=${key}`, form, onSent, signal);
    if (status !== 200) {
      const words = wordsOf(text, status);
      throw new ApiError(words, kindOf(status, words));
    }
    return dataOf(JSON.parse(text), status)[name];
  } finally {
    watching.abort();
  }
}

/** A POST that reports how much of it was sent, which fetch() cannot. */
function post(path, body, onProgress, signal) {
  return new Promise((resolve, reject) => {
    const xhr = new XMLHttpRequest();
    xhr.open("POST", new URL(path, BASE));
    xhr.upload.onprogress = ({ loaded, total }) => onProgress(total ? Math.min(loaded / total, 0.999) : 0);
    xhr.upload.onload = () => onProgress(1);
    xhr.onload = () => resolve({ status: xhr.status, text: xhr.responseText });
    xhr.onerror = () => reject(new ApiError(UNREACHABLE, "unreachable"));
    xhr.onabort = () => reject(new DOMException("cancelled", "AbortError"));
    signal?.addEventListener("abort", () => xhr.abort(), { once: true });
    xhr.send(body);
  });
}

/** The body of an answer as a Blob; reports how much has come. */
async function blobOf(response, onProgress) {
  const total = Number(response.headers.get("Content-Length")) || null;
  const chunks = [];
  let done = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done: over, value } = await reader.read();
    if (over) break;
    chunks.push(value);
    done += value.length;
    onProgress(done, total);
  }
  return new Blob(chunks, { type: response.headers.get("Content-Type") ?? "" });
}

/** A file as a Blob; null where it has more than `maxBytes` bytes. */
export async function fetchBlob(url, onProgress, maxBytes = Infinity) {
  const response = await request(new URL(url));
  if (Number(response.headers.get("Content-Length")) > maxBytes) {
    await response.body.cancel();
    return null;
  }
  return blobOf(response, onProgress);
}

/** What was found, as a file: {blob, name}. Throws ApiError, or an AbortError. */
export async function download(sessionId, { format, as }, onProgress, signal) {
  const key = randomName();
  const url = new URL(`downloads/${encodeURIComponent(sessionId)}`, BASE);
  url.search = new URLSearchParams({ format, ...(as ? { as } : {}), upload: key });
  const watching = new AbortController();
  watch(key, onProgress, watching.signal);
  try {
    const response = await request(url, { signal });
    watching.abort();
    const named = /filename="?([^";]+)"?/.exec(response.headers.get("Content-Disposition") ?? "");
    const blob = await blobOf(response, (done, total) => onProgress("Downloading", total ? done / total : null));
    return { blob, name: named?.[1] ?? `masks.${as ?? "json"}` };
  } finally {
    watching.abort();
  }
}
