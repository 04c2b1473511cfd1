/** The colours of objects: far from each other, and visible on most pictures. */

const COLORS = [
  "#2f9bff", "#ffb020", "#ff5c6c", "#2fd07f", "#b57bff", "#19d3da",
  "#ff7ac6", "#c6e03a", "#ff8a3d", "#7f8cff", "#00b894", "#e86af0",
];

/** @returns {string} #rrggbb; after the first twelve, hues that are far from those before. */
export function colorOf(id) {
  if (id < COLORS.length) return COLORS[id];
  const hue = (id * 137.508) % 360;
  const channel = (n) => {
    const k = (n + hue / 30) % 12;
    return Math.round(255 * (0.6 - 0.35 * Math.max(-1, Math.min(k - 3, 9 - k, 1))));
  };
  return `#${[0, 8, 4].map((n) => channel(n).toString(16).padStart(2, "0")).join("")}`;
}

/** @returns {[number, number, number]} */
export function channelsOf(color) {
  return [1, 3, 5].map((at) => Number.parseInt(color.slice(at, at + 2), 16));
}
