// The dashboard in a real browser, on the gateway's real binary.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { setTimeout as sleep } from "node:timers/promises";
import { screenshot } from "./browser.mjs";
import { TWO_ENVIRONMENTS } from "./gateway.mjs";
import { assertFits, assertNoViolation, open, pageTest, quotaForm, quotaRow, until, VIEWS } from "./page.mjs";

const isFocused = (locator) => locator.evaluate((element) => element === document.activeElement);

pageTest("first load", {}, async ({ gateway, page }) => {
  await gateway.chat("production", { key: "sk-test-batch-caller" });
  await open(page, gateway, "");
  for (const name of VIEWS) await page.getByRole("link", { name, exact: true }).waitFor();
  assert.equal(await page.getByRole("link", { name: "Overview" }).getAttribute("aria-current"), "page");
  for (const name of ["production · total tokens per minute", "production · caller batch · total tokens per minute", "production · model gpt-4.1* · requests per minute", "sandbox · total tokens per minute"]) {
    await quotaRow(page, name).waitFor();
  }
  await page.getByText("100 of 1,000,000").first().waitFor();
  const day = await quotaRow(page, "production · total tokens per day").textContent();
  assert.match(day, /resets in .* \(at .*Berlin/);
  await page.getByRole("searchbox", { name: "Filter" }).fill("caller batch");
  await until(async () => (await page.getByRole("rowheader").count()) === 1, "one row is left");
  await page.getByRole("searchbox", { name: "Filter" }).fill("");
  await page.getByRole("checkbox", { name: "Fold" }).check();
  await page.getByRole("button", { name: /more quotas of production/, expanded: false }).click();
  await page.getByRole("button", { name: /more quotas of production/, expanded: true }).waitFor();
});

pageTest("an unused gateway shows the first request", {}, async ({ gateway, page }) => {
  await open(page, gateway);
  const panel = page.getByRole("region", { name: "Send the first request" });
  await panel.getByText("The environment sandbox has no keys in the config, and accepts any key.").waitFor();
  const port = new URL(gateway.address).port;
  for (const language of ["curl", "Python", "Node"]) {
    await panel.getByRole("button", { name: language }).click();
    await until(async () => (await panel.textContent()).includes(`:${port}/`), `${language} has the address of the gateway`);
  }
  assert.equal(await gateway.chat("sandbox"), 200);
  await panel.waitFor({ state: "detached" });
});

pageTest("live update while traffic runs", {}, async ({ gateway, page }) => {
  await gateway.chat("sandbox");
  await open(page, gateway);
  const row = quotaRow(page, "sandbox · total tokens per minute");
  await row.waitFor();
  await row.evaluate((element) => (element.isSame = true));
  for (let n = 0; n < 6; n += 1) await gateway.chat("sandbox");
  await row.getByText(/refused/).waitFor();
  await page.getByRole("region", { name: "Runs out first" }).getByText("sandbox · total tokens per minute").waitFor();
  assert.ok(await row.evaluate((element) => element.isSame === true), "the row was updated in place");
  await page.getByRole("link", { name: "Refusals" }).click();
  const table = page.getByRole("table", { name: "Refusals" });
  await table.getByText("sandbox · total tokens per minute").first().waitFor();
  const rows = await table.getByRole("row").count();
  await gateway.chat("sandbox");
  await until(async () => (await table.getByRole("row").count()) > rows, "a new refusal arrives");
  const causes = page.getByRole("region", { name: "By cause" });
  await causes.getByText("sandbox · total tokens per minute").waitFor();
  await causes.getByText(`${rows} refusals in the last 24 hours.`).waitFor();
});

const UPSTREAM_QUOTAS = `quotas: { requests: { limit: 3, per: day } }, model_quotas: { "gpt-4o*": { total_tokens: { limit: 5k, per: minute } } }`;

pageTest("quotas of an upstream are shown beside those of environments and can be set", { upstream: UPSTREAM_QUOTAS }, async ({ gateway, page }) => {
  for (const environment of ["sandbox", "production", "sandbox"]) {
    assert.equal(await gateway.chat(environment, { key: environment === "production" ? "sk-test-batch-caller" : "any" }), 200);
  }
  assert.equal(await gateway.chat("sandbox"), 429);
  await open(page, gateway);
  const row = quotaRow(page, "upstream backend · requests per day");
  await row.getByText("3 of 3").waitFor();
  await quotaRow(page, "upstream backend · model gpt-4o* · total tokens per minute").waitFor();
  await page.getByRole("region", { name: "Runs out first" }).getByText("upstream backend · requests per day").waitFor();
  await page.getByRole("link", { name: "Refusals" }).click();
  await page.getByRole("table", { name: "Refusals" }).getByText("sandbox · upstream backend · requests per day").waitFor();
  await page.getByRole("link", { name: "Overview" }).click();
  await row.getByRole("link").click();
  const form = quotaForm(page, "upstream backend", "requests per day");
  assert.equal(await form.getByLabel("Limit", { exact: true }).inputValue(), "3");
  await form.getByLabel("Limit", { exact: true }).fill("5");
  await form.getByRole("status").getByText("2 would be left now").waitFor();
  await form.getByRole("button", { name: "Save" }).click();
  await form.getByRole("status").getByText("Saved: 5 requests per day").waitFor();
  assert.equal(await gateway.chat("sandbox"), 200);
  await page.getByRole("link", { name: "System" }).click();
  await page.getByRole("table", { name: "Overrides" }).getByText("upstream backend · requests per day").waitFor();
  await assertNoViolation(page, "system");
  await page.getByRole("link", { name: "Limits" }).click();
  await form.getByRole("button", { name: "Undo" }).click();
  await form.getByText("3 requests per day, as in the file").waitFor();
  await assertNoViolation(page, "limits");
});

pageTest("a refusal by the provider's limit names the upstream", { upstream: "provider_limits: follow" }, async ({ gateway, page }) => {
  // The provider refuses the first request, and the gateway the second one.
  for (let n = 0; n < 2; n += 1) assert.equal(await gateway.chat("sandbox", { model: "gpt-4o-limited" }), 429);
  await open(page, gateway, "refusals");
  const cause = "sandbox · upstream backend · upstream rate limited";
  const row = page.getByRole("table", { name: "Refusals" }).getByRole("row").filter({ hasText: cause });
  await row.getByText(/after (2\d|30) s/).waitFor();
  await page.getByRole("region", { name: "By cause" }).getByText(cause).waitFor();
});

pageTest("System shows the state of replicas", { upstream: "health: { path: /health, every: 100ms }" }, async ({ gateway, page }) => {
  assert.equal(await gateway.chat("sandbox"), 200);
  await open(page, gateway, "system");
  const table = page.getByRole("table", { name: "Replicas" });
  await table.getByText("fails its health check, used all the same").waitFor();
  await table.getByText(`127.0.0.1:${gateway.backend.address().port}`).waitFor();
  await assertNoViolation(page, "system");
});

pageTest("a limit is set, enforced and undone", {}, async ({ gateway, page }) => {
  assert.equal(await gateway.chat("sandbox"), 200);
  await open(page, gateway, "limits");
  const form = quotaForm(page, "sandbox", "total tokens per minute");
  assert.ok(await form.getByRole("radio", { name: "Specify" }).isChecked());
  await form.getByLabel("Limit", { exact: true }).fill("120");
  await form.getByLabel("For").fill("2h");
  await form.getByLabel("Reason").fill("a test");
  const status = form.getByRole("status");
  await status.getByText("Not saved yet. With 120 tokens per minute for 2h").waitFor();
  assert.equal((await gateway.quota("sandbox", "total_tokens", "minute")).limit, 500);
  await form.getByRole("button", { name: "Save" }).click();
  await status.getByText("Saved: 120 tokens per minute until").waitFor();
  const set = await gateway.quota("sandbox", "total_tokens", "minute");
  assert.deepEqual([set.limit, set.override.reason, set.override.file_limit], [120, "a test", 500]);
  assert.ok(Date.parse(set.override.until) > Date.now() + 7_000_000);
  const statuses = [await gateway.chat("sandbox"), await gateway.chat("sandbox")];
  assert.ok(statuses.includes(429), `${statuses}`);
  await page.getByRole("button", { name: "Copy as YAML" }).click();
  await until(async () => (await page.getByLabel("Overrides as YAML").inputValue()).includes("120"), "the YAML has the limit");
  // The end stays unless another one is entered.
  await form.getByLabel("Limit", { exact: true }).fill("110");
  await status.getByText("Not saved yet. With 110 tokens per minute until").waitFor();
  await form.getByRole("button", { name: "Save" }).click();
  await status.getByText("Saved: 110 tokens per minute until").waitFor();
  const { override } = await gateway.quota("sandbox", "total_tokens", "minute");
  assert.ok(Math.abs(Date.parse(override.until) - Date.parse(set.override.until)) < 1_000, `${override.until}, before ${set.override.until}`);
  await form.getByLabel("For").fill("no end");
  await form.getByRole("button", { name: "Save" }).click();
  await status.getByText("Saved: 110 tokens per minute.").waitFor();
  assert.equal((await gateway.quota("sandbox", "total_tokens", "minute")).override.until, null);
  await form.getByRole("button", { name: "Undo" }).click();
  await status.getByText("Undone: 110 tokens per minute until").waitFor();
  await form.getByRole("button", { name: "Undo" }).click();
  await status.getByText("Undone: 500 tokens per minute, as in the file").waitFor();
  assert.equal((await gateway.quota("sandbox", "total_tokens", "minute")).source, "file");
  await page.getByRole("link", { name: "Overview" }).click();
  await quotaRow(page, "sandbox · total tokens per minute").getByText("of 500").waitFor();
});

pageTest("a limit that others change, or that ends, is shown", {}, async ({ gateway, page }) => {
  await open(page, gateway, "limits");
  await page.getByRole("button", { name: "Copy as YAML" }).click();
  await page.getByText("Nothing to copy").waitFor();
  const form = quotaForm(page, "sandbox", "total tokens per minute");
  const status = form.getByRole("status");
  const save = async (limit, length) => {
    await form.getByLabel("Limit", { exact: true }).fill(limit);
    await form.getByLabel("For").fill(length);
    await form.getByRole("button", { name: "Save" }).click();
    await status.getByText(`Saved: ${limit} tokens per minute`).waitFor();
  };
  await save("450", "2s");
  await status.getByText("The override has ended: 500 tokens per minute, as in the file.").waitFor();
  await save("60", "");
  const setByOthers = (limit) => gateway.api("environments/sandbox/quotas/total_tokens/minute", "PUT", { limit });
  await setByOthers(700);
  await status.getByText("Changed meanwhile: 700 tokens per minute.").waitFor();
  await form.getByRole("button", { name: "Undo" }).click();
  await status.getByText("Undo again to go back to the file.").waitFor();
  assert.equal((await gateway.quota("sandbox", "total_tokens", "minute")).limit, 700);
  await form.getByLabel("Limit", { exact: true }).fill("80");
  await setByOthers(800);
  await form.getByText("of 800 used").waitFor();
  await form.getByRole("button", { name: "Save" }).click();
  await status.getByText("Changed meanwhile: 800 tokens per minute. Save again to replace it.").waitFor();
  await form.getByRole("button", { name: "Save" }).click();
  await status.getByText("Saved: 80 tokens per minute").waitFor();
});

pageTest("shadow mode is shown, and leaves no override when it ends", {}, async ({ gateway, page }) => {
  await open(page, gateway, "limits");
  const card = page.getByRole("group", { name: "sandbox", exact: true });
  await card.getByRole("checkbox", { name: "Enforce" }).uncheck();
  await card.getByText("Shadow mode: quotas count and refuse nothing, by an override.").waitFor();
  for (let n = 0; n < 7; n += 1) assert.equal(await gateway.chat("sandbox"), 200);
  await page.getByRole("link", { name: "Overview" }).click();
  await quotaRow(page, "sandbox · total tokens per minute").getByText("shadow mode").waitFor();
  const answer = page.getByRole("region", { name: "Runs out first" });
  await answer.getByText("Shadow mode, refuses nothing: sandbox.").waitFor();
  assert.equal(await answer.getByRole("link", { name: /sandbox/ }).count(), 0);
  assert.match(await page.getByRole("region", { name: "Now" }).textContent(), /quotas spent0/);
  await page.getByRole("link", { name: "Limits" }).click();
  await card.getByRole("checkbox", { name: "Enforce" }).check();
  await card.getByText("Quotas are enforced.").waitFor();
  assert.deepEqual((await gateway.api("overrides")).enforce, []);
});

pageTest("amounts and begins of periods are exact", {}, async ({ gateway, page }) => {
  await open(page, gateway);
  const amounts = await page.evaluate(async () => {
    const { amount } = await import("/page/format.js");
    return ["400000", "400,000", "400 000", "400k", "1.5M", ".5m", "1,234.5k", "1125899906842624", "1,5M", "10,00", "1.000", "1.5", "1.50k", "1,000.000", "0.0001k", "0", "1125899906842625", "", "k", "many"]
      .map((text) => amount(text).value ?? null);
  });
  assert.deepEqual(amounts, [400_000, 400_000, 400_000, 400_000, 1_500_000, 500_000, 1_234_500, 2 ** 50, ...new Array(12).fill(null)]);
  const periods = [
    ["month", "Europe/Berlin", "2026-12-31T23:00Z", "2026-11-30T23:00Z"],
    ["month", "Europe/Berlin", "2026-03-31T22:00Z", "2026-02-28T23:00Z"],
    ["month", "Asia/Kathmandu", "2026-11-30T18:15Z", "2026-10-31T18:15Z"],
    ["month", "America/New_York", "2026-04-01T04:00Z", "2026-03-01T05:00Z"],
    ["week", "Europe/Berlin", "2026-03-29T22:00Z", "2026-03-22T23:00Z"],
    ["day", "Europe/Berlin", "2026-10-25T23:00Z", "2026-10-24T22:00Z"],
    // The clocks go forward at midnight, and back from 1:00 to midnight.
    ["day", "Africa/Cairo", "2026-04-24T21:00Z", "2026-04-23T22:00Z"],
    ["day", "America/Havana", "2026-11-02T05:00Z", "2026-11-01T04:00Z"],
    ["hour", "Asia/Kathmandu", "2026-11-30T18:15Z", "2026-11-30T17:15Z"],
    ["minute", "UTC", "2026-11-30T18:15Z", "2026-11-30T18:14Z"],
  ];
  const begins = await page.evaluate(async (all) => {
    const { periodBegin } = await import("/page/quota_rows.js");
    return all.map(([per, zone, end]) => new Date(periodBegin({ json: { per }, zone, resetsAt: Date.parse(end) })).toISOString());
  }, periods);
  assert.deepEqual(begins.map((text) => text.replace(":00.000", "")), periods.map(([, , , begin]) => begin));
});

pageTest("a filter without a match says so", {}, async ({ gateway, page }) => {
  for (let n = 0; n < 7; n += 1) await gateway.chat("sandbox");
  await open(page, gateway, "limits/nowhere/environment//requests/minute");
  await page.getByText("No environment or upstream has the name “nowhere”.").waitFor();
  await page.goto(`${gateway.admin}/#/limits/sandbox/caller/gone/requests/minute`);
  await page.getByText("There is no quota “caller gone · requests per minute”.").waitFor();
  await page.getByRole("link", { name: "Refusals" }).click();
  await page.getByRole("table", { name: "Refusals" }).waitFor();
  await page.getByRole("searchbox", { name: "Filter" }).fill("nowhere");
  await page.getByText("No refused request matches the filter.").waitFor();
});

pageTest("a refused limit is explained", {}, async ({ gateway, page }) => {
  await open(page, gateway, "limits");
  const form = quotaForm(page, "sandbox", "total tokens per minute");
  for (const [text, words] of [["many", "Enter a whole number"], ["1,5M", "A comma separates groups"], ["1.000", "is not clear"]]) {
    await form.getByLabel("Limit", { exact: true }).fill(text);
    await form.getByRole("button", { name: "Save" }).click();
    await form.getByRole("status").getByText(words).waitFor();
  }
  assert.equal((await gateway.quota("sandbox", "total_tokens", "minute")).limit, 500);
  await form.getByRole("button", { name: "Undo" }).click();
  assert.equal(await form.getByLabel("Limit", { exact: true }).inputValue(), "500");
});

pageTest("unlimited to specified and back", {}, async ({ gateway, page }) => {
  await gateway.chat("sandbox");
  await open(page, gateway, "limits");
  const form = quotaForm(page, "sandbox", "requests per minute");
  assert.ok(await form.getByRole("radio", { name: "Unlimited" }).isChecked());
  await form.getByRole("radio", { name: "Specify" }).check();
  await form.getByLabel("Limit", { exact: true }).fill("1");
  await form.getByRole("button", { name: "Save" }).click();
  await form.getByRole("status").getByText("Saved: 1 request per minute").waitFor();
  assert.deepEqual([await gateway.chat("sandbox"), await gateway.chat("sandbox")].at(-1), 429);
  await form.getByRole("radio", { name: "Unlimited" }).check();
  await form.getByRole("button", { name: "Save" }).click();
  await form.getByRole("status").getByText("Saved: unlimited").waitFor();
  assert.equal(await gateway.chat("sandbox"), 200);
  await form.getByRole("button", { name: "Undo" }).click();
  await form.getByRole("status").getByText("Undone: 1 request per minute").waitFor();
  await form.getByRole("button", { name: "Undo" }).click();
  await form.getByRole("status").getByText("Undone: unlimited, as in the file").waitFor();
  await until(() => isFocused(form.getByRole("radio", { name: "Unlimited" })), "the focus stays in the form");
});

pageTest("sign-in, wrong token and sign-out", { token: "a-long-admin-token" }, async ({ gateway, page }) => {
  await page.goto(gateway.admin);
  const token = page.getByLabel("Admin token");
  await token.fill("wrong");
  await page.getByRole("button", { name: "Sign in" }).click();
  await page.getByRole("alert").getByText("not the admin token").waitFor();
  await assertNoViolation(page, "sign-in");
  await screenshot(page, "sign-in");
  await token.fill(" a-long-admin-token ");
  await page.keyboard.press("Enter");
  await quotaRow(page, "production · total tokens per minute").waitFor();
  assert.ok(await isFocused(page.getByRole("main")));
  await page.reload();
  await quotaRow(page, "production · total tokens per minute").waitFor();
  await page.getByRole("link", { name: "Limits" }).click();
  const form = quotaForm(page, "sandbox", "total tokens per minute");
  await form.getByLabel("Limit", { exact: true }).fill("600");
  await form.getByRole("button", { name: "Save" }).click();
  await form.getByRole("status").getByText("Saved: 600").waitFor();
  await page.getByRole("button", { name: "Sign out" }).click();
  await page.getByRole("button", { name: "Sign in" }).waitFor();
  assert.equal(await page.getByRole("table").count(), 0);
  const answer = await page.request.get(`${gateway.admin}/api/environments`);
  assert.equal(answer.status(), 401);
});

pageTest("after many wrong tokens the form shows the wait", { token: "a-long-admin-token" }, async ({ gateway, page }) => {
  await page.goto(gateway.admin);
  for (let n = 0; n < 6; n += 1) {
    await page.getByLabel("Admin token").fill(`wrong ${n}`);
    await page.getByRole("button", { name: "Sign in" }).click();
    await page.getByRole("alert").waitFor();
    await until(() => page.getByRole("button", { name: "Sign in" }).isEnabled(), "the answer has arrived");
  }
  await page.getByRole("alert").getByText(/Try again in \d+ s\.$/).waitFor();
});

pageTest("a faulty config file is reported", {}, async ({ gateway, page }) => {
  await open(page, gateway, "system");
  gateway.writeConfig("  production: { upstream: nowhere }\n");
  await page.getByRole("alert").getByText(/nowhere/).waitFor();
  await page.getByRole("button", { name: "Reload config" }).click();
  await page.getByText(/Not reloaded at .*: the file has faults\./).waitFor();
  await page.getByRole("link", { name: "Overview" }).click();
  await page.getByText("The last change of the config file was refused").waitFor();
  gateway.writeConfig(TWO_ENVIRONMENTS.replace("limit: 500", "limit: 700"));
  await quotaRow(page, "sandbox · total tokens per minute").getByText("of 700").waitFor();
  await page.getByText("The last change of the config file was refused").waitFor({ state: "hidden" });
});

pageTest("a gateway that stops and starts again", {}, async ({ gateway, page }) => {
  await open(page, gateway);
  await gateway.kill();
  await page.getByText(/Not connected since/).waitFor();
  await quotaRow(page, "production · total tokens per minute").waitFor();
  await screenshot(page, "not-connected");
  await gateway.launch();
  await page.getByText("Live", { exact: true }).waitFor({ timeout: 20_000 });
});

pageTest("the stream is closed while the page is hidden", {}, async ({ gateway, page }) => {
  const streams = { begun: 0, ended: 0 };
  page.on("request", (request) => request.url().endsWith("/api/events") && (streams.begun += 1));
  page.on("requestfailed", (request) => request.url().endsWith("/api/events") && (streams.ended += 1));
  await open(page, gateway);
  for (const view of VIEWS) await page.getByRole("link", { name: view }).click();
  assert.deepEqual(streams, { begun: 1, ended: 0 });
  const setHidden = (isHidden) => page.evaluate((value) => {
    Object.defineProperty(document, "hidden", { value, configurable: true });
    document.dispatchEvent(new Event("visibilitychange"));
  }, isHidden);
  await setHidden(true);
  await until(() => streams.ended === 1, "the stream has ended");
  await setHidden(false);
  await until(() => streams.begun === 2, "a new stream has begun");
});

const LONG = "n".repeat(64);
const LONG_NAMES = `${TWO_ENVIRONMENTS}
  ${LONG}:
    upstream: backend
    keys: [{ name: ${LONG}, secret: sk-test-long-caller, quotas: { total_tokens: { limit: 150, per: day }, requests: { limit: 1125899906842624, per: minute } } }]
`;

pageTest("names are shown as text and fit", { environments: LONG_NAMES }, async ({ gateway, page }) => {
  const model = `<img src=x onerror=alert(1)>\u202e${"m".repeat(90)}`;
  for (let n = 0; n < 110; n += 1) await gateway.chat("sandbox", { model });
  for (let n = 0; n < 3; n += 1) await gateway.chat(LONG, { key: "sk-test-long-caller" });
  await open(page, gateway, "refusals");
  const table = page.getByRole("table", { name: "Refusals" });
  await table.getByText(model.replace("\u202e", "\\u202e")).first().waitFor();
  assert.equal(await page.locator("main img").count(), 0);
  for (const width of [375, 860, 1024, 1440]) {
    await page.setViewportSize({ width, height: 800 });
    for (const view of VIEWS) {
      await page.getByRole("link", { name: view, exact: true }).click();
      await page.getByRole("heading", { level: 1, name: view }).waitFor();
      if (view === "Limits") await page.getByRole("group", { name: LONG, exact: true }).getByText("Callers and models").click();
      if (view === "Usage") await page.getByRole("figure", { name: new RegExp(`Burn-down of ${LONG}`) }).waitFor();
      await assertFits(page, `${view} at ${width} px`);
      await screenshot(page, `long-names-${view.toLowerCase()}-${width}`);
    }
  }
  await page.getByRole("link", { name: "Refusals" }).click();
  await page.getByRole("button", { name: "Show more" }).click();
  assert.ok(await isFocused(table.getByRole("row").nth(101)));
});

pageTest("usage is shown as a chart and as figures", {}, async ({ gateway, page }) => {
  for (let n = 0; n < 3; n += 1) await gateway.chat("production", { key: "sk-test-web-caller" });
  await gateway.chat("production", { key: "sk-test-batch-caller" });
  await open(page, gateway, "usage");
  await page.getByRole("combobox", { name: "Measure" }).selectOption("rejected");
  await page.getByText("No request was refused in this time.").waitFor();
  await until(async () => {
    await page.getByRole("combobox", { name: "Measure" }).selectOption("total_tokens");
    return (await page.getByRole("figure", { name: /Total tokens by caller/ }).count()) === 1 && (await page.getByText("400 in all").count()) > 0;
  }, "the store has the usage");
  const top = page.getByRole("table", { name: "Top callers" });
  assert.match(await top.textContent(), /web30075 %batch10025 %/);
  await page.getByRole("figure", { name: /Burn-down of production · total tokens per day/ }).waitFor();
  const download = page.waitForEvent("download");
  await page.getByRole("link", { name: "Download CSV" }).click();
  const csv = readFileSync(await (await download).path(), "utf8");
  assert.match(csv, /^from,environment,model,caller,/);
  assert.match(csv, /web/);
});

pageTest("usage of an upstream is shown as that of an environment", { upstream: UPSTREAM_QUOTAS }, async ({ gateway, page }) => {
  await gateway.chat("sandbox");
  await gateway.chat("production", { key: "sk-test-web-caller", model: "gpt-4o" });
  await open(page, gateway, "usage");
  const [owner, group] = ["Environment or upstream", "Stack by"].map((name) => page.getByRole("combobox", { name }));
  await until(async () => (await owner.locator("option").allTextContents()).includes("upstream backend"), "the upstream is listed");
  await owner.selectOption("upstream backend");
  assert.deepEqual(await group.locator("option").allTextContents(), ["by model", "by upstream"]);
  await until(async () => {
    await page.getByRole("combobox", { name: "Measure" }).selectOption("total_tokens");
    return (await page.getByRole("figure", { name: /Total tokens by model/ }).count()) === 1 && (await page.getByText("200 in all").count()) > 0;
  }, "the store has the usage");
  assert.match(await page.getByRole("table", { name: "Top models" }).textContent(), /gpt-4o-mini10050 %/);
  await page.getByRole("figure", { name: /Burn-down of upstream backend · requests per day/ }).waitFor();
  assert.equal(await page.getByRole("figure", { name: /Burn-down of production/ }).count(), 0);
  await screenshot(page, "usage-upstream", { fullPage: true });
  await group.selectOption("upstream");
  await page.getByRole("table", { name: "Top upstreams" }).getByText("backend").waitFor();
  await owner.selectOption("production");
  await page.getByRole("figure", { name: /Total tokens by caller/ }).waitFor();
  await page.getByRole("figure", { name: /Burn-down of production/ }).waitFor();
});

pageTest("keyboard only", {}, async ({ gateway, page }) => {
  await gateway.chat("sandbox");
  await open(page, gateway);
  const focused = () => page.evaluate(() => document.activeElement?.textContent?.trim() || document.activeElement?.getAttribute("aria-label") || "");
  const tabTo = async (text) => {
    for (let n = 0; n < 60; n += 1) {
      await page.keyboard.press("Tab");
      if ((await focused()) === text) return;
    }
    assert.fail(`Tab does not reach "${text}"`);
  };
  await tabTo("Skip to the content");
  await page.keyboard.press("Enter");
  assert.ok(await isFocused(page.getByRole("main")));
  assert.match(page.url(), /#\/overview$/);
  await tabTo("sandbox · total tokens per minute");
  assert.ok(await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle !== "none"), "the focus is visible");
  await page.keyboard.press("Enter");
  const form = quotaForm(page, "sandbox", "total tokens per minute");
  await until(() => form.getByLabel("Limit", { exact: true }).evaluate((field) => field === document.activeElement), "the link leads to the form");
  await page.keyboard.press("Control+A");
  await page.keyboard.type("400k");
  await page.keyboard.press("Enter");
  await form.getByRole("status").getByText("Saved: 400,000 tokens per minute").waitFor();
  assert.equal((await gateway.quota("sandbox", "total_tokens", "minute")).limit, 400_000);
  assert.match(await form.getAttribute("class"), /target/, "the form that the link leads to is marked");
});

pageTest("no violation of accessibility rules, light and wide", {}, async ({ gateway, page }) => {
  await visitAll(gateway, page, "light-wide");
});

pageTest("no violation of accessibility rules, dark and 360 px wide", { width: 360, height: 740, colorScheme: "dark" }, async ({ gateway, page }) => {
  await visitAll(gateway, page, "dark-narrow");
});

/** Visits all views with data. No rule of axe is violated, and nothing is wider than the page. */
async function visitAll(gateway, page, suffix) {
  await open(page, gateway);
  await assertNoViolation(page, "unused");
  for (let n = 0; n < 8; n += 1) await gateway.chat("sandbox");
  await gateway.chat("production", { key: "sk-test-web-caller" });
  await page.getByRole("region", { name: "Runs out first" }).getByText(/sandbox/).waitFor();
  for (const view of VIEWS) {
    await page.getByRole("link", { name: view, exact: true }).click();
    await page.getByRole("heading", { level: 1, name: view }).waitFor();
    await sleep(700);
    assert.equal(await page.getByRole("link", { name: view, exact: true }).getAttribute("aria-current"), "page");
    await assertNoViolation(page, `${view}, ${suffix}`);
    await assertFits(page, `${view}, ${suffix}`);
    await screenshot(page, `${view.toLowerCase()}-${suffix}`, { fullPage: true });
  }
}

pageTest("memory stays flat", {}, async ({ gateway, page }) => {
  await open(page, gateway);
  const measure = () => page.evaluate(() => {
    globalThis.gc();
    return { heap: performance.memory.usedJSHeapSize, nodes: document.querySelectorAll("*").length };
  });
  const traffic = async (rounds) => {
    for (let n = 0; n < rounds; n += 1) {
      await Promise.all(["sandbox", "sandbox", "production"].map((name) => gateway.chat(name, { key: name === "production" ? "sk-test-web-caller" : "any" })));
      if (n % 20 === 0) await page.getByRole("link", { name: VIEWS[(n / 20) % 5] }).click();
      await sleep(40);
    }
    await page.getByRole("link", { name: "Overview" }).click();
  };
  // Enough requests to fill all bounded lists: the page keeps 1,000 refusals.
  await traffic(520);
  const first = await measure();
  await traffic(250);
  const last = await measure();
  console.log(`heap ${(first.heap / 1e6).toFixed(1)} MB, then ${(last.heap / 1e6).toFixed(1)} MB; ${first.nodes}, then ${last.nodes} elements`);
  assert.ok(last.heap < first.heap * 1.15 + 500_000, `${first.heap} to ${last.heap} bytes`);
  assert.ok(last.nodes < first.nodes + 100, `${first.nodes} to ${last.nodes} elements`);
});
