// The dashboard with very many quotas. It measures time, so nothing else should run beside it.

import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";
import { open, pageTest, quotaRow, until } from "./page.mjs";

/** 500 environments with 20 callers each. */
function manyEnvironments() {
  const caller = (n, c) => `{ name: caller-${c}, secret: sk-${n}-${c}-padded-to-length, quotas: { total_tokens: { limit: ${2 + c}k, per: minute } } }`;
  const environment = (n) => `
  team-${String(n).padStart(3, "0")}:
    upstream: backend
    keys: [${Array.from({ length: 20 }, (_, c) => caller(n, c)).join(", ")}]
    quotas: { total_tokens: { limit: 50k, per: minute }, requests: { limit: 100, per: minute } }`;
  return Array.from({ length: 500 }, (_, n) => environment(n)).join("");
}

pageTest("500 environments with 20 callers each", { environments: manyEnvironments() }, async ({ gateway, page }) => {
  const chat = (n, c) => gateway.chat(`team-${String(n).padStart(3, "0")}`, { key: `sk-${n}-${c}-padded-to-length` });
  await chat(7, 3);
  await open(page, gateway);
  await page.getByRole("table", { name: "Quotas" }).getByRole("rowheader").first().waitFor();
  const paint = await page.evaluate(() => performance.getEntriesByName("first-contentful-paint")[0].startTime);
  assert.ok(paint < 300, `the first paint takes ${paint} ms`);
  const drawn = async () => page.getByRole("rowheader").count();
  assert.ok((await drawn()) < 60, "only visible rows are drawn");
  // Updates while 60 callers send requests.
  const durations = [];
  for (let round = 0; round < 8; round += 1) {
    await Promise.all(Array.from({ length: 60 }, (_, n) => chat((round * 60 + n) % 500, n % 20)));
    await sleep(1_000);
    durations.push(await page.evaluate(() => performance.getEntriesByName("update")[0].duration));
  }
  durations.sort((a, b) => a - b);
  console.log(`first paint ${paint.toFixed(0)} ms; updates ${durations.map((ms) => ms.toFixed(1)).join(", ")} ms`);
  // The machine may do other work in some rounds, so the quieter ones count. The goal is 10 ms; a slow machine takes 18.
  assert.ok(durations[1] < 20, `updates take ${durations} ms`);
  await page.getByRole("searchbox", { name: "Filter" }).fill("team-499 caller-19");
  await quotaRow(page, "team-499 · caller caller-19 · total tokens per minute").waitFor();
  await page.getByRole("searchbox", { name: "Filter" }).fill("");
  await page.evaluate(() => scrollTo(0, document.documentElement.scrollHeight));
  await until(async () => (await drawn()) > 5 && (await drawn()) < 60, "the last rows are drawn");
  await page.getByRole("checkbox", { name: "Fold" }).click();
  await page.getByRole("combobox", { name: "Order" }).selectOption("name");
  await page.evaluate(() => scrollTo(0, 0));
  await quotaRow(page, "team-000 · caller caller-0 · total tokens per minute").waitFor();
  await page.getByRole("link", { name: "Limits" }).click();
  await page.getByRole("group", { name: "team-000", exact: true }).waitFor();
  assert.ok((await page.getByRole("group", { name: /^team-/ }).count()) <= 12);
});
