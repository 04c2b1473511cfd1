/** Tracking as the panel shows it: the button, progress, frames a second, time left, and how it ended. */

import { announce, find, secondsInWords } from "./dom.js";
import { notify } from "./notices.js";
import { isPrompted } from "./prompts.js";

export class Tracking {
  #page;
  #follows = false;
  #announced = 0;

  /** @param {{session: Function, show: (frame: number) => void, problem: Function, begin: () => void}} page */
  constructor(page) {
    this.#page = page;
  }

  async start() {
    const session = this.#page.session();
    if (!session || session.tracking) return;
    this.#page.begin();
    this.#follows = true;
    this.#announced = 0;
    announce("Tracking has begun");
    const began = performance.now();
    const outcome = await session.track();
    const time = secondsInWords((performance.now() - began) / 1000);
    if (outcome === "done") announce(`All ${session.video.numFrames} frames were tracked in ${time}`);
    if (outcome === "cancelled") announce("Tracking was cancelled");
    if (outcome === "stopped") {
      notify({ kind: "note", title: "Tracking stopped", text: "Something was changed meanwhile. Track again to follow it through the whole video." });
    }
  }

  /** A frame was tracked: it is shown, unless the person looks at another. */
  took(frame) {
    if (this.#follows) this.#page.show(frame);
    const { done, total } = this.#page.session().tracking;
    const quarter = Math.floor((4 * done) / total);
    if (quarter > this.#announced && quarter < 4) announce(`${quarter * 25} % tracked`);
    this.#announced = quarter;
    this.render();
  }

  lookAway() {
    this.#follows = false;
  }

  render() {
    const session = this.#page.session();
    if (!session) return;
    const { tracking, prompts, isStale, masks, video } = session;
    const button = find("track");
    button.hidden = video.isPicture || tracking !== null;
    button.disabled = !prompts.objects.some(isPrompted);
    const isTracked = masks.size >= video.numFrames;
    button.querySelector("span").textContent =
      isTracked && !isStale ? "Track again" : isStale && isTracked ? "Track the changes" : "Track through the video";
    find("tracking").hidden = tracking === null;
    if (!tracking) return;
    const { done, total, rate, left } = tracking;
    find("tracking-progress").value = done / total;
    find("tracking-text").textContent = rate
      ? `${done} / ${total} frames · ${rate < 10 ? rate.toFixed(1) : Math.round(rate)} frames/s · ${secondsInWords(left)} left`
      : "Tracking begins…";
  }
}
