/** A session on the server: what was asked for, the masks that came back, and tracking. */

import * as api from "./api.js";
import { History } from "./history.js";
import { EMPTY, after, defaultName, firstFrame, fromServer, inputOf, nextCall, withName, without, withSteps } from "./prompts.js";

/**
 * Events: "change" (prompts or masks), "frame" (detail: one was tracked), "tracking", "busy", "problem" (detail: an
 * ApiError; what was refused is taken back), "broken" (detail: an ApiError that ended the tracking), "lost" (detail: an
 * ApiError; the session is no more, the prompts are kept).
 */
export class Session extends EventTarget {
  /** {frame: {id: counts}}, as Maps. */
  masks = new Map();
  /** {done, total, rate, left} while tracking. */
  tracking = null;
  /** Whether prompts changed after the last tracking. */
  isStale = false;
  #history = new History(EMPTY);
  #known = EMPTY;
  #syncing = null;
  #highest = -1;

  constructor(id, video, guided) {
    super();
    this.id = id;
    this.video = video;
    this.guided = guided;
  }

  static async start(video, guided = false) {
    const id = await api.startSession(video.path, guided);
    const { numFrames, width, height, fps } = await api.sessionState(id);
    const { path, isPicture } = video;
    return new Session(id, { path, numFrames, width, height, fps, isPicture }, guided);
  }

  /** The one on `video` that the server still has, after a reload of the page. Throws ApiError. */
  static async resume(id, { isPicture }) {
    const state = await api.sessionState(id);
    const { path, numFrames, width, height, fps, guided } = state;
    const session = new Session(id, { path, numFrames, width, height, fps, isPicture }, guided);
    session.#known = fromServer(state);
    session.#history = new History(session.#known);
    for (const answer of state.frames) session.#take(answer);
    session.#highest = Math.max(-1, ...session.#known.objects.map((object) => object.id));
    return session;
  }

  get prompts() {
    return this.#history.present;
  }

  get history() {
    return this.#history;
  }

  /** The id of the next new object. */
  get nextId() {
    return Math.max(this.#highest, ...this.prompts.objects.map((object) => object.id)) + 1;
  }

  /** An id that no object of this session had. */
  newId() {
    this.#highest = this.nextId;
    return this.#highest;
  }

  /** The mask of an object on a frame: {size, counts}, or null. */
  mask(frame, id) {
    const counts = this.masks.get(frame)?.get(id);
    return counts === undefined ? null : { size: [this.video.height, this.video.width], counts };
  }

  /** Frames on which a mask of the object is known, though it may be empty. */
  framesOf(id) {
    return [...this.masks].filter(([, found]) => found.has(id)).map(([frame]) => frame);
  }

  // What a person does: each is done at once here, and then by the server.

  setSteps(id, frame, steps) {
    this.#edit(withSteps(this.prompts, id, frame, steps));
  }

  rename(id, name) {
    this.#edit(withName(this.prompts, id, name.trim() || defaultName(id)));
  }

  remove(id) {
    this.#edit(without(this.prompts, id));
  }

  clear() {
    this.#edit(EMPTY);
  }

  undo() {
    this.#history.undo();
    this.#changed();
  }

  redo() {
    this.#history.redo();
    this.#changed();
  }

  /** Asks a new session for all that was asked of the one that ended. */
  async restart(guided = this.guided) {
    this.tracking?.stop.abort();
    const id = await api.startSession(this.video.path, guided);
    // An answer of the session before would count as one of this.
    await this.#syncing;
    this.id = id;
    this.guided = guided;
    this.#known = EMPTY;
    this.masks.clear();
    this.isStale = false;
    await this.sync();
  }

  /** Takes over what was asked of a session that ended, to be asked again by restart(). */
  adopt(prompts) {
    this.#history = new History(prompts);
    this.#highest = Math.max(-1, ...prompts.objects.map((object) => object.id));
  }

  #edit(prompts) {
    this.#history.push(prompts);
    this.#changed();
  }

