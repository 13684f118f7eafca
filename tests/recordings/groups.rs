//! The accuracy of estimates by group of requests, beside the goals.

use crate::figures::{EXPERIENCED, is_openai};
use crate::measured::{Corrected, Measured, quantile};
use tollgate::api::Api;

/// Shorter prompts are judged by tokens: per cent of a few tokens say nothing.
const SHORT_PROMPT: u64 = 20;
/// An estimate of a short prompt that is off by at most this many tokens counts as exact.
const MAX_SHORT_ERROR: u64 = 3;
/// With fewer requests, a group's figures are not significant.
const MIN_REQUESTS: usize = 4;

/// Providers that pass requests on to others, with a prompt of their own in some cases.
const ROUTERS: &[&str] = &["openrouter", "vercel", "huggingface", "copilot", "cloudflare"];
/// Providers that add a hidden prompt to many requests.
const HIDDEN_PROMPTS: &[&str] = &["venice", "perplexity"];

/// Median and 90th percentile of errors, in per cent.
#[derive(Clone, Copy)]
struct Goal {
    median: f64,
    p90: f64,
    /// Whether the test fails if the goal is missed.
    is_asserted: bool,
}

const fn must(median: f64, p90: f64) -> Goal {
    Goal { median, p90, is_asserted: true }
}

const fn should(median: f64, p90: f64) -> Goal {
    Goal { median, p90, is_asserted: false }
}

/// Requests of one row.
struct Group {
    name: &'static str,
    has: fn(&Measured) -> bool,
    /// Before any answer.
    before: Option<Goal>,
    /// After `EXPERIENCED` answers of the kind.
    after: Option<Goal>,
}

const FILES: &[&str] = &["file"];
const SOUND: &[&str] = &["audio"];
const IMAGES: &[&str] = &["image_data", "image_url"];
const TOOLS: &[&str] = &["tools", "functions"];
const SCHEMA: &[&str] = &["json_schema"];

fn has_media(e: &Measured) -> bool {
    e.has(FILES) || e.has(SOUND) || e.has(IMAGES)
}

fn has_tools(e: &Measured) -> bool {
    e.has(TOOLS) && !has_media(e)
}

fn has_schema(e: &Measured) -> bool {
    e.has(SCHEMA) && !e.has(TOOLS) && !has_media(e)
}

fn is_text(e: &Measured) -> bool {
    !e.has(TOOLS) && !e.has(SCHEMA) && !has_media(e)
}

fn is_router(e: &Measured) -> bool {
    ROUTERS.contains(&e.provider.as_str())
}

/// Chats with providers other than OpenAI, which run the model themselves.
fn is_other_direct(e: &Measured) -> bool {
    e.api == Api::Chat && !is_openai(e) && !is_router(e)
}

/// The row whose "after" means: after the answer to the previous request of the conversation.
const CONVERSATIONS: &str = "a conversation whose last request passed here";

const GROUPS: &[Group] = &[
    Group {
        name: "OpenAI chat files",
        has: |e| e.api == Api::Chat && is_openai(e) && e.has(FILES),
        before: Some(must(2.0, 10.0)),
        after: Some(should(1.0, 8.0)),
    },
    Group {
        name: "Responses files",
        has: |e| e.api == Api::Responses && e.has(FILES),
        before: Some(must(2.0, 10.0)),
        after: Some(should(1.0, 8.0)),
    },
    Group {
        name: "Responses tools",
        has: |e| e.api == Api::Responses && !is_router(e) && has_tools(e),
        before: Some(must(2.0, 12.0)),
        after: Some(must(0.0, 2.0)),
    },
    Group {
        name: "Responses multi-turn",
        has: |e| e.api == Api::Responses && !is_router(e) && e.has(&["multi_turn"]) && !has_media(e),
        before: Some(must(0.0, 10.0)),
        after: Some(must(0.0, 2.0)),
    },
    Group {
        name: "Anthropic text",
        has: |e| e.api == Api::Messages && is_text(e),
        before: Some(must(1.5, 10.0)),
        after: Some(must(0.5, 6.0)),
    },
    Group {
        name: "Anthropic tools",
        has: |e| e.api == Api::Messages && has_tools(e),
        before: Some(must(1.0, 6.0)),
        after: Some(must(0.5, 6.0)),
    },
    Group {
        name: "Gemini text",
        has: |e| e.api == Api::Gemini && is_text(e),
        before: Some(must(4.0, 14.0)),
        after: Some(must(2.0, 10.0)),
    },
    Group {
        name: "Gemini schema",
        has: |e| e.api == Api::Gemini && has_schema(e),
        before: Some(must(5.0, 15.0)),
        after: Some(must(2.0, 10.0)),
    },
    Group {
        name: "Gemini tools",
        has: |e| e.api == Api::Gemini && has_tools(e),
        before: Some(must(3.0, 15.0)),
        after: Some(must(2.0, 10.0)),
    },
    Group {
        name: "Gemini files",
        has: |e| e.api == Api::Gemini && e.has(FILES) && !e.has(SOUND),
        before: Some(must(1.0, 10.0)),
        after: None,
    },
    Group {
        name: "Gemini audio",
        has: |e| e.api == Api::Gemini && e.has(SOUND),
        before: Some(must(5.0, 13.0)),
        after: None,
    },
    Group {
        name: "Gemini images",
        has: |e| e.api == Api::Gemini && e.has(IMAGES) && !e.has(FILES) && !e.has(SOUND),
        before: Some(must(0.4, 1.0)),
        after: None,
    },
    Group {
        name: "other chat, direct: text",
        has: |e| is_other_direct(e) && is_text(e),
        before: Some(must(4.0, 25.0)),
        after: Some(must(1.0, 10.0)),
    },
    Group {
        name: "other chat, direct: tools",
        has: |e| is_other_direct(e) && has_tools(e),
        before: Some(must(4.0, 20.0)),
        after: Some(must(1.0, 10.0)),
    },
    Group {
        name: "through a router",
        has: |e| matches!(e.api, Api::Chat | Api::Responses) && is_router(e),
        before: Some(must(5.0, 60.0)),
        after: Some(must(1.0, 10.0)),
    },
    Group { name: CONVERSATIONS, has: |e| e.has(&["multi_turn"]), before: None, after: Some(must(0.0, 2.0)) },
    Group {
        name: "OpenAI chat text and tools",
        has: |e| e.api == Api::Chat && is_openai(e) && !has_media(e),
        before: Some(must(1.0, 6.0)),
        after: Some(must(0.0, 2.0)),
    },
];

