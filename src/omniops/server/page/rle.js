/** COCO's compressed run-length encoding of masks: columns first, runs beginning with background. */

/** @param {string} text @returns {number[]} the runs' lengths. Throws on characters that the code does not have. */
export function runsOf(text) {
  const runs = [];
  let position = 0;
  while (position < text.length) {
    let value = 0;
    let shift = 0;
    for (;;) {
      const code = text.charCodeAt(position) - 48;
      if (!(code >= 0 && code < 64)) throw new Error("this is no run-length encoding");
      position += 1;
      value |= (code & 31) << shift;
      shift += 5;
      if (code & 32) continue;
      if (code & 16 && shift < 32) value |= -1 << shift;
      break;
    }
    if (runs.length > 2) value += runs[runs.length - 2];
    runs.push(value);
  }
  return runs;
}

/** @returns {number} pixels of the mask. */
export function areaOf(text) {
  return runsOf(text).reduce((sum, run, index) => (index % 2 ? sum + run : sum), 0);
}

/**
 * @param {{size: [number, number], counts: string}} mask height and width, and the text
 * @returns {{mask: Uint8Array, box: [number, number, number, number], area: number}} pixels of 0 and 1 in rows of width,
 *   and the box [x0, y0, x1, y1) of the ones, empty where there are none.
 */
export function decode({ size: [height, width], counts }) {
  const mask = new Uint8Array(height * width);
  let [x0, y0, x1, y1] = [width, height, 0, 0];
  let area = 0;
  let position = 0;
  let on = false;
  for (const run of runsOf(counts)) {
    if (run < 0 || position + run > mask.length) throw new Error("the runs are longer than the mask");
    if (on && run) {
      area += run;
      let x = Math.floor(position / height);
      let y = position % height;
      x0 = Math.min(x0, x);
      for (let left = run; left > 0; x += 1, y = 0) {
        const end = Math.min(height, y + left);
        y0 = Math.min(y0, y);
        y1 = Math.max(y1, end);
        x1 = Math.max(x1, x + 1);
        left -= end - y;
        for (let index = y * width + x; y < end; y += 1, index += width) mask[index] = 1;
      }
    }
    position += run;
    on = !on;
  }
  if (position !== mask.length) throw new Error("the runs are shorter than the mask");
  return { mask, box: area ? [x0, y0, x1, y1] : [0, 0, 0, 0], area };
}

/** Whether a mask has the pixel, without decoding the rest of it. */
export function covers({ size: [height], counts }, x, y) {
  const wanted = x * height + y;
  let position = 0;
  let on = false;
  for (const run of runsOf(counts)) {
    position += run;
    if (wanted < position) return on;
    on = !on;
  }
  return false;
}
