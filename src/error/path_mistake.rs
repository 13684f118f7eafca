//! The probable mistake in a path that the gateway does not serve.

use std::fmt;

/// The probable mistake in a path that the gateway does not serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathMistake {
    /// The `base_url` of the SDK.
    BaseUrl,
    /// Nothing: the path exists at a provider, and the gateway does not serve it.
    NotServed,
    /// The `base_url` ends in the path of this endpoint, which the SDK appends.
    EndpointTwice(&'static str),
    /// The path belongs to the admin listener.
    AdminPath,
    /// The path after `/v1`, which is similar to this endpoint.
    Misspelt(&'static str),
    /// The path would be served without the `/` at its end.
    TrailingSlash,
    /// The first segment is not an environment, and no environment has a similar name.
    UnknownEnvironment {
        /// The first segment of the path.
        given: String,
    },
    /// The name of the environment.
    Environment {
        /// The first segment of the path.
        given: String,
        /// The most similar name of an environment.
        nearest: String,
    },
}

impl PathMistake {
    /// Writes the message. `base_path`: the path of the `base_url` that would be right for this SDK.
    pub(super) fn write_message(
        &self,
        f: &mut fmt::Formatter<'_>,
        path: &str,
        base_path: &str,
        sdk: &str,
    ) -> fmt::Result {
        match self {
            Self::NotServed => write!(
                f,
                "The gateway knows the path '{path}' and does not serve it, because it cannot count the tokens that are used there. Its operator can let such requests pass, each charged as one request (other_paths: forward)."
            ),
            Self::AdminPath => write!(
                f,
                "The admin listener serves the path '{path}', and this is the listener for callers. Its operator knows the address of the admin listener (admin.listen)."
            ),
            Self::TrailingSlash => write!(
                f,
                "The gateway does not serve the path '{path}', because it ends in '/'. Remove the '/' at the end of the path."
            ),
            Self::Misspelt(endpoint) => write!(
                f,
                "The gateway does not serve the path '{path}'. Did you mean a path that ends in '/v1{endpoint}'?"
            ),
            Self::UnknownEnvironment { given } => {
                write!(f, "'{given}' is not an environment of this gateway. ")?;
                match base_path {
                    _ if base_path.starts_with("/<") => write!(
                        f,
                        "{sdk} needs a base_url that ends in '{base_path}'. Ask the gateway's operator for the name of the environment."
                    ),
                    "/" => write!(
                        f,
                        "Remove '/{given}' from the base_url, which then has no path, also not '/v1'. Or ask the gateway's operator for the name of the environment."
                    ),
                    _ => write!(
                        f,
                        "Remove '/{given}' from the base_url, so that its path is '{base_path}'. Or ask the gateway's operator for the name of the environment."
                    ),
                }
            }
            _ => {
                write!(f, "The gateway does not serve the path '{path}'. ")?;
                match self {
                    Self::EndpointTwice(endpoint) => write!(
                        f,
                        "It contains '{endpoint}' twice: {} appends this path itself. ",
                        lower_first(sdk)
                    )?,
                    Self::Environment { given, nearest } => {
                        write!(f, "There is no environment '{given}'. Did you mean '{nearest}'? ")?;
                    }
                    _ => {}
                }
                match base_path {
                    "/" => write!(f, "{sdk} needs a base_url without a path, also without '/v1'."),
                    _ => write!(f, "{sdk} needs a base_url that ends in '{base_path}'."),
                }
            }
        }
    }
}

/// `An OpenAI SDK` within a sentence.
fn lower_first(sdk: &str) -> String {
    let mut letters = sdk.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}
