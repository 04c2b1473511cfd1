/** The strip of time: a lane for each object with where it was found and clicked, a playhead, and the clock. */

import { colorOf } from "./colors.js";
import { find } from "./dom.js";
import { areaOf } from "./rle.js";

const LANE = 12;
/** Room for the marks of the first and the last frame; components.css has the same for the slider. */
const INSET = 8;
const MOST_LANES = 8;

export class Timeline {
  #canvas = find("marks");
  #scrub = find("scrub");
  #clock = find("clock");
  #count = 1;
  #fps = 24;
  #index = 0;
  #rows = [];
  #asked = 0;
  #known = new Map();

  /** @param {(index: number) => void} seek */
  constructor(seek) {
    this.#scrub.addEventListener("input", () => seek(Number(this.#scrub.value)));
    new ResizeObserver(() => this.#invalidate()).observe(find("lanes"));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#invalidate());
    new MutationObserver(() => this.#invalidate()).observe(document.documentElement, { attributeFilter: ["data-theme"] });
  }

  open(count, fps) {
    this.#count = count;
    this.#fps = fps || 24;
    this.#scrub.max = String(count - 1);
    this.#known.clear();
    this.setFrame(0);
  }

  /** @param {number} index what is shown @param {number} wanted where the slider is, while a frame is on its way */
  setFrame(index, wanted = index) {
    this.#index = index;
    const seconds = (index / this.#fps).toFixed(2);
    this.#scrub.value = String(wanted);
    this.#scrub.setAttribute("aria-valuetext", `Frame ${index + 1} of ${this.#count}, ${seconds} seconds`);
    this.#clock.textContent = `${index + 1} / ${this.#count} · ${seconds} s`;
    this.#invalidate();
  }

  /** @param {import("./session.js").Session} session */
  show(session) {
    this.#rows = session.prompts.objects.map((object) => ({
      color: colorOf(object.id),
      prompts: Object.keys(object.frames).map(Number),
      found: this.#found(session, object.id),
    }));
    const lanes = Math.min(MOST_LANES, Math.max(1, this.#rows.length));
    find("lanes").style.height = `${lanes * LANE + 14}px`;
    this.#invalidate();
  }

  /** Runs [first, end) of frames on which the object is seen; a text's area is found out once. */
  #found(session, id) {
    const frames = [];
    for (const [frame, found] of session.masks) {
      const counts = found.get(id);
      if (counts === undefined) continue;
      let isShown = this.#known.get(counts);
      if (isShown === undefined) {
        isShown = areaOf(counts) > 0;
        if (this.#known.size > 20000) this.#known.clear();
        this.#known.set(counts, isShown);
      }
      if (isShown) frames.push(frame);
    }
    const runs = [];
    for (const frame of frames.sort((a, b) => a - b)) {
      const run = runs.at(-1);
      if (run && run[1] === frame) run[1] = frame + 1;
      else runs.push([frame, frame + 1]);
    }
    return runs;
  }

  #invalidate() {
    this.#asked ||= requestAnimationFrame(() => {
      this.#asked = 0;
      this.#draw();
    });
  }

  #draw() {
    const ratio = globalThis.devicePixelRatio || 1;
    const { clientWidth: width, clientHeight: height } = this.#canvas;
    if (!width) return;
    this.#canvas.width = Math.round(width * ratio);
    this.#canvas.height = Math.round(height * ratio);
    const context = this.#canvas.getContext("2d");
    context.scale(ratio, ratio);
    const style = getComputedStyle(document.documentElement);
    const perFrame = (width - 2 * INSET) / this.#count;
    const left = (frame) => INSET + frame * perFrame;
    const center = (frame) => left(frame + 0.5);
    const lanes = Math.min(MOST_LANES, Math.max(1, this.#rows.length));
    const rows = this.#rows.slice(-MOST_LANES);
    context.fillStyle = style.getPropertyValue("--lane");
    for (let lane = 0; lane < lanes; lane += 1) {
      context.beginPath();
      context.roundRect(INSET, 7 + lane * LANE + 2, width - 2 * INSET, LANE - 4, 3);
      context.fill();
    }
    rows.forEach(({ color, prompts, found }, lane) => {
      const top = 7 + lane * LANE;
      context.fillStyle = color;
      for (const [first, end] of found) context.fillRect(left(first), top + 2, left(end) - left(first), LANE - 4);
      for (const frame of prompts) drawMark(context, center(frame), top + LANE / 2, color, style);
    });
    context.fillStyle = style.getPropertyValue("--text");
    context.fillRect(center(this.#index) - 1, 0, 2, height);
    context.beginPath();
    context.arc(center(this.#index), 5, 5, 0, 2 * Math.PI);
    context.fill();
  }
}

/** A diamond where something was clicked. */
function drawMark(context, x, y, color, style) {
  context.save();
  context.translate(x, y);
  context.rotate(Math.PI / 4);
  context.fillStyle = color;
  context.strokeStyle = style.getPropertyValue("--surface");
  context.lineWidth = 2;
  context.beginPath();
  context.rect(-4.5, -4.5, 9, 9);
  context.stroke();
  context.fill();
  context.restore();
}
