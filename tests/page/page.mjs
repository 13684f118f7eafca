// What the tests of the dashboard share: a browser, a gateway and a tab for each test. Each test leaves a screenshot under target/page/.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { after, before, test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { newPage, screenshot, startBrowser } from "./browser.mjs";
import { Gateway, TWO_ENVIRONMENTS } from "./gateway.mjs";

const AXE = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
export const VIEWS = ["Overview", "Limits", "Refusals", "Usage", "System"];

let browser;

before(async () => {
  browser = await startBrowser();
});
after(() => browser.close());

/** Runs a test with a gateway and a tab. The tab must have reported no fault. */
export function pageTest(name, options, body) {
  test(name, async () => {
    const gateway = await Gateway.start({ environments: TWO_ENVIRONMENTS, ...options });
    const page = await newPage(browser.context, options);
    try {
      await body({ gateway, page });
      assert.deepEqual(page.faults, []);
    } finally {
      await screenshot(page, name.replace(/[^a-z0-9]+/gi, "-")).catch(() => {});
      await page.close();
      await gateway.stop();
      await browser.context.clearCookies();
    }
  });
}

/** Opens a view and waits until the page is connected. */
export async function open(page, gateway, view = "overview") {
  await page.goto(`${gateway.admin}/#/${view}`);
  await page.getByText("Live", { exact: true }).waitFor();
}

export const quotaRow = (page, name) => page.getByRole("table", { name: "Quotas" }).getByRole("row").filter({ has: page.getByRole("rowheader", { name, exact: true }) });

/** The form of a quota of an environment. */
export const quotaForm = (page, environment, name) => page.getByRole("group", { name: environment, exact: true }).getByRole("group", { name, exact: true });

export async function assertNoViolation(page, what) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => globalThis.axe.run());
  const found = violations.map(({ id, nodes }) => `${id}: ${nodes.map((node) => `${node.html} ${node.failureSummary}`).join("; ")}`);
  assert.deepEqual(found, [], what);
}

/** Nothing is wider than the page, and nothing leaves its card. */
export async function assertFits(page, what) {
  const wide = await page.evaluate(() => {
    const cards = [...document.querySelectorAll("html, .card, .answer, .tile, .quota-form, .quotas, .refusals, .causes li")];
    return cards.filter((card) => card.scrollWidth > card.clientWidth + 1).map((card) => `${card.tagName} ${card.className}: ${card.scrollWidth} px in ${card.clientWidth} px`);
  });
  assert.deepEqual(wide, [], what);
}

/** Waits until `condition` holds. */
export async function until(condition, what, ms = 10_000) {
  const end = Date.now() + ms;
  while (!(await condition())) {
    assert.ok(Date.now() < end, `not within ${ms} ms: ${what}`);
    await sleep(50);
  }
}
