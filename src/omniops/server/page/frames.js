/** The frames of what was opened, one by one: decoded by WebCodecs, by seeking a <video>, or the one of a picture. */

import { readMovie } from "./mp4.js";

/** Bytes of decoded frames that are kept. */
const BUDGET = 256e6;
/** Above this a file is not held in memory, and played by a <video>. */
const LARGEST = 600e6;

/** Frames that were decoded, the ones used last kept. */
export class FrameCache {
  #bitmaps = new Map();
  #capacity;

  constructor(capacity) {
    this.#capacity = Math.max(4, capacity);
  }

  get capacity() {
    return this.#capacity;
  }

  get size() {
    return this.#bitmaps.size;
  }

  has(index) {
    return this.#bitmaps.has(index);
  }

  get(index) {
    const bitmap = this.#bitmaps.get(index);
    if (bitmap) {
      this.#bitmaps.delete(index);
      this.#bitmaps.set(index, bitmap);
    }
    return bitmap;
  }

  put(index, bitmap) {
    this.#bitmaps.get(index)?.close();
    this.#bitmaps.delete(index);
    this.#bitmaps.set(index, bitmap);
    while (this.#bitmaps.size > this.#capacity) {
      const [oldest, dropped] = this.#bitmaps.entries().next().value;
      dropped.close();
      this.#bitmaps.delete(oldest);
    }
  }

  close() {
    for (const bitmap of this.#bitmaps.values()) bitmap.close();
    this.#bitmaps.clear();
  }
}

/** Answers one request at a time; of those that wait only the newest is answered, the others get null. */
class Newest {
  #waiting = null;
  #running = false;

  get overtaken() {
    return this.#waiting !== null;
  }

  ask(index, work) {
    return new Promise((resolve, reject) => {
      this.#waiting?.resolve(null);
      this.#waiting = { index, resolve, reject };
      if (!this.#running) this.#run(work);
    });
  }

  async #run(work) {
    this.#running = true;
    while (this.#waiting) {
      const { index, resolve, reject } = this.#waiting;
      this.#waiting = null;
      await work(index).then(resolve, reject);
    }
    this.#running = false;
  }
}

/** Frames of an H.264 MP4 by WebCodecs. */
export class DecodedFrames {
  #movie;
  #bytes;
  #config;
  #cache;
  #decoder = null;
  #next = 0;
  #pending = new Set();
  #flushed = false;
  #target = 0;
  #failure = null;
  #wake = () => {};
  #requests = new Newest();

  constructor(movie, bytes, config) {
    this.#movie = movie;
    this.#bytes = bytes;
    this.#config = config;
    this.#cache = new FrameCache(Math.floor(BUDGET / (movie.width * movie.height * 4)));
  }

  /** Throws where there is no WebCodecs or it refuses the file. */
  static async open(buffer) {
    if (!("VideoDecoder" in globalThis)) throw new Error("no WebCodecs");
    const movie = readMovie(buffer);
    const { codec, description, width, height } = movie;
    const config = { codec, description, codedWidth: width, codedHeight: height };
    if (!(await VideoDecoder.isConfigSupported(config)).supported) throw new Error(`${codec} is not decoded here`);
    const frames = new DecodedFrames(movie, buffer, config);
    await frames.frame(0);
    return frames;
  }

  get count() {
    return this.#movie.frames.length;
  }

