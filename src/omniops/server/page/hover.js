/** The mask that a click would give, shown under the pointer before it is made. */

import * as api from "./api.js";
import { Overlay } from "./overlay.js";

/** Milliseconds that the pointer rests before the server is asked. */
const REST = 70;

export class Hover {
  isOn = false;
  #overlay = new Overlay();
  #mask = null;
  #clock = 0;
  #asked = null;
  #changed;

  /** @param {() => void} changed draws the stage again */
  constructor(changed) {
    this.#changed = changed;
  }

  /** Asks for the mask with a point more, once the pointer rests; what was asked before is given up. */
  ask(session, frame, steps, { x, y, label }, color) {
    if (!this.isOn) return;
    clearTimeout(this.#clock);
    this.#asked?.abort();
    this.#clock = setTimeout(() => this.#ask(session, frame, steps, { x, y, label }, color), REST);
  }

  async #ask(session, frame, steps, { x, y, label }, color) {
    const clicks = steps.filter(({ kind }) => kind === "point");
    const box = steps.find(({ kind }) => kind === "box")?.box;
    const input = {
      sessionId: session.id,
      frameIndex: frame,
      points: [...clicks.map((step) => [step.x, step.y]), [x, y]],
      labels: [...clicks.map((step) => step.label), label],
      ...(box ? { box } : {}),
    };
    const asked = (this.#asked = new AbortController());
    try {
      const mask = await api.preview(input, asked.signal);
      if (asked !== this.#asked || asked.signal.aborted) return;
      this.#mask = { size: mask.size, counts: mask.counts, color };
      this.#changed();
    } catch {
      // A preview that fails is none; the click says what is wrong.
    }
  }

  clear() {
    clearTimeout(this.#clock);
    this.#asked?.abort();
    this.#asked = null;
    if (!this.#mask) return;
    this.#mask = null;
    this.#changed();
  }

  /** @returns {HTMLCanvasElement | null} */
  paint() {
    if (!this.#mask) return null;
    const { size, counts, color } = this.#mask;
    return this.#overlay.paint(size, [{ counts, color, fill: 0.3, edge: 0.9 }]);
  }
}
