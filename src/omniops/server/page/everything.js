/** Everything mode: all that the model finds on a frame, of which a click makes objects. */

import * as api from "./api.js";
import { colorOf } from "./colors.js";
import { Overlay } from "./overlay.js";
import { covers } from "./rle.js";

const POINTS_PER_SIDE = 16;

export class Everything {
  /** What was found and not taken, the largest first; null outside of the mode. */
  found = null;
  frame = 0;
  #overlay = new Overlay();
  #highlight = new Overlay();
  #marked = null;
  #asked = null;

  get isOn() {
    return this.found !== null || this.#asked !== null;
  }

  /** Asks for all masks of a frame, coloured as objects from `firstColor` on. @returns {Promise<number | null>} how many, null if it was left meanwhile */
  async start(sessionId, frame, firstColor) {
    this.leave();
    const asked = (this.#asked = new AbortController());
    const input = { sessionId, frameIndex: frame, pointsPerSide: POINTS_PER_SIDE };
    try {
      const found = await api.findEverything(input, asked.signal);
      if (asked !== this.#asked) return null;
      this.frame = frame;
      this.found = found.sort((a, b) => b.area - a.area).map((mask, index) => ({ ...mask, color: colorOf(firstColor + index) }));
      return found.length;
    } catch (error) {
      if (error.name === "AbortError") return null;
      throw error;
    } finally {
      if (asked === this.#asked) this.#asked = null;
    }
  }

  leave() {
    this.#asked?.abort();
    this.#asked = null;
    this.found = null;
    this.#marked = null;
  }

  /** The smallest mask at a position of [0, 1], or null. */
  maskAt({ x, y }) {
    if (!this.found?.length) return null;
    const [height, width] = this.found[0].rleMask.size;
    const [column, row] = [Math.min(width - 1, Math.floor(x * width)), Math.min(height - 1, Math.floor(y * height))];
    return this.found.findLast(({ rleMask }) => covers(rleMask, column, row)) ?? null;
  }

  /** Marks the mask under the pointer. @returns {boolean} whether that is another one than before */
  mark(position) {
    const marked = position && this.maskAt(position);
    const isOther = marked !== this.#marked;
    this.#marked = marked;
    return isOther;
  }

  /** Takes a mask out: it became an object. */
  take(mask) {
    this.found = this.found.filter((other) => other !== mask);
    this.#marked = null;
  }

  /** @returns {(HTMLCanvasElement | null)[]} all masks, and the marked one again, which makes it stronger */
  paint() {
    if (!this.found?.length) return [];
    const { size } = this.found[0].rleMask;
    const layer = ({ rleMask: { counts }, color }) => ({ counts, color, fill: 0.4, edge: 1 });
    const marked = this.#marked ? [layer(this.#marked)] : [];
    return [this.#overlay.paint(size, this.found.map(layer)), this.#highlight.paint(size, marked)];
  }
}
