//! `tollgate count`: prints the prompt estimate of a request body.

use super::output;
use crate::api::Api;
use crate::body::{Body, BodyText, detect_api};
use crate::calibrations::{Calibrations, SavedCalibration};
use crate::config::{Config, Environment};
use crate::estimate::{EstimateSource, Model, Models, PromptEstimate, PromptPart, Provider};
use crate::store;
use anyhow::Context as _;
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

#[derive(clap::Args)]
pub(super) struct CountArguments {
    /// File with the request body [default: standard input]
    file: Option<PathBuf>,
    /// API of the request body [default: detected from its fields]
    #[arg(long, value_enum)]
    api: Option<ApiName>,
    /// Read one body per line and print one JSON object per line
    #[arg(long)]
    jsonl: bool,
    /// Explain the estimate; with --config also print the corrections that the gateway has learned
    #[arg(long)]
    explain: bool,
    /// Model for bodies that name none
    #[arg(long, default_value = "")]
    model: String,
    /// Service that receives the request [default: that of the config's upstreams if they agree]
    #[arg(long, value_parser = provider_named)]
    provider: Option<Provider>,
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

fn provider_named(name: &str) -> Result<Provider, String> {
    let named = Provider::NAMED.iter().find(|(known, _)| *known == name);
    named.map(|&(_, provider)| provider).ok_or_else(|| {
        let names: Vec<&str> = Provider::NAMED.iter().map(|(name, _)| *name).collect();
        format!("the providers are {}", names.join(", "))
    })
}

/// The estimate of one body.
struct CountResult {
    api: Api,
    model: String,
    /// The model whose rules count: the one that the config's routes send, if they agree.
    sent_model: String,
    rules: Model,
    estimate: PromptEstimate,
}

/// The models and calibrations of the config. Without a config only the built-in models.
#[derive(Default)]
struct CountContext {
    models: Models,
    calibrations: Vec<SavedCalibration>,
    config: Option<Config>,
    /// The provider behind all upstreams; `Unknown` if they differ.
    provider: Provider,
}

impl CountContext {
    fn new(config: Config, explains: bool) -> anyhow::Result<Self> {
        let models = Models::load(&config.models).map_err(anyhow::Error::msg)?;
        let has_store = explains && !config.store.memory && config.store.path.exists();
        let calibrations = if has_store { store::read_calibrations(&config.store.path)? } else { Vec::new() };
        let mut providers = config.upstreams.iter().map(|upstream| Provider::of_upstream(upstream));
        let first = providers.next().unwrap_or_default();
        let provider = if providers.all(|provider| provider == first) { first } else { Provider::Unknown };
        Ok(Self { models, calibrations, config: Some(config), provider })
    }

    /// The model name that goes upstream, if all environments send the same one; otherwise the name itself.
    fn name_sent<'a>(&'a self, api: Api, model: &'a str) -> &'a str {
        let environments = self.config.iter().flat_map(|config| &config.environments);
        let sent = |environment: &'a Arc<Environment>| {
            let route = environment.routes.get(environment.route_of(api.as_str(), model)?)?;
            route.model.as_deref()
        };
        let mut names = environments.map(|environment| sent(environment).unwrap_or(model));
        let first = names.next().unwrap_or(model);
        if names.all(|name| name == first) { first } else { model }
    }
}

pub(super) fn run(config: Option<PathBuf>, arguments: &CountArguments) -> anyhow::Result<ExitCode> {
    let context = match super::config_path(config) {
        None => CountContext::default(),
        path => match super::load_or_explain(path) {
            Ok(loaded) => CountContext::new(loaded.config, arguments.explain)?,
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
        return count_lines(arguments, &context, input.as_mut());
    }
    let mut body = Vec::new();
    input.read_to_end(&mut body).context("cannot read the request body")?;
    match count(arguments, &context, &body) {
        Ok(result) => {
            output::print(&result.to_text())?;
            if arguments.explain {
                let parts = [result.explanation(), result.routes(&context), result.corrections(&context)];
                output::print(&parts.concat())?;
            }
            Ok(ExitCode::SUCCESS)
        }
        Err(fault) => {
            output::report(&format!("tollgate: {fault}"));
            Ok(ExitCode::from(super::FAILED))
        }
    }
}

fn count_lines(
    arguments: &CountArguments,
    context: &CountContext,
    input: &mut dyn BufRead,
) -> anyhow::Result<ExitCode> {
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
        let result =
            count(arguments, context, &line).map_or_else(|error| json!({ "error": error }), |c| c.as_json());
        writeln!(output, "{result}")?;
    }
}

fn count(arguments: &CountArguments, context: &CountContext, json: &[u8]) -> Result<CountResult, String> {
    let api = arguments.api.map_or_else(|| detect_api(json), Api::from);
    let text = BodyText::of(json).map_err(|fault| fault.to_string())?;
    let body = Body::read(api, &text).map_err(|fault| fault.to_string())?;
    let model = body.model.as_deref().unwrap_or(&arguments.model).to_owned();
    let sent_model = context.name_sent(api, &model).to_owned();
    let rules = context.models.named(&sent_model).at(arguments.provider.unwrap_or(context.provider));
    Ok(CountResult { api, estimate: body.prompt.estimate(&rules), model, sent_model, rules })
}

