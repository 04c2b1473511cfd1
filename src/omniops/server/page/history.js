/** Undo and redo: every state that a person made, as whole values. */

const LONGEST = 200;

export class History {
  #past = [];
  #future = [];
  #present;

  constructor(present) {
    this.#present = present;
  }

  get present() {
    return this.#present;
  }

  get canUndo() {
    return this.#past.length > 0;
  }

  get canRedo() {
    return this.#future.length > 0;
  }

  /** What was asked for now; what was undone is forgotten. */
  push(next) {
    this.#past = [...this.#past.slice(1 - LONGEST), this.#present];
    this.#present = next;
    this.#future = [];
  }

  undo() {
    if (!this.canUndo) return this.#present;
    this.#future.push(this.#present);
    this.#present = this.#past.pop();
    return this.#present;
  }

  redo() {
    if (!this.canRedo) return this.#present;
    this.#past.push(this.#present);
    this.#present = this.#future.pop();
    return this.#present;
  }

  /** After a refusal: the present becomes what the server knows, and no step leads back to what it refused. */
  refuse(known) {
    this.#present = known;
    const words = JSON.stringify(known);
    while (this.#past.length && JSON.stringify(this.#past.at(-1)) === words) this.#past.pop();
    this.#future = [];
  }
}
