//! The name of a model without its maker, its host and its variants of spelling.
//!
//! Hosts write the same model in many ways: `us.anthropic.claude-3-5-sonnet-20241022-v2:0`,
//! `accounts/fireworks/models/llama-v3p1-70b-instruct`, `@cf/meta/llama-3.1-8b-instruct-fp8`, `databricks-gpt-oss-20b`.
//! The families' tables know a model by the beginning of its plain name. So the reader looks for the first place
//! in a name where a family's name begins: at its start, after a maker's name and a dot, or after another separator.

/// Words after which a family's name may begin.
const SEPARATORS: [char; 9] = ['/', '.', '-', '_', ':', '@', ' ', '~', '|'];
/// A longer name is that of no known model.
pub(super) const MAX_NAME_BYTES: usize = 256;

/// The name to look up in the tables, in lower case. `is_family`: whether a name begins with a family's name.
pub(super) fn plain_name(model: &str, is_family: impl Fn(&str) -> bool) -> String {
    if model.len() > MAX_NAME_BYTES {
        return String::new();
    }
    let name = model.to_ascii_lowercase();
    let name = respelled(&name);
    // The last segment of a path is the model. The others are hosts and makers, which can be named like a family.
    let mut segments = name.rsplit('/').map(base_of_fine_tuned);
    let found = segments.find_map(|segment| family_in(segment, &is_family));
    let last = name.rsplit('/').next().unwrap_or_default();
    in_order(found.unwrap_or(last))
}

/// `gpt-4o` of `ft:gpt-4o:organisation::id`.
fn base_of_fine_tuned(segment: &str) -> &str {
    segment.strip_prefix("ft:").map_or(segment, |base| base.split(':').next().unwrap_or(base))
}

/// The part of a segment from the family's name on.
fn family_in<'n>(segment: &'n str, is_family: &impl Fn(&str) -> bool) -> Option<&'n str> {
    // A maker and a dot: `qwen.qwen3-32b`. The dot of a version is followed by a digit.
    let after_dot = segment.rmatch_indices('.').map(|(at, _)| &segment[at + 1..]);
    let mut after_dot = after_dot.filter(|rest| rest.starts_with(|c: char| c.is_ascii_alphabetic()));
    let after_maker = after_dot.find(|rest| is_family(rest));
    if after_maker.is_some() || is_family(segment) {
        return after_maker.or(Some(segment));
    }
    let separated = segment.match_indices(SEPARATORS).map(|(at, _)| &segment[at + 1..]);
    separated.into_iter().find(|rest| is_family(rest) && is_distinctive(rest))
}

/// Whether a family's name is unlikely to occur inside another name by chance.
fn is_distinctive(name: &str) -> bool {
    const COMMON: [&str; 7] = ["ada", "babbage", "code-", "codex-", "command", "curie", "davinci"];
    let is_o_series = name.starts_with('o') && name[1..].starts_with(|c: char| c.is_ascii_digit());
    let is_whole_word = name.len() == 2 || name[2..].starts_with(SEPARATORS);
    let is_text = name.starts_with("text-") && !name.starts_with("text-embedding");
    !COMMON.iter().any(|common| name.starts_with(common)) && (!is_o_series || is_whole_word) && !is_text
}

/// Unifies the spelling of versions in a lower-case name: `llama-3.1` for `llama3.1`, `llama3-1` and `llama-v3p1`;
/// `gpt-4o` for `gpt4o`; `claude-sonnet-4-5` for `claude-sonnet-4.5`.
fn respelled(name: &str) -> String {
    let name = name.replace('_', "-").replace("deepseek.", "deepseek-");
    let mut out = String::with_capacity(name.len() + 4);
    let mut rest = name.as_str();
    while let Some(c) = rest.chars().next() {
        let is_start = out.is_empty() || out.ends_with(SEPARATORS);
        let family = VERSIONED.iter().find(|(family, _)| is_start && rest.starts_with(family));
        let Some((family, joint)) = family else {
            out.push(c);
            rest = &rest[c.len_utf8()..];
            continue;
        };
        out.push_str(family);
        rest = &rest[family.len()..];
        let spelled = rest.strip_prefix('-').filter(|_| !joint.is_empty()).unwrap_or(rest);
        let spelled = spelled.strip_prefix('v').unwrap_or(spelled);
        if let Some((major, minor, after)) = version(spelled) {
            out.push_str(joint);
            out.push_str(major);
            if let Some(minor) = minor {
                out.push('.');
                out.push_str(minor);
            }
            rest = after;
        }
    }
    if out.contains("claude") { with_claude_versions(&out) } else { out }
}

