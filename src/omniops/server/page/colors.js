/** The colours of objects: those of omniops.drawing.colour_of, so that what is downloaded looks as it did here. */

/** @returns {string} #rrggbb: a bright colour; the golden ratio keeps those of neighbours apart. */
export function colorOf(id) {
  const hue = (id * 0.618034) % 1;
  const channel = (shift) => {
    const k = (shift + 6 * hue) % 6;
    return Math.floor(255 * (1 - 0.7 * Math.max(0, Math.min(k, 4 - k, 1))));
  };
  return `#${[5, 3, 1].map((shift) => channel(shift).toString(16).padStart(2, "0")).join("")}`;
}

/** @returns {[number, number, number]} */
export function channelsOf(color) {
  return [1, 3, 5].map((index) => Number.parseInt(color.slice(index, index + 2), 16));
}
