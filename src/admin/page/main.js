// The frame of the page: the views by address, sign-in and sign-out, and the state of the connection.

import { call, hasSession } from "./api.js";
import { setAttribute, setText, setVisible } from "./dom.js";
import { exactMoment } from "./format.js";
import { limits } from "./limits.js";
import { connect, live, start, stop, subscribe } from "./live.js";
import { overview } from "./overview.js";
import { refusals } from "./refusals.js";
import { signIn } from "./sign_in.js";
import { system } from "./system.js";
import { usage } from "./usage.js";

const VIEWS = { overview, limits, refusals, usage, system };

const main = document.getElementById("main");
const nav = document.querySelector("nav");
const connection = document.getElementById("connection");
const signOutButton = document.getElementById("sign-out");
const skipLink = document.querySelector(".skip");

/** The visible view: `{title, element, update(what), close()}`. */
let current = null;

function show(view) {
  current?.close();
  current = view;
  main.replaceChildren(view.element);
  document.title = `${view.title} · Tollgate`;
  view.update("state");
  showRefusedConfig();
}

/** Shows the view that the address names: `#/limits/production/...`. */
function showAddress() {
  const [name, ...parts] = location.hash.replace(/^#\/?/, "").split("/").map(decode);
  const key = Object.hasOwn(VIEWS, name) ? name : "overview";
  for (const link of nav.children) setAttribute(link, "aria-current", link.dataset.view === key ? "page" : null);
  setVisible(nav, true);
  setVisible(signOutButton, hasSession());
  show(VIEWS[key](parts));
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function showSignIn() {
  if (current?.title === "Sign in") return;
  setVisible(nav, false);
  setVisible(signOutButton, false);
  setText(connection, "");
  const view = signIn(() => {
    showAddress();
    main.focus({ preventScroll: true });
    connect();
  });
  show(view);
  view.focus();
}

function showConnection() {
  if (current?.title === "Sign in") return;
  const isLost = live.lostSince !== null;
  connection.className = isLost ? "connection lost" : "connection";
  if (!isLost) {
    setText(connection, live.isLoaded ? "Live" : "Connecting …");
    return;
  }
  setText(connection, `Not connected since ${exactMoment(live.lostSince)}. ${live.fault ?? ""}`);
}

/** A refused config is shown above every view but System, which has the faults. */
function showRefusedConfig() {
  const isRefused = (live.config?.faults ?? []).length > 0;
  setVisible(document.getElementById("refused-config"), isRefused && !["System", "Sign in"].includes(current?.title));
}

async function signOut() {
  try {
    await call("DELETE", "/api/session");
  } catch {
    // The session has already ended, or the gateway does not answer. The page deletes its data in both cases.
  }
  stop();
  showSignIn();
}

subscribe((what) => {
  if (what === "connection" || live.lostSince === null) showConnection();
  if (what === "config") showRefusedConfig();
  current?.update(what);
});
addEventListener("hashchange", () => {
  if (current?.title === "Sign in") return;
  showAddress();
  // A view may have moved the focus to what the address names.
  if (main.contains(document.activeElement) && document.activeElement !== main) return;
  scrollTo(0, 0);
  main.focus({ preventScroll: true });
});
signOutButton.addEventListener("click", signOut);
// The address names the view, so the link must not change it.
skipLink.addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
showAddress();
showConnection();
start(showSignIn);
