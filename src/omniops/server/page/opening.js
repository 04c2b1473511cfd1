/** What is opened: a file that was chosen, dropped or pasted, a sample, or a snapshot of the webcam. */

import * as api from "./api.js";
import { bytesInWords, find, make, secondsInWords } from "./dom.js";
import { explain, notify, sentence } from "./notices.js";

const PICTURES = /\.(jpe?g|png|webp|bmp|gif|tiff?|heic|heif|avif)$/i;
const VIDEOS = /\.(mp4|m4v|mov|webm|mkv|avi|mpe?g|ts|mts|ogv|3gp|wmv|flv)$/i;

/** "picture", "video" or null, by the type that the browser names, else by the name's ending. */
export function kindOf({ name, type }) {
  if (type.startsWith("image/") && type !== "image/svg+xml") return "picture";
  if (type.startsWith("video/")) return "video";
  if (PICTURES.test(name)) return "picture";
  return VIDEOS.test(name) ? "video" : null;
}

export class Opening {
  #open;
  #limits = null;
  #cancel = null;

  /** @param {(video: object, name: string) => Promise<void>} open shows what the server has now */
  constructor(open) {
    this.#open = open;
    const file = find("file");
    find("choose").addEventListener("click", () => file.click());
    file.addEventListener("change", () => {
      if (file.files.length) this.take(file.files[0]);
      file.value = "";
    });
    find("opening-cancel").addEventListener("click", () => this.#cancel?.abort());
    this.#listenForDrops();
    startWebcam((picture) => this.take(picture));
  }

  /** @param {{maxUploadBytes: number, maxUploadSeconds: number}} server */
  setLimits(server) {
    this.#limits = server;
    const { maxUploadBytes, maxUploadSeconds } = server;
    find("limits").textContent =
      `Up to ${bytesInWords(maxUploadBytes)}; of longer videos the first ${secondsInWords(maxUploadSeconds)}. ` +
      "The file goes to this server only.";
  }

  async showSamples() {
    const videos = await api.samples();
    find("samples").hidden = !videos.length;
    find("gallery").replaceChildren(...videos.map((video) => this.#sample(video)));
  }

  #sample(video) {
    const name = nameOf(video.path);
    const picture = make("img", { alt: "", loading: "lazy", width: video.width, height: video.height });
    if (video.posterPath) picture.src = api.address(video.posterPath);
    else if (video.isPicture) picture.src = api.address(video.path);
    const length = video.numFrames && video.fps && !video.isPicture ? secondsInWords(video.numFrames / video.fps) : "";
    const words = make("span", { class: "sample-name" }, name, make("small", {}, length));
    return make("li", {}, make("button", { type: "button", class: "sample", onclick: () => this.#open(video, name) }, picture, words));
  }

  /** Uploads a file and opens it; says why where it cannot. */
  async take(file) {
    const kind = kindOf(file);
    if (!kind) {
      notify({
        title: "This kind of file cannot be opened",
        text: `${file.name} is neither a picture nor a video. Choose a JPEG, PNG, WebP or HEIC picture, or an MP4, MOV, WebM or MKV video.`,
      });
      return;
    }
    if (this.#limits && file.size > this.#limits.maxUploadBytes) {
      notify({
        title: "The file is too large",
        text: `${file.name} has ${bytesInWords(file.size)}, the server takes ${bytesInWords(this.#limits.maxUploadBytes)}. Choose a smaller one, or cut it first.`,
      });
      return;
    }
    await this.#upload(file, kind);
  }

  async #upload(file, kind) {
    this.#cancel?.abort();
    const cancel = (this.#cancel = new AbortController());
    const tell = (words, share) => cancel === this.#cancel && this.tell(`${words} ${file.name}`, share);
    tell("Uploading", 0);
    try {
      const video = await api.upload(file, kind === "picture", tell, cancel.signal);
      await this.#open(video, file.name);
    } catch (error) {
      if (error.name !== "AbortError") this.#failed(error, file, kind);
    } finally {
      if (cancel === this.#cancel) {
        this.#cancel = null;
        this.tell(null);
      }
    }
  }

  #failed(error, file, kind) {
    const again = ["Try again", () => this.#upload(file, kind)];
    if (error.kind === "unreachable" || error.kind === "busy") {
      notify({ ...explain(error), actions: [again] });
    } else {
      const advice = kind === "picture" ? "Try another file, or save it as JPEG or PNG." : "Try another file, or save it as MP4.";
      notify({ title: `${file.name} cannot be opened`, text: `${sentence(error.message)} ${advice}` });
    }
  }

  /** Shows how far opening is: share in [0, 1], null where nobody knows. Without words it is hidden. */
  tell(words, share = null) {
    find("opening").hidden = words === null;
    if (words === null) return;
    find("opening-text").textContent = `${words}…`;
    find("opening-cancel").hidden = this.#cancel === null;
    const bar = find("opening-progress");
    if (share === null) bar.removeAttribute("value");
    else bar.value = share;
  }

  #listenForDrops() {
    let depth = 0;
    const show = (over) => {
      find("drop").classList.toggle("over", over);
      find("veil").hidden = !over;
    };
    const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
    addEventListener("dragenter", (event) => hasFiles(event) && show((depth += 1) > 0));
    addEventListener("dragleave", (event) => hasFiles(event) && show((depth = Math.max(0, depth - 1)) > 0));
    addEventListener("dragover", (event) => hasFiles(event) && event.preventDefault());
    addEventListener("drop", (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      show(false);
      depth = 0;
      if (event.dataTransfer.files.length) this.take(event.dataTransfer.files[0]);
    });
    addEventListener("paste", (event) => {
      if (event.clipboardData?.files.length) this.take(event.clipboardData.files[0]);
    });
  }
}

/** The name that a person knows a path of the API by. */
export function nameOf(path) {
  return path.split("/").pop().replace(/\.[^.]+$/, "").replace(/[_-]+/g, " ");
}

/** @param {(picture: File) => void} take */
function startWebcam(take) {
  const dialog = find("webcam-dialog");
  const video = find("webcam-video");
  const snap = find("snap");
  const stop = () => {
    for (const track of video.srcObject?.getTracks() ?? []) track.stop();
    video.srcObject = null;
    snap.disabled = true;
  };
  find("webcam").addEventListener("click", async () => {
    if (!navigator.mediaDevices?.getUserMedia) {
      notify({
        title: "The webcam cannot be used here",
        text: "Browsers give it to pages on this machine or over https only. Open the page at localhost, or start the server with --certfile and --keyfile.",
      });
      return;
    }
    try {
      const stream = await navigator.mediaDevices.getUserMedia({ video: { width: { ideal: 1280 } }, audio: false });
      video.srcObject = stream;
      dialog.showModal();
      await video.play();
      snap.disabled = false;
    } catch (error) {
      stop();
      dialog.close();
      const text =
        error.name === "NotAllowedError"
          ? "The browser was not allowed to use it. Allow the camera for this page, in the address bar, and try again."
          : "No camera was found, or another program uses it. Connect one, or close the other program.";
      notify({ title: "The webcam cannot be used", text });
    }
  });
  dialog.addEventListener("close", stop);
  snap.addEventListener("click", () => {
    const canvas = make("canvas", { width: video.videoWidth, height: video.videoHeight });
    canvas.getContext("2d").drawImage(video, 0, 0);
    canvas.toBlob((blob) => {
      dialog.close();
      take(new File([blob], "webcam.png", { type: "image/png" }));
    }, "image/png");
  });
}