/// Anthropic writes versions with a dash.
fn with_claude_versions(name: &str) -> String {
    name.find("claude")
        .map_or_else(|| name.to_owned(), |at| format!("{}{}", &name[..at], name[at..].replace('.', "-")))
}

/// Families whose name is followed by a version, and what stands between. Others write the version in one way only.
const VERSIONED: [(&str, &str); 10] = [
    ("claude", "-"),
    ("gemini", "-"),
    ("gemma", "-"),
    ("glm", "-"),
    ("gpt", "-"),
    ("grok", "-"),
    ("llama", "-"),
    ("deepseek-v", ""),
    ("kimi-k", ""),
    ("minimax-m", ""),
];

fn is_digit(c: char) -> bool {
    c.is_ascii_digit()
}

/// The major version, the minor version and the rest of a text that begins with a version: `3.1`, `3p1`, `3-1`. The
/// minor version has one digit; a longer number is a date, a size or a context length.
fn version(text: &str) -> Option<(&str, Option<&str>, &str)> {
    let major_length = text.bytes().take_while(u8::is_ascii_digit).count();
    if major_length == 0 || major_length > 2 {
        return None;
    }
    let (major, after) = text.split_at(major_length);
    let minor = after.strip_prefix(['.', 'p', '-']).filter(|minor| {
        let mut chars = minor.chars();
        chars.next().is_some_and(is_digit) && chars.next().is_none_or(|c| SEPARATORS.contains(&c))
    });
    match minor {
        Some(minor) => Some((major, minor.get(..1), &minor[1..])),
        None => Some((major, None, after)),
    }
}

