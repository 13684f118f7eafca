//! `tollgate count`

use crate::api::Api;
use crate::body::Body;
use crate::estimate::{Model, Part, PromptEstimate, Tokenizer};
use anyhow::Context as _;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct Arguments {
    /// The request body; without it standard input
    file: Option<PathBuf>,
    /// The API it is for; without it told by its shape
    #[arg(long, value_enum)]
    api: Option<ApiName>,
    /// One body a line in, one JSON object a line out
    #[arg(long)]
    jsonl: bool,
    /// Say how the figure comes about
    #[arg(long)]
    explain: bool,
    /// The model, for bodies without one
    #[arg(long, default_value = "")]
    model: String,
}

#[derive(Clone, Copy, clap::ValueEnum)]
enum ApiName {
    Chat,
    Completions,
    Responses,
    Embeddings,
    Messages,
    Gemini,
}

impl From<ApiName> for Api {
    fn from(name: ApiName) -> Self {
        match name {
            ApiName::Chat => Self::Chat,
            ApiName::Completions => Self::Completions,
            ApiName::Responses => Self::Responses,
            ApiName::Embeddings => Self::Embeddings,
            ApiName::Messages => Self::Messages,
            ApiName::Gemini => Self::Gemini,
        }
    }
}

/// What is said of one body.
struct Counted {
    api: Api,
    model: String,
    tokenizer: Tokenizer,
    estimate: PromptEstimate,
}

pub(super) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let mut input: Box<dyn BufRead> = match &arguments.file {
        Some(path) => {
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            Box::new(BufReader::new(file))
        }
        None => Box::new(io::stdin().lock()),
    };
    if arguments.jsonl {
        return each_line(arguments, input.as_mut());
    }
    let mut body = Vec::new();
    input.read_to_end(&mut body).context("cannot read the request body")?;
    match count(arguments, &body) {
        Ok(counted) => {
            print!("{}", counted.in_words(arguments.explain));
            Ok(ExitCode::SUCCESS)
        }
        Err(refused) => {
            eprintln!("tollgate: {refused}");
            Ok(ExitCode::from(super::FAILED))
        }
    }
}

fn each_line(arguments: &Arguments, input: &mut dyn BufRead) -> anyhow::Result<ExitCode> {
    let mut output = io::stdout().lock();
    let mut line = Vec::new();
    loop {
        line.clear();
        if input.read_until(b'\n', &mut line).context("cannot read the request bodies")? == 0 {
            return Ok(ExitCode::SUCCESS);
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        let said = count(arguments, &line).map_or_else(|error| json!({ "error": error }), |c| c.as_json());
        writeln!(output, "{said}")?;
    }
}

fn count(arguments: &Arguments, json: &[u8]) -> Result<Counted, String> {
    let api = arguments.api.map_or_else(|| api_of(json), Api::from);
    let body = Body::read(api, json).map_err(|fault| fault.to_string())?;
    let model = body.model.as_deref().unwrap_or(&arguments.model).to_owned();
    let known = Model::named(&[], &model);
    Ok(Counted { api, estimate: body.prompt.estimate(&known), model, tokenizer: known.tokenizer })
}

/// The API that a body is for, by the fields that only one of them has.
fn api_of(json: &[u8]) -> Api {
    #[derive(Default, serde::Deserialize)]
    #[serde(default)]
    struct Shape {
        model: Value,
        messages: Option<IgnoredAny>,
        prompt: Option<IgnoredAny>,
        input: Option<IgnoredAny>,
        contents: Option<IgnoredAny>,
        system: Option<IgnoredAny>,
        instructions: Option<IgnoredAny>,
        max_output_tokens: Option<IgnoredAny>,
        dimensions: Option<IgnoredAny>,
        encoding_format: Option<IgnoredAny>,
    }
    let shape: Shape = serde_json::from_slice(json).unwrap_or_default();
    let model = shape.model.as_str().unwrap_or_default();
    let embeds = shape.dimensions.is_some() || shape.encoding_format.is_some() || model.contains("embed");
    let is_response = shape.instructions.is_some() || shape.max_output_tokens.is_some() || !model.is_empty();
    match shape {
        Shape { contents: Some(_), .. } => Api::Gemini,
        Shape { messages: Some(_), system: Some(_), .. } => Api::Messages,
        Shape { messages: Some(_), .. } if model.starts_with("claude") => Api::Messages,
        Shape { messages: Some(_), .. } => Api::Chat,
        Shape { input: Some(_), .. } if embeds || !is_response => Api::Embeddings,
        Shape { input: Some(_), .. } | Shape { instructions: Some(_), .. } => Api::Responses,
        Shape { prompt: Some(_), .. } => Api::Completions,
        _ => Api::Chat,
    }
}

impl Counted {
    fn as_json(&self) -> Value {
        let parts: serde_json::Map<String, Value> =
            Part::ALL.iter().map(|&part| (part.as_str().to_owned(), json!(self.estimate.of(part)))).collect();
        json!({
            "prompt_tokens": self.estimate.tokens(),
            "encoding": self.tokenizer.encoding.as_str(),
            "parts": parts,
        })
    }

    fn in_words(&self, explains: bool) -> String {
        let mut words = format!("prompt tokens  {}\n", self.estimate.tokens());
        for part in Part::ALL {
            words += &format!("  {:<12} {}\n", part.as_str(), self.estimate.of(part));
        }
        words += &format!("encoding       {}\n", self.tokenizer.encoding.as_str());
        if explains {
            let model = if self.model.is_empty() { "none named" } else { &self.model };
            words += &format!("api            {}\nmodel          {model}\n", self.api.as_str());
            if self.tokenizer.percent != 100 {
                words += &format!(
                    "factor         {} %: this model's vocabulary is not built in, its tokens are taken in proportion\n",
                    self.tokenizer.percent
                );
            }
            if self.estimate.is_rough {
                words += "rough          more than 4 MiB of text: two bytes are taken for a token\n";
            }
        }
        words
    }
}
