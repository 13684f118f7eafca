// Headless Chromium for the tests and the screenshots.

import { mkdirSync, mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";
import { chromium } from "playwright-core";

export const SCREENSHOTS = path.resolve(import.meta.dirname, "../../target/page");
const FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--disable-lcd-text", "--enable-precise-memory-info", "--js-flags=--expose-gc"];

/** Starts a browser with an empty profile. `close()` ends it and removes the profile. */
export async function startBrowser() {
  const profile = mkdtempSync(path.join(tmpdir(), "tollgate-page-"));
  const context = await chromium.launchPersistentContext(profile, {
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: FLAGS,
    viewport: { width: 1280, height: 800 },
    permissions: ["clipboard-read", "clipboard-write"],
  });
  const close = async () => {
    await context.close();
    rmSync(profile, { recursive: true, force: true });
  };
  return { context, close };
}

/** A tab that fails the test on an error of a script or on a message of the content security policy. */
export async function newPage(context, { width = 1280, height = 800, colorScheme = "light" } = {}) {
  const page = await context.newPage();
  await page.setViewportSize({ width, height });
  await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
  page.faults = [];
  page.on("pageerror", (error) => page.faults.push(String(error)));
  page.on("console", (message) => {
    const isExpected = /Failed to load resource|net::ERR/.test(message.text());
    if (message.type() === "error" && !isExpected) page.faults.push(message.text());
  });
  return page;
}

/** Leaves a screenshot under `target/page/`. */
export async function screenshot(page, name, options = {}) {
  mkdirSync(SCREENSHOTS, { recursive: true });
  const file = path.join(SCREENSHOTS, `${name}.png`);
  await page.screenshot({ path: file, ...options });
  return file;
}
