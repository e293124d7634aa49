// The theme: the system's, light or dark; kept in this browser.

import { $ } from "./dom.js";

const THEMES = ["system", "light", "dark"];
const KEY = "sam3-theme";

export function attachTheme() {
  let theme = localStorage.getItem(KEY) ?? "system";
  const button = $("#theme");

  function show() {
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.title = `Theme: ${theme}`;
    button.setAttribute("aria-label", button.title);
  }

  button.addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    localStorage.setItem(KEY, theme);
    show();
  });
  show();
}