  /** @returns {Promise<ImageBitmap | null>} of this object's cache: draw it at once. null: a newer request came. */
  frame(index) {
    const kept = this.#cache.get(index);
    if (kept && !this.#requests.overtaken) return Promise.resolve(kept);
    return this.#requests.ask(index, (asked) => this.#decode(asked));
  }

  close() {
    if (this.#decoder && this.#decoder.state !== "closed") this.#decoder.close();
    this.#decoder = null;
    this.#failure = new Error("closed");
    this.#wake();
    this.#cache.close();
  }

  async #decode(index) {
    this.#target = index;
    if (!this.#cache.has(index)) this.#aim(index);
    while (!this.#cache.has(index)) {
      if (this.#failure) throw this.#failure;
      if (this.#requests.overtaken) return null;
      const queued = this.#decoder.decodeQueueSize;
      const fed = this.#next >= this.#movie.samples.length;
      if (!fed && queued < 8 && (this.#pending.size < 24 || queued === 0)) this.#feed();
      else if (fed && !this.#flushed) this.#flush();
      await this.#something();
    }
    return this.#cache.get(index);
  }

  /** Begins at the key frame before, unless the decoder is on its way to the frame already. */
  #aim(index) {
    const { samples, frames } = this.#movie;
    const wanted = frames[index].sample;
    let key = wanted;
    while (key > 0 && !samples[key].key) key -= 1;
    const onItsWay = this.#pending.has(index) || (wanted >= this.#next && key <= this.#next && !this.#flushed);
    if (this.#decoder && this.#decoder.state === "configured" && onItsWay) return;
    if (this.#decoder && this.#decoder.state !== "closed") this.#decoder.close();
    this.#failure = null;
    this.#pending.clear();
    this.#flushed = false;
    this.#next = key;
    const decoder = new VideoDecoder({
      output: (frame) => this.#took(frame),
      error: (error) => {
        if (decoder !== this.#decoder) return;
        this.#failure = error;
        this.#wake();
      },
    });
    decoder.ondequeue = () => this.#wake();
    decoder.configure(this.#config);
    this.#decoder = decoder;
  }

  #feed() {
    const { offset, size, key, index } = this.#movie.samples[this.#next];
    // The frame's own number stands for its time: it comes back with what was decoded. What is never shown has none.
    const timestamp = index >= 0 ? index * 1000 : -1000 * (this.#next + 1);
    if (index >= 0) this.#pending.add(index);
    const data = new Uint8Array(this.#bytes, offset, size);
    this.#decoder.decode(new EncodedVideoChunk({ type: key ? "key" : "delta", timestamp, data }));
    this.#next += 1;
  }

  #flush() {
    this.#flushed = true;
    const decoder = this.#decoder;
    decoder.flush().then(
      () => {
        // After a flush a decoder starts at a key frame only.
        if (decoder === this.#decoder) this.#pending.clear();
        this.#wake();
      },
      () => this.#wake(),
    );
  }

  async #took(frame) {
    const index = frame.timestamp / 1000;
    // Far before what is wanted a frame would be dropped again before anyone saw it.
    const kept = index >= 0 && index > this.#target - this.#cache.capacity / 2 && !this.#cache.has(index);
    try {
      if (kept) this.#cache.put(index, await createImageBitmap(frame));
    } catch (error) {
      this.#failure = error;
    } finally {
      frame.close();
      this.#pending.delete(index);
      this.#wake();
    }
  }

  /** Waits until the decoder did something; the clock guards against browsers without the event dequeue. */
  #something() {
    return new Promise((resolve) => {
      const clock = setTimeout(resolve, 20);
      this.#wake = () => {
        clearTimeout(clock);
        resolve();
      };
    });
  }
}

/** Where within a frame's time a player is sent, one after another until it shows the frame. */
const SHARES = [0.1, 0.5, 0.75, 0.95];

/** Frames of whatever the browser plays, by seeking: slower, and exact where the times are known. */
export class SeekedFrames {
  #video;
  #times;
  #requests = new Newest();

  /** @param {string} url @param {{time: number, duration: number, exact: boolean}[]} times of frames, in seconds. */
  constructor(url, times) {
    this.#times = times;
    this.#video = document.createElement("video");
    this.#video.muted = true;
    this.#video.playsInline = true;
    this.#video.preload = "auto";
    this.#video.src = url;
  }

  static async open(url, times) {
    const frames = new SeekedFrames(url, times);
    await new Promise((resolve, reject) => {
      frames.#video.addEventListener("loadeddata", resolve, { once: true });
      frames.#video.addEventListener("error", () => reject(new Error("this browser cannot play the video")), { once: true });
    });
    return frames;
  }

  get count() {
    return this.#times.length;
  }

  frame(index) {
    return this.#requests.ask(index, (asked) => this.#show(asked));
  }

  close() {
    this.#video.removeAttribute("src");
    this.#video.load();
  }

  async #show(index) {
    const { time, duration, exact } = this.#times[index];
    for (const share of exact ? SHARES : [0.5]) {
      const shown = await this.#seek(time + share * duration);
      // Between frames that are stored in another order than they are shown in, players err in how long each lasts.
      if (shown === null || Math.abs(shown - time) < 0.002) break;
    }
    return createImageBitmap(this.#video);
  }

  /** @returns {Promise<number | null>} the time of the frame that is shown then, where the browser tells */
  async #seek(time) {
    const video = this.#video;
    const shownTime = new Promise((resolve) => {
      video.requestVideoFrameCallback?.((now, { mediaTime }) => resolve(mediaTime));
      video.addEventListener("seeked", () => setTimeout(resolve, 100, null), { once: true });
    });
    await new Promise((resolve, reject) => {
      video.addEventListener("seeked", resolve, { once: true });
      video.addEventListener("error", () => reject(new Error("the video stopped")), { once: true });
      video.currentTime = time;
    });
    return shownTime;
  }
}

/** When a player shows the frames, from what mp4.js read. */
export function timesOf({ start, frames }) {
  return frames.map(({ time, duration }) => ({ time: start + time, duration, exact: true }));
}

/** A picture: one frame. */
export class PictureFrame {
  count = 1;
  #bitmap;

  constructor(bitmap) {
    this.#bitmap = bitmap;
  }

  frame() {
    return Promise.resolve(this.#bitmap);
  }

  close() {
    this.#bitmap.close();
  }
}

/**
 * @param {{isPicture: boolean, numFrames: number | null, fps: number | null}} video
 * @param {string} url @param {(url: string, onProgress: (done: number, total: number | null) => void) => Promise<Blob>} fetchBlob
 * @param {(done: number, total: number | null) => void} onProgress
 */
export async function openFrames(video, url, fetchBlob, onProgress) {
  if (video.isPicture) return new PictureFrame(await createImageBitmap(await fetchBlob(url, onProgress)));
  let times = null;
  const blob = await fetchBlob(url, onProgress, LARGEST);
  if (blob) {
    const buffer = await blob.arrayBuffer();
    try {
      return await DecodedFrames.open(buffer);
    } catch (error) {
      console.info(`frames come from a <video>: ${error.message}`);
    }
    try {
      times = timesOf(readMovie(buffer));
    } catch {
      // Evenly spaced, below.
    }
  }
  const duration = 1 / (video.fps ?? 24);
  times ??= Array.from({ length: video.numFrames ?? 1 }, (_, i) => ({ time: i * duration, duration, exact: false }));
  return SeekedFrames.open(url, times);
}
