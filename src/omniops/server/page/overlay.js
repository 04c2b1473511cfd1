/** Masks as one picture with transparency, of the video's size, to be laid over its frame. */

import { channelsOf } from "./colors.js";
import { areaOf, decode } from "./rle.js";

export class Overlay {
  canvas = document.createElement("canvas");
  #context = this.canvas.getContext("2d");
  #painted = null;

  /**
   * @param {[number, number]} size height and width
   * @param {{counts: string, color: string, fill: number, edge: number}[]} layers the smallest mask is on top, so
   *   that none is hidden by what it lies in; fill and edge are opacities in [0, 1]
   * @returns {HTMLCanvasElement | null} null where there is nothing to see
   */
  paint(size, layers) {
    if (!layers.length) return null;
    const key = JSON.stringify([size, layers]);
    if (key === this.#painted) return this.canvas;
    const [height, width] = size;
    this.canvas.width = width;
    this.canvas.height = height;
    const image = this.#context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer);
    // An edge is as thick on a small picture as on a large one.
    const reach = Math.max(1, Math.round(Math.min(width, height) / 320));
    const sorted = layers.map((layer) => [areaOf(layer.counts), layer]).sort(([a], [b]) => b - a);
    for (const [, layer] of sorted) lay(pixels, decode({ size, counts: layer.counts }), size, layer, reach);
    this.#context.putImageData(image, 0, 0);
    this.#painted = key;
    return this.canvas;
  }
}

/** Lays one mask over what is there already. */
function lay(pixels, { mask, box: [x0, y0, x1, y1] }, [height, width], { color, fill, edge }, reach) {
  const [r, g, b] = channelsOf(color);
  const rgb = (b << 16) | (g << 8) | r;
  const inner = ((Math.round(255 * fill) << 24) | rgb) >>> 0;
  const outer = ((Math.round(255 * edge) << 24) | rgb) >>> 0;
  const down = reach * width;
  for (let y = y0; y < y1; y += 1) {
    const nearTop = y < reach;
    const nearBottom = y >= height - reach;
    for (let x = x0, index = y * width + x0; x < x1; x += 1, index += 1) {
      if (!mask[index]) continue;
      // Along the border of the picture there is no edge: the object goes on there.
      const isEdge =
        (x >= reach && !mask[index - reach]) ||
        (x < width - reach && !mask[index + reach]) ||
        (!nearTop && !mask[index - down]) ||
        (!nearBottom && !mask[index + down]);
      pixels[index] = isEdge ? outer : inner;
    }
  }
}