  #changed() {
    this.#emit("change");
    this.sync();
  }

  /** Brings the server to what is wanted, one call at a time; resolves when it is there, or was refused. */
  sync() {
    this.#syncing ??= this.#run().finally(() => {
      this.#syncing = null;
      this.#emit("busy", false);
    });
    return this.#syncing;
  }

  async #run() {
    this.#emit("busy", true);
    try {
      for (let call = nextCall(this.#known, this.prompts); call; call = nextCall(this.#known, this.prompts)) {
        await this.#ask(call);
        this.#known = after(this.#known, call);
        if (call.kind !== "rename") this.isStale = this.masks.size > 1;
        this.#emit("change");
      }
    } catch (error) {
      this.#refused(error);
    }
  }

  #refused(error) {
    if (error.kind === "session") {
      this.#emit("lost", error);
      return;
    }
    if (error.kind !== "unreachable" && error.kind !== "busy") this.#history.refuse(this.#known);
    this.#emit("problem", error);
    this.#emit("change");
  }

  async #ask(call) {
    const sessionId = this.id;
    const target = { sessionId, frameIndex: call.frame, objectId: call.id };
    if (call.kind === "send") {
      const { mutation, input } = inputOf(call.steps);
      this.#take(await api.send(mutation, { ...target, ...input }));
    } else if (call.kind === "clear") {
      this.#take(await api.clearFrame(target));
    } else if (call.kind === "rename") {
      await api.renameObject({ sessionId, objectId: call.id, name: call.name });
    } else if (call.kind === "remove") {
      const answers = await api.removeObject(sessionId, call.id);
      for (const found of this.masks.values()) found.delete(call.id);
      answers.forEach((answer) => this.#take(answer));
    } else {
      await api.clearVideo(sessionId);
      this.masks.clear();
    }
  }

  #take({ frameIndex, rleMaskList }) {
    const found = this.masks.get(frameIndex) ?? new Map();
    for (const { objectId, rleMask } of rleMaskList) found.set(objectId, rleMask.counts);
    this.masks.set(frameIndex, found);
  }

  // Tracking

  /** Frames that a tracking from `start` brings: up to the end, and back from there. */
  #total(start) {
    return this.video.numFrames - start + (start > 0 ? start + 1 : 0);
  }

  /** Follows all objects through the video; resolves to "done", "cancelled", "stopped" or "failed". */
  async track() {
    await this.sync();
    const start = firstFrame(this.prompts) ?? 0;
    const began = performance.now();
    const tracking = { done: 0, total: this.#total(start), rate: null, left: null, cancelled: false };
    tracking.stop = new AbortController();
    this.tracking = tracking;
    this.#emit("tracking");
    try {
      for await (const { frame, masks } of api.propagate(this.id, start, tracking.stop.signal)) {
        this.masks.set(frame, new Map(masks.map(([id, mask]) => [id, mask.counts])));
        tracking.done += 1;
        const seconds = (performance.now() - began) / 1000;
        tracking.rate = tracking.done / seconds;
        tracking.left = (tracking.total - tracking.done) / tracking.rate;
        this.#emit("frame", frame);
        if (tracking.cancelled) break;
      }
      if (tracking.cancelled) return "cancelled";
      if (tracking.done < tracking.total) {
        await api.checkSession(this.id);
        return "stopped";
      }
      this.isStale = false;
      return "done";
    } catch (error) {
      if (tracking.cancelled || error.name === "AbortError") return "cancelled";
      this.#emit(error.kind === "session" ? "lost" : "broken", error);
      return "failed";
    } finally {
      this.tracking = null;
      this.#emit("tracking");
      this.#emit("change");
    }
  }

  async cancel() {
    const tracking = this.tracking;
    if (!tracking || tracking.cancelled) return;
    tracking.cancelled = true;
    try {
      await api.cancelTracking(this.id);
    } catch (error) {
      this.#emit("problem", error);
    }
    // The stream ends by itself; a server that is gone would let it hang.
    setTimeout(() => tracking.stop.abort(), 2000);
  }

  #emit(type, detail = null) {
    this.dispatchEvent(new CustomEvent(type, { detail }));
  }
}
