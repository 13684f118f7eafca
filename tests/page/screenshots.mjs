// The pictures of the documents, from `tollgate demo`.

import { spawn } from "node:child_process";
import path from "node:path";
import readline from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { newPage, startBrowser } from "./browser.mjs";

const ROOT = path.resolve(import.meta.dirname, "../..");
const BINARY = process.env.TOLLGATE_BIN ?? path.join(ROOT, "target/debug/tollgate");
/** The demo runs for so long before the pictures are taken. */
const TRAFFIC_MS = 100_000;

const demo = spawn(BINARY, ["demo"], { stdio: ["ignore", "pipe", "ignore"] });
const { context, close } = await startBrowser();
try {
  const admin = await addressOf(demo);
  const page = await newPage(context, { width: 1180, height: 760 });
  const dark = await newPage(context, { width: 1180, height: 760, colorScheme: "dark" });
  await page.goto(`${admin}/#/overview`);
  await dark.goto(`${admin}/#/overview`);
  await sleep(TRAFFIC_MS);
  await picture(page, "overview");
  await picture(dark, "overview-dark");
  await page.goto(`${admin}/#/limits`);
  const form = page.getByRole("group", { name: "sandbox", exact: true }).getByRole("group", { name: "total tokens per minute", exact: true });
  await form.getByLabel("Limit", { exact: true }).fill("3k");
  await form.getByLabel("For").fill("2h");
  await form.getByLabel("Reason").fill("load test");
  await form.getByText(/Not saved yet/).waitFor();
  await picture(page, "limits");
  for (const view of ["refusals", "usage", "system"]) {
    await page.goto(`${admin}/#/${view}`);
    await sleep(1_500);
    await picture(page, view);
  }
} finally {
  await close();
  demo.kill("SIGTERM");
}

async function addressOf(process) {
  for await (const line of readline.createInterface({ input: process.stdout })) {
    const found = /Dashboard: (http:\/\/[\d.:]+)/.exec(line);
    if (found) return found[1];
  }
  throw new Error("the demo does not start");
}

async function picture(page, name) {
  await page.screenshot({ path: path.join(ROOT, "docs", `page-${name}.png`) });
}
