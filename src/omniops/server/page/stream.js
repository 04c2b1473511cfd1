/** The stream of masks that POST /propagate_in_video answers: body parts of a length that their headers name. */

const NEWLINE = 10;
const RETURN = 13;

/** The server says why it cannot go on. */
export class StreamError extends Error {}

/** Takes bytes as they come, cut anywhere, and gives the body parts that are complete. */
export class BodyPartParser {
  #bytes = new Uint8Array(0);
  #boundary;
  #headers = null;

  /** @param {string} contentType of the answer: multipart/x-savi-stream; boundary=... */
  constructor(contentType) {
    const found = /^multipart\/x-savi-stream;.*boundary="?([^";]+)"?/i.exec(contentType ?? "");
    if (!found) throw new Error(`not a stream of masks: ${contentType}`);
    this.#boundary = `--${found[1]}`;
  }

  /** @param {Uint8Array} bytes @returns {{headers: Map<string, string>, body: Uint8Array}[]} */
  push(bytes) {
    const buffer = new Uint8Array(this.#bytes.length + bytes.length);
    buffer.set(this.#bytes);
    buffer.set(bytes, this.#bytes.length);
    this.#bytes = buffer;
    const complete = [];
    for (let part = this.#next(); part; part = this.#next()) complete.push(part);
    return complete;
  }

  /** Throws where the stream ended inside a body part. */
  end() {
    if (this.#headers || this.#bytes.some((byte) => byte !== RETURN && byte !== NEWLINE)) {
      throw new Error("the stream ended in the middle of a frame");
    }
  }

  #next() {
    if (!this.#headers) this.#headers = this.#head();
    if (!this.#headers) return null;
    const length = Number(this.#headers.get("content-length"));
    if (!Number.isInteger(length) || length < 0) throw new Error("a part of the stream without its length");
    if (this.#bytes.length < length) return null;
    const part = { headers: this.#headers, body: this.#bytes.slice(0, length) };
    this.#bytes = this.#bytes.slice(length);
    this.#headers = null;
    return part;
  }

  /** The headers of the next body part, or null until all of them are here. */
  #head() {
    let begin = 0;
    while (this.#bytes[begin] === RETURN || this.#bytes[begin] === NEWLINE) begin += 1;
    const end = this.#blankLine(begin);
    if (end < 0) return null;
    const lines = new TextDecoder().decode(this.#bytes.subarray(begin, end)).split("\r\n");
    if (lines[0] !== this.#boundary) throw new Error("a part of the stream without its boundary");
    this.#bytes = this.#bytes.slice(end + 4);
    return new Map(
      lines.slice(1).map((line) => {
        const colon = line.indexOf(":");
        return [line.slice(0, colon).trim().toLowerCase(), line.slice(colon + 1).trim()];
      }),
    );
  }

  #blankLine(begin) {
    for (let offset = begin; offset + 3 < this.#bytes.length; offset += 1) {
      const [a, b, c, d] = this.#bytes.subarray(offset, offset + 4);
      if (a === RETURN && b === NEWLINE && c === RETURN && d === NEWLINE) return offset;
    }
    return -1;
  }
}

/**
 * The frames of a stream as they come.
 * @param {Response} response
 * @yields {{frame: number, masks: [number, {size: number[], counts: string}][]}}
 */
export async function* framesOf(response) {
  const parser = new BodyPartParser(response.headers.get("content-type"));
  const reader = response.body.getReader();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      for (const { headers, body } of parser.push(value)) {
        const type = headers.get("content-type") ?? "";
        if (!type.startsWith("application/json") && !type.startsWith("application/problem+json")) continue;
        const answer = JSON.parse(new TextDecoder().decode(body));
        if (answer.error) throw new StreamError(answer.error.message);
        yield { frame: answer.frame_index, masks: answer.results.map(({ object_id, mask }) => [object_id, mask]) };
      }
    }
    parser.end();
  } finally {
    reader.cancel().catch(() => {});
  }
}
