/**
 * Which frame is shown, and playing. Events: "frame" (detail: {index, bitmap} of what is shown, and `wanted`, the frame
 * that was asked for last), "state" and "problem" (an Error).
 */

/** Milliseconds that playing may be late before it goes on from where it is. */
const LATE = 400;

export class Player extends EventTarget {
  index = 0;
  playing = false;
  #frames = null;
  #fps = 24;
  #wanted = 0;
  #requests = 0;
  #shown = 0;

  open(frames, fps) {
    this.close();
    this.#frames = frames;
    this.#fps = fps || 24;
    this.index = 0;
    this.#wanted = 0;
  }

  close() {
    this.pause();
    this.#frames?.close();
    this.#frames = null;
  }

  get count() {
    return this.#frames?.count ?? 0;
  }

  /** Shows a frame, unless another is asked for before it is there. */
  async seek(index) {
    const frames = this.#frames;
    if (!frames) return;
    this.#wanted = Math.min(Math.max(0, Math.round(index)), frames.count - 1);
    const asked = this.#wanted;
    const request = (this.#requests += 1);
    try {
      const bitmap = await frames.frame(asked);
      // A frame that was kept may come before one that was asked for earlier.
      if (!bitmap || frames !== this.#frames || request < this.#shown) return;
      this.#shown = request;
      this.index = asked;
      this.dispatchEvent(new CustomEvent("frame", { detail: { index: asked, bitmap, wanted: this.#wanted } }));
    } catch (error) {
      if (frames !== this.#frames) return;
      this.pause();
      this.dispatchEvent(new CustomEvent("problem", { detail: error }));
    }
  }

  step(by) {
    this.pause();
    return this.seek(this.#wanted + by);
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  pause() {
    if (!this.playing) return;
    this.playing = false;
    this.dispatchEvent(new CustomEvent("state"));
  }

  async play() {
    if (this.playing || this.count < 2) return;
    this.playing = true;
    this.dispatchEvent(new CustomEvent("state"));
    if (this.index >= this.count - 1) await this.seek(0);
    let [from, began] = [this.index, performance.now()];
    while (this.playing) {
      const now = await new Promise(requestAnimationFrame);
      if (!this.playing) return;
      const due = from + Math.floor(((now - began) / 1000) * this.#fps);
      if (due <= this.index) continue;
      await this.seek(due);
      if (this.index >= this.count - 1) this.pause();
      const late = performance.now() - began - ((this.index - from) / this.#fps) * 1000;
      if (late > LATE) [from, began] = [this.index, performance.now()];
    }
  }
}
