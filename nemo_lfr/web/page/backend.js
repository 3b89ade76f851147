/** Open the backend that the page names in `<meta name="backend">`. */

import { byId } from "./dom.js";

/** @import { Backend } from "./types.js" */

/**
 * Open the backend of this page.
 *
 * @param {(message: string) => void} showStatus
 * @returns {Promise<Backend>}
 * @throws {import("./types.js").UserError} if the backend cannot be used
 */
export async function openBackend(showStatus) {
  const base = new URL(".", document.baseURI);
  const kind = document.querySelector("meta[name=backend]")?.getAttribute("content");
  if (kind === "browser") {
    const { open } = await import("./browser.js");
    return open(base);
  }
  return openServer(base, showStatus);
}

/**
 * Connect to the server, and ask the user for its access token if it requires one.
 *
 * A link may contain the token after "#token=". Browsers do not send this part of a link to servers.
 *
 * @param {URL} base
 * @param {(message: string) => void} showStatus
 * @returns {Promise<Backend>}
 */
async function openServer(base, showStatus) {
  const { open, TokenError } = await import("./server.js");
  let token = new URLSearchParams(location.hash.slice(1)).get("token") ?? "";
  for (;;) {
    try {
      return await open(base, token);
    } catch (error) {
      if (!(error instanceof TokenError)) throw error;
      showStatus(token ? "The access token is wrong." : "Enter the access token of this server.");
      token = await askToken();
    }
  }
}

/** @returns {Promise<string>} */
function askToken() {
  const form = byId("access", HTMLFormElement);
  const input = byId("token", HTMLInputElement);
  form.hidden = false;
  input.focus();
  return new Promise((resolve) => {
    form.addEventListener(
      "submit",
      (event) => {
        event.preventDefault();
        form.hidden = true;
        resolve(input.value.trim());
      },
      { once: true },
    );
  });
}
