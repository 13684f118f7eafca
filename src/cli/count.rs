//! `tollgate count`

use crate::api::Api;
use crate::body::Body;
use crate::calibrations::{Calibrations, Kept};
use crate::config::Config;
use crate::estimate::{Model, Models, Part, PromptEstimate};
use crate::store;
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
    /// Say how the figure comes about; with --config also what the gateway has learned to correct it by
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
    known: Model,
    estimate: PromptEstimate,
}

/// What a config adds to what is built in.
#[derive(Default)]
struct Known {
    models: Models,
    learned: Vec<Kept>,
    config: Option<Config>,
}

impl Known {
    fn of(config: Config, explains: bool) -> anyhow::Result<Self> {
        let models = Models::load(&config.models).map_err(anyhow::Error::msg)?;
        let is_kept = explains && !config.store.memory && config.store.path.exists();
        let learned = if is_kept { store::calibrations(&config.store.path)? } else { Vec::new() };
        Ok(Self { models, learned, config: Some(config) })
    }
}

pub(super) fn run(config: Option<PathBuf>, arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let known = match super::named(config) {
        None => Known::default(),
        named => match super::load_or_explain(named) {
            Ok(loaded) => Known::of(loaded.config, arguments.explain)?,
            Err(code) => return Ok(code),
        },
    };
    let mut input: Box<dyn BufRead> = match &arguments.file {
        Some(path) => {
            let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
            Box::new(BufReader::new(file))
        }
        None => Box::new(io::stdin().lock()),
    };
    if arguments.jsonl {
        return each_line(arguments, &known, input.as_mut());
    }
    let mut body = Vec::new();
    input.read_to_end(&mut body).context("cannot read the request body")?;
    match count(arguments, &known, &body) {
        Ok(counted) => {
            print!("{}", counted.in_words());
            if arguments.explain {
                print!("{}{}", counted.explained(), counted.corrected(&known));
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(refused) => {
            eprintln!("tollgate: {refused}");
            Ok(ExitCode::from(super::FAILED))
        }
    }
}

fn each_line(arguments: &Arguments, known: &Known, input: &mut dyn BufRead) -> anyhow::Result<ExitCode> {
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
        let said =
            count(arguments, known, &line).map_or_else(|error| json!({ "error": error }), |c| c.as_json());
        writeln!(output, "{said}")?;
    }
}

fn count(arguments: &Arguments, known: &Known, json: &[u8]) -> Result<Counted, String> {
    let api = arguments.api.map_or_else(|| api_of(json), Api::from);
    let body = Body::read(api, json).map_err(|fault| fault.to_string())?;
    let model = body.model.as_deref().unwrap_or(&arguments.model).to_owned();
    let known = known.models.named(&model);
    Ok(Counted { api, estimate: body.prompt.estimate(&known), model, known })
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
            "encoding": self.known.tokenizer.encoding.as_str(),
            "parts": parts,
        })
    }

    fn in_words(&self) -> String {
        let mut words = format!("prompt tokens  {}\n", self.estimate.tokens());
        for part in Part::ALL {
            words += &format!("  {:<12} {}\n", part.as_str(), self.estimate.of(part));
        }
        words + &format!("encoding       {}\n", self.known.tokenizer.encoding.as_str())
    }

    fn explained(&self) -> String {
        let (estimate, percent) = (&self.estimate, self.known.tokenizer.percent);
        let model = if self.model.is_empty() { "none named" } else { &self.model };
        let mut words = format!("api            {}\nmodel          {model}\n", self.api.as_str());
        if !self.known.is_known {
            words += "               nothing is known of it; `models` in the config can tell\n";
        }
        if percent != 100 {
            words += &format!(
                "factor         {percent} %: this model's vocabulary is not built in, its tokens are taken in proportion\n"
            );
        }
        words += &format!("kind           {}\n", estimate.kind.as_str());
        if estimate.is_rough {
            words +=
                "rough          there is too much text to count it all: two bytes are taken for a token\n";
        }
        if estimate.unseen > 0 {
            words += &format!(
                "unseen         {} thing(s) that it refers to; the gateway adds unseen_prompt_tokens for each\n",
                estimate.unseen
            );
        } else if estimate.is_partial {
            words += "partial        the provider adds to it what nobody else can count\n";
        }
        words
    }

    /// What a gateway with this config would make of the estimate, by what it has learned of each upstream.
    fn corrected(&self, known: &Known) -> String {
        let Some(config) = &known.config else {
            return "corrected      with --config FILE this shows what the gateway has learned\n".to_owned();
        };
        let calibrations = Calibrations::new(config.upstreams.iter().map(|u| u.name.as_str()));
        calibrations.restore(known.learned.clone());
        let kind = self.estimate.kind;
        let learned = config.upstreams.iter().enumerate().filter_map(|(at, upstream)| {
            let is_it = |kept: &&Kept| {
                (&*kept.upstream, &*kept.model, kept.kind) == (&upstream.name, &self.model, kind)
            };
            let answers = known.learned.iter().find(is_it)?.answers.len();
            let tokens = calibrations.correction(at, &self.model, kind).apply(self.estimate.tokens());
            Some(format!(
                "corrected      {tokens} at {}, by its last {answers} answers of the kind\n",
                upstream.name
            ))
        });
        let learned: String = learned.collect();
        if learned.is_empty() {
            "corrected      nothing was learned of the like yet\n".to_owned()
        } else {
            learned
        }
    }
}
