/** What outlives a reload of this tab: which session is open, and what was asked of it. */

const KEY = "omniops.session";

export function save(state) {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(state));
  } catch {
    // A browser that keeps nothing, or masks that are too many: a reload then begins anew.
    forget();
  }
}

export function load() {
  try {
    return JSON.parse(sessionStorage.getItem(KEY));
  } catch {
    return null;
  }
}

export function forget() {
  try {
    sessionStorage.removeItem(KEY);
  } catch {
    // Nothing is kept.
  }
}