/// Prints the table. Returns whether all asserted goals are met.
pub(crate) fn meet_goals(exchanges: &[Measured], orders: &[Vec<Corrected>]) -> bool {
    println!("\nErrors in per cent, median/p90. After: after {EXPERIENCED} answers of the kind.\n");
    println!("| group | requests | before | goal | after | requests | goal |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    let mut misses = Vec::new();
    for group in GROUPS {
        let of: Vec<usize> = (0..exchanges.len()).filter(|&at| is_in(group, &exchanges[at])).collect();
        let mut before: Vec<f64> =
            of.iter().map(|&at| error(&exchanges[at], exchanges[at].estimated)).collect();
        let mut after = Vec::new();
        for order in orders {
            let counts = |&&at: &&usize| match group.name {
                CONVERSATIONS => order[at].is_continuation,
                _ => order[at].answers >= EXPERIENCED,
            };
            after.extend(of.iter().filter(counts).map(|&at| error(&exchanges[at], order[at].tokens)));
        }
        let number = after.len() / orders.len().max(1);
        println!(
            "| {} | {} | {} | {} | {} | {number} | {} |",
            group.name,
            of.len(),
            figures(&mut before),
            goal(group.before),
            figures(&mut after),
            goal(group.after)
        );
        for (when, goal, errors, n) in
            [("before", group.before, &mut before, of.len()), ("after", group.after, &mut after, number)]
        {
            if goal.is_some_and(|goal| goal.is_asserted && (n < MIN_REQUESTS || !is_met(goal, errors))) {
                misses.push(format!("{} {when}", group.name));
            }
        }
    }
    println!();
    if !misses.is_empty() {
        println!("MISSED  goals of groups: {}", misses.join(", "));
    }
    misses.is_empty()
}

/// Prints every request with its estimate and the groups that it belongs to, separated by tabs. The last column has
/// the estimates in each order, with the number of answers before: `~` for a continued conversation.
pub(crate) fn list(exchanges: &[Measured], orders: &[Vec<Corrected>]) {
    for (at, e) in exchanges.iter().enumerate() {
        let corrected: Vec<String> = orders
            .iter()
            .map(|order| {
                let mark = if order[at].is_continuation { "~" } else { ":" };
                format!("{}{mark}{}", order[at].tokens, order[at].answers)
            })
            .collect();
        let groups: Vec<&str> =
            GROUPS.iter().filter(|group| is_in(group, e)).map(|group| group.name).collect();
        println!(
            "{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}\t{}",
            e.id,
            e.api.as_str(),
            e.provider,
            e.model,
            e.estimated,
            e.reported,
            groups.join(", "),
            e.features.join(" "),
            corrected.join(" ")
        );
    }
}

fn is_in(group: &Group, e: &Measured) -> bool {
    !e.is_partial && !e.has_urls && !HIDDEN_PROMPTS.contains(&e.provider.as_str()) && (group.has)(e)
}

/// The relative error of an estimate in per cent. Small errors of short prompts count as none.
fn error(e: &Measured, estimate: u64) -> f64 {
    if e.reported < SHORT_PROMPT && estimate.abs_diff(e.reported) <= MAX_SHORT_ERROR {
        return 0.0;
    }
    100.0 * e.error(estimate)
}

/// Compares the figures as the table shows them.
fn is_met(goal: Goal, errors: &mut [f64]) -> bool {
    let rounded = |share, errors: &mut [f64]| (10.0 * quantile(errors, share)).round() / 10.0;
    rounded(0.5, errors) <= goal.median && rounded(0.9, errors) <= goal.p90
}

fn figures(errors: &mut [f64]) -> String {
    if errors.is_empty() {
        return "-".to_owned();
    }
    format!("{:.1}/{:.1}", quantile(errors, 0.5), quantile(errors, 0.9))
}

fn goal(goal: Option<Goal>) -> String {
    goal.map_or_else(
        || "-".to_owned(),
        |goal| {
            let mark = if goal.is_asserted { "" } else { " (not asserted)" };
            format!("{}/{}{mark}", goal.median, goal.p90)
        },
    )
}
