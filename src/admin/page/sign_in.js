// Sign-in: the admin token opens a session. The page does not keep the token. Scripts cannot read the session's cookie.

import { call } from "./api.js";
import { el, setText, setVisible } from "./dom.js";

/** The form. `onSignedIn` is called when the gateway has accepted the token. */
export function signIn(onSignedIn) {
  const token = el("input", { type: "password", id: "token", autocomplete: "current-password", required: true, spellcheck: "false" });
  const alert = el("p", { role: "alert", class: "alarm", hidden: true });
  const button = el("button", { type: "submit", class: "main" }, "Sign in");
  const submit = async (event) => {
    event.preventDefault();
    button.disabled = true;
    setVisible(alert, false);
    try {
      await call("POST", "/api/session", { token: token.value.trim() });
      token.value = "";
      onSignedIn();
    } catch (error) {
      setText(alert, words(error));
      setVisible(alert, true);
      token.focus();
      token.select();
    } finally {
      button.disabled = false;
    }
  };
  const element = el("form", { class: "card sign-in", "aria-label": "Sign in", onsubmit: submit },
    el("h1", {}, "Sign in"),
    el("p", { class: "soft" }, "The token is the value of ", el("code", {}, "admin.token"), " in the gateway's config."),
    el("div", { class: "field" }, el("label", { for: "token" }, "Admin token"), token),
    alert, button);
  return { title: "Sign in", element, update() {}, close() {}, focus: () => token.focus() };
}

const words = (error) => (error.status === 401 ? "This is not the admin token of this gateway." : error.message);
