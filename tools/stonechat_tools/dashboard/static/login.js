import { fill, h } from "./dom.js";
import { ask, session } from "./data.js";

export function showLogin(main) {
  const error = h("p", { class: "error", role: "alert" });
  const button = h("button", { type: "submit", class: "main" }, "Log in");
  const form = h("form", { class: "card narrow", onsubmit: submit },
    h("h1", {}, "Log in"),
    session.role === "viewer" && !session.user && h("p", { class: "hint" }, "You can look at everything without an account. To acknowledge, silence or command, log in as an operator."),
    h("label", {}, "Name", h("input", { name: "name", autocomplete: "username", required: true, maxlength: 32, spellcheck: "false", autocapitalize: "none" })),
    h("label", {}, "Password", h("input", { name: "password", type: "password", autocomplete: "current-password", required: true })),
    error, button,
    h("p", { class: "hint" }, "Accounts are made with ", h("code", {}, "stonechat dashboard user add"), "."));
  fill(main, form);
  form.querySelector("input").focus();

  async function submit(event) {
    event.preventDefault();
    button.disabled = true;
    error.textContent = "";
    try {
      await ask("/api/login", Object.fromEntries(new FormData(form)));
      location.hash = "#/";
      location.reload();
    } catch (failed) {
      error.textContent = failed.message;
      button.disabled = false;
      form.elements.password.select();
    }
  }
}