impl CountResult {
    fn as_json(&self) -> Value {
        let parts: serde_json::Map<String, Value> = PromptPart::ALL
            .iter()
            .map(|&part| (part.as_str().to_owned(), json!(self.estimate.of(part))))
            .collect();
        json!({
            "prompt_tokens": self.estimate.tokens(),
            "encoding": self.rules.tokenizer.encoding.as_str(),
            "parts": parts,
        })
    }

    fn to_text(&self) -> String {
        let mut text = format!("prompt tokens  {}\n", self.estimate.tokens());
        for part in PromptPart::ALL {
            text += &format!("  {:<12} {}\n", part.as_str(), self.estimate.of(part));
        }
        text + &format!("encoding       {}\n", self.rules.tokenizer.encoding.as_str())
    }

    fn explanation(&self) -> String {
        let (estimate, percent) = (&self.estimate, self.rules.tokenizer.percent);
        let model = if self.model.is_empty() { "(none)" } else { &self.model };
        let mut text = format!("api            {}\nmodel          {model}\n", self.api.as_str());
        if !self.rules.is_known {
            text += "               this model is not in the built-in table; add a rule to `models` in the config\n";
        }
        if percent != 100 {
            text += &format!(
                "factor         {percent} %: the vocabulary of this model is not built in, so the count of another one is scaled\n"
            );
        }
        if let Some(tokens) = self.rules.overhead() {
            text += &format!(
                "overhead       {tokens} tokens per request besides the messages, set in the config\n"
            );
        }
        if let Some(factor) = self.rules.tool_factor() {
            let (whole, decimals) = (factor / 1_000, factor % 1_000);
            text += &format!("tool factor    {whole}.{decimals:03}, set in the config\n");
        }
        text += &format!("provider       {}\n", self.rules.provider().as_str());
        text += &format!("kind           {}\n", estimate.kind.as_str());
        if estimate.is_rough {
            text += "rough          the text is too long to be counted exactly; two bytes are counted as one token\n";
        }
        if estimate.unseen > 0 {
            text += &format!(
                "unseen         {} reference(s) to content outside the request; the gateway adds unseen_prompt_tokens for each\n",
                estimate.unseen
            );
        } else if estimate.is_partial {
            text += "partial        the provider adds tokens that the gateway cannot count\n";
        }
        text
    }

    /// Where each environment with routes would send the request.
    fn routes(&self, context: &CountContext) -> String {
        let environments = context.config.iter().flat_map(|config| &config.environments);
        let routed = environments.filter(|environment| !environment.routes.is_empty());
        let line = |environment: &Arc<Environment>| {
            let name = &environment.name;
            let Some(at) = environment.route_of(self.api.as_str(), &self.model) else {
                return format!(
                    "route          environment {name}: none matches, so upstream {}\n",
                    environment.upstream.name
                );
            };
            let route = &environment.routes[at];
            let upstreams: Vec<&str> = route.upstreams.iter().map(|upstream| &*upstream.name).collect();
            let sent = route.model.as_ref().map_or_else(String::new, |model| format!(", sent as {model}"));
            format!(
                "route          environment {name}: route {}, upstream {}{sent}\n",
                at + 1,
                upstreams.join(", then ")
            )
        };
        routed.map(line).collect()
    }

    /// The estimates that a gateway with this config would reserve, by the calibrations of each upstream.
    fn corrections(&self, context: &CountContext) -> String {
        let Some(config) = &context.config else {
            return "corrected      with --config FILE this line shows the corrected estimate\n".to_owned();
        };
        let calibrations = Calibrations::new(config.upstreams.iter().map(|u| u.name.as_str()));
        calibrations.restore(context.calibrations.clone());
        let kind = self.estimate.kind;
        let corrected = config.upstreams.iter().enumerate().filter_map(|(at, upstream)| {
            let matches = |saved: &&SavedCalibration| {
                (&*saved.upstream, &*saved.model, saved.kind) == (&upstream.name, &self.sent_model, kind)
            };
            let answers = context.calibrations.iter().find(matches)?.answers.len();
            let correction = calibrations.correction(at, &self.sent_model, kind);
            let tokens = correction.apply(self.estimate.tokens());
            let source =
                if correction.is_default() { EstimateSource::Rules } else { EstimateSource::Calibration };
            Some(format!(
                "corrected      {tokens} for upstream {}, from its last {answers} answers of this kind (source: {})\n",
                upstream.name,
                source.as_str()
            ))
        });
        let corrected: String = corrected.collect();
        if corrected.is_empty() {
            let source = EstimateSource::Rules.as_str();
            format!("corrected      there is no answer for this model and kind yet (source: {source})\n")
        } else {
            corrected
                + "               a running gateway may know more: the conversation, or the tools and the system prompt\n"
        }
    }
}
