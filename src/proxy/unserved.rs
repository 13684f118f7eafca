//! Paths that the providers' APIs have and the gateway does not serve. Through them, tokens could be used without being
//! counted.

/// The path of each API family, without its version. The paths below it belong to it.
const FAMILIES: &[&str] = &[
    // OpenAI and Azure.
    "/assistants",
    "/batches",
    "/chatkit",
    "/containers",
    "/conversations",
    "/edits",
    "/engines",
    "/evals",
    "/files",
    "/fine-tunes",
    "/fine_tuning",
    "/organization",
    "/projects",
    "/realtime",
    "/skills",
    "/threads",
    "/uploads",
    "/vector_stores",
    "/videos",
    // Anthropic.
    "/complete",
    "/messages/batches",
    "/organizations",
    // Google.
    "/cachedContents",
    "/corpora",
    "/fileSearchStores",
    "/interactions",
    "/operations",
    "/tunedModels",
];
/// Only the paths below these are not served.
const PARENTS: &[&str] = &["/chat/completions/", "/responses/"];
/// Google's operations on a model.
const OPERATIONS: &[&str] = &[
    "asyncBatchEmbedContent",
    "batchEmbedContents",
    "batchGenerateContent",
    "bidiGenerateContent",
    "countMessageTokens",
    "countTextTokens",
    "embedContent",
    "embedText",
    "generateAnswer",
    "generateMessage",
    "generateText",
    "predict",
    "predictLongRunning",
    "rawPredict",
    "streamRawPredict",
];
/// The longest prefix of a path comes first.
const VERSIONS: &[&str] = &["/upload/v1beta", "/openai/v1", "/openai", "/v1beta", "/v1alpha", "/v1"];

/// Whether a provider has this path, which has no environment and only unambiguous segments.
pub(super) fn is_known(path: &str) -> bool {
    let rest =
        VERSIONS.iter().find_map(|version| path.strip_prefix(version).filter(|rest| rest.starts_with('/')));
    let rest = rest.unwrap_or(path);
    let is_in = |family: &&str| {
        rest.strip_prefix(*family).is_some_and(|below| below.is_empty() || below.starts_with(['/', ':']))
    };
    FAMILIES.iter().any(is_in) || PARENTS.iter().any(|parent| rest.starts_with(parent)) || is_operation(path)
}

/// Whether a path ends in one of Google's operations on a model.
pub(super) fn is_operation(path: &str) -> bool {
    let Some((model, operation)) = path.rsplit_once(':') else { return false };
    model.contains("/models/") && OPERATIONS.contains(&operation)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_paths_of_the_providers_are_known() {
        for path in [
            "/v1/files",
            "/files",
            "/v1/files/file-1/content",
            "/v1/batches",
            "/v1/fine_tuning/jobs",
            "/v1/responses/resp_1/cancel",
            "/v1/chat/completions/c/messages",
            "/v1/threads/t/messages",
            "/openai/files",
            "/openai/v1/vector_stores",
            "/v1/messages/batches/b/results",
            "/messages/batches",
            "/v1beta/files",
            "/upload/v1beta/files",
            "/v1beta/cachedContents/c",
            "/v1beta/tunedModels/t:generateContent",
            "/v1beta/models/gemini:batchGenerateContent",
            "/v1/models/gemini:embedContent",
        ] {
            assert!(is_known(path), "{path}");
        }
        for path in [
            "",
            "/",
            "/v1",
            "/v1/",
            "/v1/filesx",
            "/v1/Files",
            "/v1/%66iles",
            "/v2/files",
            "/v1/v1/files",
            "/v1/chat",
            "/v1/nothing",
            "/v1beta/models/gemini:BatchGenerateContent",
        ] {
            assert!(!is_known(path), "{path}");
        }
    }
}