/// Puts version and size in the order of the tables: `claude-sonnet-4-5` for `claude-4-5-sonnet`, `gemini-1.5-pro`
/// for `gemini-pro-1.5`.
fn in_order(name: &str) -> String {
    if let Some(rest) = name.strip_prefix("claude-") {
        // The versions up to 3 stand before the size.
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-').len();
        let (version, size) = rest.split_at(digits);
        let is_later = version.starts_with(['4', '5', '6', '7', '8', '9']);
        if let (true, Some(size)) = (is_later, size.split(SEPARATORS).next().filter(|size| !size.is_empty()))
        {
            return format!("claude-{size}-{}", version.trim_end_matches('-'));
        }
    }
    if let Some(rest) = name.strip_prefix("gemini-") {
        let (size, version) = rest.split_once('-').unwrap_or((rest, ""));
        if matches!(size, "pro" | "flash" | "ultra") && version.starts_with(is_digit) {
            return format!("gemini-{version}-{size}");
        }
        // The first version had no number.
        if rest == "pro" || rest.starts_with("pro-vision") {
            return format!("gemini-1.0-{rest}");
        }
    }
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::super::models::is_family;
    use super::*;

    fn plain(model: &str) -> String {
        plain_name(model, is_family)
    }

    /// The beginning of the plain name, and spellings of it.
    const SPELLINGS: &[(&str, &[&str])] = &[
        (
            "gpt-4o",
            &[
                "gpt-4o",
                "GPT-4o",
                "gpt4o",
                "gpt_4o_mini",
                "openai/gpt-4o-2024-08-06",
                "azure/eu/gpt-4o",
                "azure_ai/gpt-4o",
                "openai-gpt-4o",
                "openai.gpt-4o",
                "global.openai.gpt-4o-mini",
                "ft:gpt-4o-2024-08-06:organisation::id",
                "openrouter/openai/gpt-4o:online",
                "prod-gpt-4o-west",
                "acme:gpt-4o",
                "models/gpt-4o",
            ],
        ),
        (
            "gpt-4.1",
            &[
                "gpt-4-1",
                "gpt-4-1-mini",
                "openai-gpt-4.1",
                "openai/gpt-4.1-nano-2025-04-14",
                "ft:gpt-4.1-mini:o::i",
            ],
        ),
        ("gpt-4-", &["gpt-4-1106-preview", "gpt4-32k", "gpt-4-0613", "openai.gpt-4-turbo"]),
        ("gpt-5", &["gpt-5-2025-08-07", "gpt5-mini", "vercel/openai/gpt-5", "databricks-gpt-5"]),
        ("gpt-35", &["gpt-35-turbo-16k", "gpt35-turbo", "my_gpt-35-turbo"]),
        (
            "gpt-oss-20b",
            &[
                "openai.gpt-oss-20b-1:0",
                "openai/gpt-oss-20b",
                "gpt-oss-20b:free",
                "@cf/openai/gpt-oss-20b",
                "databricks-gpt-oss-20b",
                "accounts/fireworks/models/gpt-oss-20b",
                "hf:openai/gpt-oss-20b",
                "lmstudio-community/gpt-oss-20b-GGUF",
            ],
        ),
        ("o3-mini", &["o3-mini", "openai.o3-mini", "azure-o3-mini-2025-01-31", "openai/o3-mini-high"]),
        (
            "text-embedding-3",
            &["text-embedding-3-small", "azure-text-embedding-3-large", "openai.text-embedding-3-small"],
        ),
        (
            "claude-3-5-sonnet",
            &[
                "anthropic/claude-3.5-sonnet",
                "us.anthropic.claude-3-5-sonnet-20241022-v2:0",
                "claude-3-5-sonnet@20240620",
                "bedrock/eu.anthropic.claude-3-5-sonnet-20240620-v1:0",
                "vertex_ai/claude-3-5-sonnet-v2@20241022",
                "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.anthropic.claude-3-5-sonnet-20241022-v2:0",
                "databricks-claude-3-5-sonnet",
                "claude3.5-sonnet",
                "anthropic--claude-3.5-sonnet",
            ],
        ),
        (
            "claude-sonnet-4-5",
            &[
                "claude-sonnet-4.5",
                "claude-4.5-sonnet",
                "claude-4-5-sonnet-thinking",
                "global.anthropic.claude-sonnet-4-5-20250929-v1:0",
                "anthropic/claude-sonnet-4.5:beta",
                "databricks-claude-sonnet-4-5",
                "anthropic.claude-sonnet-4-5@20250929",
            ],
        ),
        (
            "claude-opus-4",
            &["claude-4-opus", "claude-opus-4@20250514", "apac.anthropic.claude-opus-4-20250514-v1:0"],
        ),
        ("claude-2", &["claude-2.1", "anthropic.claude-v2:1", "anthropic.claude-v2"]),
        ("claude-instant", &["anthropic.claude-instant-v1", "claude-instant-1.2"]),
        (
            "gemini-2.5-flash",
            &[
                "gemini-2.5-flash",
                "models/gemini-2.5-flash-lite",
                "google/gemini-2.5-flash-preview-05-20:thinking",
                "google.gemini-2-5-flash",
                "vertex_ai/gemini-2.5-flash",
                "publishers/google/models/gemini-2.5-flash@default",
                "gemini/gemini-2.5-flash",
            ],
        ),
        ("gemini-1.5", &["google/gemini-pro-1.5", "google/gemini-flash-1.5-8b", "gemini-1.5-pro-002"]),
        ("gemini-1.0", &["gemini-pro", "google/gemini-pro-vision"]),
        (
            "llama-3.1",
            &[
                "meta-llama/Meta-Llama-3.1-70B-Instruct-Turbo",
                "llama-3.1-8b-instant",
                "llama3.1:8b",
                "llama3.1-70b",
                "meta.llama3-1-405b-instruct-v1:0",
                "accounts/fireworks/models/llama-v3p1-70b-instruct",
                "@cf/meta/llama-3.1-8b-instruct-fp8",
                "us.meta.llama3-1-8b-instruct-v1:0",
                "hf:meta-llama/Llama-3.1-8B-Instruct",
                "NousResearch/Hermes-3-Llama-3.1-405B",
                "nvidia/llama-3.1-nemotron-70b-instruct:free",
                "unsloth_Llama-3.1-8B-Q4_K_M.gguf",
            ],
        ),
        (
            "llama-3.3",
            &[
                "llama3.3-70b",
                "databricks-meta-llama-3-3-70b-instruct",
                "@cf/meta/llama-3.3-70b-instruct-fp8-fast",
                "llama-3.3-70b-versatile",
            ],
        ),
        (
            "llama-3-",
            &[
                "meta-llama/Llama-3-8b",
                "llama3-70b-8192",
                "meta.llama3-8b-instruct-v1:0",
                "meta-llama-3-8b-instruct",
            ],
        ),
        (
            "llama-4",
            &[
                "meta-llama/llama-4-scout-17b-16e-instruct",
                "us.meta.llama4-maverick-17b-instruct-v1:0",
                "Llama-4-Scout-17B-16E-Instruct-FP8",
            ],
        ),
        ("llama-2", &["llama2", "meta.llama2-13b-chat-v1", "meta-llama/Llama-2-7b-chat-hf"]),
        (
            "mistral-large",
            &[
                "mistral.mistral-large-2402-v1:0",
                "mistralai/Mistral-Large-Instruct-2411",
                "mistral-large-latest",
            ],
        ),
        (
            "voxtral",
            &["mistral.voxtral-mini-3b-2507", "voxtral-small-latest", "mistralai/voxtral-mini-latest"],
        ),
        ("magistral", &["mistral.magistral-small-2509", "mistralai/Magistral-Small-2506"]),
        ("glm-4.7", &["zai-glm-4.7", "zai.glm-4.7-flash", "z-ai/glm-4.7", "zai-org-glm-4.7", "glm-4-7"]),
        ("glm-5", &["zai-org/GLM-5-FP8", "z-ai/glm-5-turbo", "accounts/fireworks/models/glm-5"]),
        (
            "deepseek-r1",
            &[
                "deepseek.r1-v1:0",
                "deepseek-r1:latest",
                "deepseek/deepseek-r1-0528:free",
                "deepseek-ai/DeepSeek-R1-Distill-Llama-70B",
            ],
        ),
        (
            "deepseek-v3.1",
            &[
                "deepseek-ai/DeepSeek-V3.1",
                "accounts/fireworks/models/deepseek-v3p1",
                "deepseek.v3-1",
                "deepseek-v3-1-terminus",
            ],
        ),
        ("grok-4.1-fast", &["grok-4-1-fast-non-reasoning", "x-ai/grok-4.1-fast", "xai.grok-4-1-fast"]),
        ("grok-3-mini", &["grok-3-mini-beta", "xai/grok-3-mini", "azure_ai/grok-3-mini"]),
        ("qwen3.5", &["Qwen/Qwen3.5-9B", "qwen.qwen3.5-397b-a17b", "qwen3.5:latest"]),
        ("qwen3-", &["qwen.qwen3-32b-v1:0", "alibaba/qwen3-max", "cerebras-qwen3-coder", "qwen3-8b-awq"]),
        (
            "kimi-k2",
            &[
                "moonshotai/Kimi-K2-Instruct-0905:groq",
                "moonshot.kimi-k2-thinking",
                "accounts/fireworks/models/kimi-k2p5",
            ],
        ),
        ("minimax-m2", &["minimax.minimax-m2", "minimaxai/minimax-m2", "MiniMax-M2"]),
        ("command-r", &["cohere.command-r-plus-v1:0", "command-r7b-12-2024", "cohere/command-r"]),
        (
            "gemma-3",
            &[
                "google.gemma-3-27b-it",
                "gemma3:12b",
                "@cf/google/gemma-3-12b-it",
                "google/gemma-3n-e4b-it:free",
            ],
        ),
    ];

    #[test]
    #[allow(clippy::too_many_lines)] // a table
    fn makers_and_hosts_are_stripped() {
        for (family, spellings) in SPELLINGS {
            for spelling in *spellings {
                let name = plain(spelling);
                assert!(name.starts_with(family), "{spelling}: {name}");
            }
        }
    }

    #[test]
    fn names_of_no_family_stay_as_they_are() {
        for name in [
            "who-knows",
            "openrouter/auto",
            "voyage-code-3",
            "shell-command",
            "foo-ada",
            "jamba-1.5-mini",
            "solo1",
            "é",
            "",
            "/",
            "ft:",
        ] {
            let plain = plain(name);
            assert!(!is_family(&plain), "{name}: {plain}");
        }
        assert_eq!(plain(&"x".repeat(300)), "");
    }

    proptest::proptest! {
        #[test]
        fn any_name_has_a_plain_name(name in "\\PC{0,40}|([a-z]{0,6}[-./:_@0-9p]{0,3}(claude|gemini|llama|gpt|qwen)?){0,6}") {
            let once = plain(&name);
            proptest::prop_assert!(once.len() <= 2 * name.len() + 16);
        }
    }
}
