/** The page: what belongs to what. */

import * as api from "./api.js";
import { announce, find } from "./dom.js";
import { Downloads } from "./downloads.js";
import { openFrames } from "./frames.js";
import { askForToken, showHelp, startKeys } from "./keys.js";
import { clearNotices, explain, notify, sentence } from "./notices.js";
import { Opening, nameOf } from "./opening.js";
import { Session } from "./session.js";
import * as store from "./store.js";
import { startTheme } from "./theme.js";
import { Workspace } from "./workspace.js";

class App {
  #opening = new Opening((video, name) => this.open(video, name));
  #downloads = new Downloads();
  #workspace = new Workspace({
    lost: (error) => this.#lost(error),
    problem: (error, again) => this.#problem(error, again),
    restart: (guided) => this.#restart(guided),
    download: (session) => this.#downloads.show(session),
  });
  #attempt = 0;
  #name = "";
  #failure = null;

  async start() {
    startTheme();
    api.onTokenNeeded(() => askForToken(api.login));
    startKeys({ "?": showHelp, ...this.#workspace.keys });
    find("open").addEventListener("click", () => this.leave());
    addEventListener("pagehide", () => {
      if (!this.#workspace.session) return;
      this.#save();
      api.leave(this.#workspace.session.id);
    });
    addEventListener("pageshow", (event) => event.persisted && location.reload());
    this.#workspace.addEventListener("change", () => this.#save());
    await this.#connect();
  }

  /** Asks what the server is, until it answers and its model is loaded. */
  async #connect() {
    try {
      const server = await api.server();
      this.#describe(server);
      this.#opening.setLimits(server);
      this.#workspace.canHover = server.ready && server.canHover;
      if (!server.ready) setTimeout(() => this.#refresh(), 1000);
    } catch (error) {
      this.#problem(error, () => this.#connect());
      return;
    }
    this.#opening.showSamples().catch((error) => this.#problem(error, () => this.#opening.showSamples()));
    await this.#resume();
  }

  async #refresh() {
    const server = await api.server().catch(() => null);
    if (server) {
      this.#describe(server);
      this.#workspace.canHover = server.ready && server.canHover;
    }
    if (!server?.ready) setTimeout(() => this.#refresh(), 2000);
  }

  #describe({ device, model, dtype, imageSize, randomWeights, ready, failure }) {
    const chip = find("device");
    chip.hidden = false;
    chip.classList.toggle("waiting", !ready);
    chip.classList.toggle("failed", Boolean(failure));
    chip.textContent = wordsOf(device, model, dtype, failure);
    chip.title = model ? `Masks are computed on ${device}, from pictures of ${imageSize} × ${imageSize} pixels` : "";
    find("random").hidden = !randomWeights;
    if (failure && failure !== this.#failure) notify({ title: "The model could not be loaded", text: sentence(failure) });
    this.#failure = failure;
  }

  /** After a reload: the session that this tab had. */
  async #resume() {
    const kept = store.load();
    if (!kept) return;
    this.#name = kept.name;
    try {
      this.#opening.tell(`Opening ${kept.name}`);
      const session = await Session.resume(kept.id, kept.video);
      await this.#enter(session, kept);
      announce(`${kept.name} is open again`);
    } catch (error) {
      if (error.kind === "session") this.#offerAgain(error, kept);
      else this.#problem(error, () => this.#resume());
    } finally {
      this.#opening.tell(null);
    }
  }

  /** The session of a reloaded tab is gone: starts one anew, and asks all of it again. */
  #offerAgain(error, kept) {
    store.forget();
    const again = async () => {
      const session = await this.open(kept.video, kept.name, kept.guided);
      session?.adopt(kept.prompts);
      await session?.sync();
      this.#workspace.show(kept);
    };
    notify({ ...explain(error), actions: [["Start again", again]] });
  }

  /** Opens what the server has: a sample, or what was uploaded. @returns {Promise<Session | null>} */
  async open(video, name = nameOf(video.path), guided = false) {
    const attempt = (this.#attempt += 1);
    this.#opening.tell(`Opening ${name}`);
    try {
      const session = await Session.start(video, guided);
      if (attempt !== this.#attempt) {
        api.closeSession(session.id).catch(() => {});
        return null;
      }
      this.#name = name;
      await this.#enter(session, {});
      announce(`${name} is open. Click on something in the picture.`);
      return session;
    } catch (error) {
      const again = ["Try again", () => this.open(video, name, guided)];
      const { title, text } = explain(error);
      const isOurs = error instanceof api.ApiError && error.kind !== "other";
      notify({ title: isOurs ? title : `${name} cannot be opened`, text: isOurs ? text : error.message, actions: [again] });
      return null;
    } finally {
      this.#opening.tell(null);
    }
  }

  async #enter(session, kept) {
    const onProgress = (done, total) => this.#opening.tell(`Opening ${this.#name}`, total ? done / total : null);
    const frames = await openFrames(session.video, api.address(session.video.path), api.fetchBlob, onProgress);
    const before = this.#workspace.session;
    if (before && before.id !== session.id) api.closeSession(before.id).catch(() => {});
    clearNotices();
    document.body.dataset.view = "work";
    find("start").hidden = true;
    find("work").hidden = false;
    find("open").hidden = false;
    find("title").textContent = this.#name;
    document.title = `${this.#name} · omniops`;
    await this.#workspace.open(session, frames);
    this.#workspace.show(kept);
    this.#save();
  }

  /** Back to where files are chosen; the session is given back. */
  leave() {
    const { session } = this.#workspace;
    this.#attempt += 1;
    this.#workspace.close();
    if (session) api.closeSession(session.id).catch(() => {});
    store.forget();
    clearNotices();
    document.body.dataset.view = "start";
    find("start").hidden = false;
    find("work").hidden = true;
    find("open").hidden = true;
    find("title").textContent = "";
    document.title = "omniops";
    find("choose").focus();
  }

  #save() {
    const { session } = this.#workspace;
    if (!session) return;
    const { id, video, guided, prompts } = session;
    store.save({ id, video, guided, prompts, name: this.#name, ...this.#workspace.view });
  }

  #lost(error) {
    notify({ ...explain(error), actions: [["Start again", () => this.#restart()]] });
  }

  /** A new session in place of the one that ended, or with another choice of upsampling. */
  async #restart(guided = undefined) {
    const { session } = this.#workspace;
    if (!session) return;
    const before = session.id;
    try {
      await session.restart(guided);
      if (guided !== undefined) api.closeSession(before).catch(() => {});
      this.#save();
      announce("A new session was started, and your clicks were made again");
    } catch (error) {
      this.#problem(error, () => this.#restart(guided));
    } finally {
      this.#workspace.render();
    }
  }

  #problem(error, again = null) {
    const known = error instanceof api.ApiError;
    if (!known) console.error(error);
    const words = known ? explain(error) : { title: "Something went wrong", text: `${error.message}. Reload the page and try again.` };
    const canRepeat = again && (!known || ["unreachable", "busy", "token"].includes(error.kind));
    notify({ ...words, actions: canRepeat ? [["Try again", again]] : [] });
  }
}

/** What the server runs on; until the model is loaded only the device is known. */
function wordsOf(device, model, dtype, failure) {
  if (failure) return `${device} · no model`;
  if (!model) return device === "auto" ? "The model is loading…" : `${device} · the model is loading…`;
  return `${device} · SAM 2 ${model.replace("_", " ")} · ${dtype}`;
}

new App().start();
