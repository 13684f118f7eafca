// Calls to the admin API.

/** A refusal of the API, or a failed connection. `message` is a sentence for the user. */
export class ApiError extends Error {
  /** `status` is 0 if there was no answer. */
  constructor(status, code, message) {
    super(message);
    Object.assign(this, { status, code });
  }
}

/** Called when the API requires a sign-in. */
let onSignInNeeded = () => {};

export function setSignInHandler(handler) {
  onSignInNeeded = handler;
}

/** The value of a cookie that scripts may read. */
export function cookie(name) {
  const pair = document.cookie.split("; ").find((text) => text.startsWith(`${name}=`));
  return pair ? pair.slice(name.length + 1) : "";
}

/** Whether this browser has signed in. */
export const hasSession = () => cookie("tollgate_csrf") !== "";

/** Sends a request. Returns the answer, whose body is not read yet. Throws `ApiError`. */
export async function open(method, path, options = {}) {
  const headers = { ...options.headers };
  if (method !== "GET" && hasSession()) headers["x-tollgate-csrf"] = cookie("tollgate_csrf");
  const answer = await fetch(path, { ...options, method, headers }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "unreachable", "The gateway does not answer.");
  });
  if (answer.ok) return answer;
  const { error } = await answer.json().catch(() => ({}));
  if (answer.status === 401 && path !== "/api/session") onSignInNeeded();
  const message = error?.message ?? `The gateway answered with status ${answer.status}.`;
  throw new ApiError(answer.status, error?.code ?? "", message);
}

/** Sends a request. Returns the JSON of the answer, or its text if it is not JSON. Throws `ApiError`. */
export async function call(method, path, body) {
  const options = body === undefined ? {} : { body: JSON.stringify(body), headers: { "content-type": "application/json" } };
  const answer = await open(method, path, options);
  const isJson = (answer.headers.get("content-type") ?? "").includes("json");
  return isJson ? answer.json() : answer.text();
}

export const get = (path) => call("GET", path);

/** The address of a quota. */
export function quotaPath(environment, quota) {
  if (quota.scope.startsWith("upstream")) {
    const [upstream, model] = quota.scope === "upstream" ? [quota.name] : quota.name.split(/\/(.*)/s);
    const parts = [upstream, "quotas", quota.kind, quota.per].map(encodeURIComponent);
    return `/api/upstreams/${parts.join("/")}${model ? `?${new URLSearchParams({ model })}` : ""}`;
  }
  const parts = [environment, "quotas", quota.kind, quota.per].map(encodeURIComponent);
  const query = quota.name ? new URLSearchParams({ scope: quota.scope, name: quota.name }) : "";
  return `/api/environments/${parts.join("/")}${query && `?${query}`}`;
}

/** Adds a parameter to an address. */
export const withQuery = (path, query) => path + (path.includes("?") ? "&" : "?") + query;
