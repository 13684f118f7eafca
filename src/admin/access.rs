//! Who may use the admin listener: the holder of the token, a browser that has signed in, or, without a token, the pages
//! and programs of this machine.

use super::answers::{AccessErrors, ErrorBody, NoParameters, ParameterErrors, body_too_large, refusal};
use super::audit::{self, Action, Actor, Identity, LISTENER, WrongTokens};
use super::guesses::Guesses;
use super::json_body::read_object;
use super::sessions::{SessionSecrets, SessionVerdict, Sessions};
use super::{Admin, Client, EXPLAIN, MAX_BODY_BYTES, MAX_EXPLAINED_BYTES};
use crate::clock;
use crate::error::ProxyError;
use crate::server::{HeadFault, ParsedHead};
use axum::body::{Body, Bytes};
use axum::extract::{Extension, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use futures_util::StreamExt as _;
use http::header::{self, HeaderMap};
use http::{HeaderName, HeaderValue, Method, StatusCode};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use subtle::ConstantTimeEq as _;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout;

/// Bodies for `POST /api/explain` at once. Further ones wait, within the time of a body.
const MAX_LARGE_BODIES: usize = 4;
const SESSION_COOKIE: &str = "tollgate_session";
const CSRF_COOKIE: &str = "tollgate_csrf";
const CSRF_HEADER: HeaderName = HeaderName::from_static("x-tollgate-csrf");

/// The state that access depends on, besides the token in the config.
#[derive(Debug)]
pub(super) struct Access {
    /// `Host` values that a request may have if there is no token: the addresses and names of this listener.
    hosts: Vec<String>,
    sessions: Mutex<Sessions>,
    guesses: Mutex<Guesses>,
    /// Bounds the memory of bodies for `POST /api/explain`.
    large_bodies: Semaphore,
    pub(super) wrong_tokens: WrongTokens,
}

impl Access {
    /// For a listener at this address.
    pub(super) fn new(address: SocketAddr) -> Self {
        let port = address.port();
        let names = ["localhost", "127.0.0.1", "[::1]"].map(|name| format!("{name}:{port}"));
        let hosts = names.into_iter().chain([address.to_string()]).collect();
        Self {
            hosts,
            sessions: Mutex::default(),
            guesses: Mutex::default(),
            large_bodies: Semaphore::new(MAX_LARGE_BODIES),
            wrong_tokens: WrongTokens::default(),
        }
    }

    fn sessions(&self) -> MutexGuard<'_, Sessions> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn guesses(&self) -> MutexGuard<'_, Guesses> {
        self.guesses.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Compares a token. `Err`: the answer for a wrong one, or for an address that guesses.
fn check_token(admin: &Admin, address: IpAddr, given: &[u8], token: &str) -> Result<(), Box<Response>> {
    let (access, now) = (&admin.access, clock::now());
    let wait_ms = access.guesses().wait_ms(address, now);
    if wait_ms > 0 {
        return Err(Box::new(too_many_guesses(wait_ms)));
    }
    if given.ct_eq(token.as_bytes()).into() {
        access.guesses().forget(address);
        return Ok(());
    }
    access.guesses().record(address, now);
    audit::record_wrong_token(admin, address);
    tracing::warn!(%address, "a request to the admin listener had a wrong token");
    Err(Box::new(wrong_token()))
}

/// The credential of a long answer, such as a stream of events. It is checked repeatedly.
pub(super) enum Credential {
    /// There is no token.
    Local,
    Token(Box<[u8]>),
    Session(String),
}

impl Credential {
    /// The credential of a request that was authorized.
    pub(super) fn of(actor: Actor, headers: &HeaderMap) -> Self {
        match actor.by {
            Identity::Local | Identity::Anonymous => Self::Local,
            Identity::Token => Self::Token(bearer_token(headers).unwrap_or_default().into()),
            Identity::Session => {
                Self::Session(cookie(headers, SESSION_COOKIE).unwrap_or_default().to_owned())
            }
        }
    }

    /// Whether a request with this credential would be authorized now. Does not prolong a session.
    pub(super) fn is_valid(&self, admin: &Admin) -> bool {
        let snapshot = admin.state.current();
        match (self, &snapshot.config.admin.token) {
            (Self::Local, None) => true,
            (Self::Token(given), Some(token)) => given.ct_eq(token.expose().as_bytes()).into(),
            (Self::Session(session), Some(token)) => {
                admin.access.sessions().is_open(session, token.expose(), clock::now())
            }
            _ => false,
        }
    }
}

/// The token of the header `Authorization`; empty if it has another scheme. `None`: there is no such header.
fn bearer_token(headers: &HeaderMap) -> Option<&[u8]> {
    let given = headers.get(header::AUTHORIZATION)?;
    Some(given.as_bytes().strip_prefix(b"Bearer ").unwrap_or_default())
}

/// Refuses requests that are not allowed. Health checks, the page and signing in always are. With `admin.token` any other
/// request needs the token or a session. Without it every request to the loopback listener is allowed, but not from web
/// pages of other sites in a browser on this machine.
pub(super) async fn authorize(
    State(admin): State<Admin>,
    Extension(client): Extension<Client>,
    request: Request,
    next: Next,
) -> Response {
    // Some health checks name no host.
    if let Err(fault) = ParsedHead::from(&request).check(false) {
        return invalid_head(fault);
    }
    if matches!(request.uri().path(), "/livez" | "/readyz") {
        return next.run(request).await;
    }
    let expects_continue = request.headers().contains_key(header::EXPECT);
    let mut response = match check(&admin, client.address.ip(), &request) {
        Err(refusal) => *refusal,
        // This applies to every body, also if the handler would ignore it.
        Ok(_) if is_too_large(&request) => body_too_large(),
        Ok(by) => match with_whole_body(&admin, request, client.body_timeout).await {
            Err(refusal) => *refusal,
            Ok((mut request, _permit)) => {
                request.extensions_mut().insert(Actor { by, address: client.address.ip() });
                next.run(request).await
            }
        },
    };
    protect_from_browsers(response.headers_mut());
    if expects_continue {
        // If the body was not read, the server closes the connection.
        response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

fn invalid_head(fault: HeadFault) -> Response {
    let error = ProxyError::from(fault);
    let (status, _, code) = error.shape();
    refusal(status, code, &error.to_string())
}

/// A browser must neither show an answer in a frame nor guess its type. The page's own files have a policy already.
fn protect_from_browsers(headers: &mut HeaderMap) {
    let policy = HeaderValue::from_static("default-src 'none'; frame-ancestors 'none'");
    headers.entry(header::CONTENT_SECURITY_POLICY).or_insert(policy);
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
}

/// How the sender of the request is identified. `Err`: the answer, because the sender may not send it.
fn check(admin: &Admin, address: IpAddr, request: &Request) -> Result<Identity, Box<Response>> {
    let (headers, path) = (request.headers(), request.uri().path());
    let snapshot = admin.state.current();
    let Some(token) = &snapshot.config.admin.token else {
        let origin_scheme = if snapshot.config.admin.tls.is_some() { "https://" } else { "http://" };
        return if is_own_site(headers, &admin.access.hosts, origin_scheme) {
            Ok(Identity::Local)
        } else {
            Err(Box::new(foreign_site()))
        };
    };
    let is_open = path == "/"
        || path.starts_with("/page/")
        || (path == "/api/session" && request.method() == Method::POST);
    if is_open {
        return Ok(Identity::Anonymous);
    }
    if let Some(given) = bearer_token(headers) {
        return check_token(admin, address, given, token.expose()).map(|()| Identity::Token);
    }
    let Some(session) = cookie(headers, SESSION_COOKIE) else { return Err(Box::new(wrong_token())) };
    let is_safe = matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    let repeated = headers.get(CSRF_HEADER).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let csrf = (!is_safe).then_some(repeated);
    match admin.access.sessions().allow(session, csrf, token.expose(), clock::now()) {
        SessionVerdict::Allowed => Ok(Identity::Session),
        SessionVerdict::Unknown => Err(Box::new(wrong_token())),
        SessionVerdict::Forged => Err(Box::new(refusal(
            StatusCode::FORBIDDEN,
            "csrf",
            "A request that changes something must repeat the cookie tollgate_csrf in the header x-tollgate-csrf.",
        ))),
    }
}

/// The body of `POST /api/session`.
#[derive(serde::Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SignIn {
    /// `admin.token`.
    token: String,
}

/// Begins a session of a browser: sets the cookies `tollgate_session` and `tollgate_csrf`.
#[utoipa::path(post, path = "/api/session", tag = "access", security(()), request_body = SignIn, responses(
    (status = 204, description = "Signed in."),
    (status = 400, description = "`invalid_json`, `invalid_value`: the body is not valid, or there is a query parameter.", body = ErrorBody),
    (status = 413, description = "`request_body_too_large`: the body is larger than 64 KiB.", body = ErrorBody),
    (status = 500, description = "`internal_error`: there are no random numbers.", body = ErrorBody),
    AccessErrors,
))]
pub(super) async fn sign_in(
    State(admin): State<Admin>,
    Extension(client): Extension<Client>,
    _: NoParameters,
    body: Bytes,
) -> Response {
    let Ok(SignIn { token: given }) = read_object(&body) else {
        return refusal(StatusCode::BAD_REQUEST, "invalid_json", "The body is not {\"token\": \"...\"}.");
    };
    let snapshot = admin.state.current();
    let Some(token) = &snapshot.config.admin.token else { return StatusCode::NO_CONTENT.into_response() };
    if let Err(refusal) = check_token(&admin, client.address.ip(), given.as_bytes(), token.expose()) {
        return *refusal;
    }
    let opened = admin.access.sessions().open(token.expose(), clock::now());
    let Some(SessionSecrets { session, csrf }) = opened else {
        let message = "The operating system provides no random numbers, so no session can begin.";
        return refusal(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message);
    };
    tracing::info!(address = %client.address.ip(), "a browser signed in to the admin listener");
    let actor = Actor { by: Identity::Token, address: client.address.ip() };
    audit::record(
        &admin,
        actor,
        Action { name: "sign_in", target: LISTENER.to_owned(), ..Action::default() },
    )
    .await;
    let secure = if snapshot.config.admin.tls.is_some() { "; Secure" } else { "" };
    cookies([
        format!("{SESSION_COOKIE}={session}; Path=/; HttpOnly; SameSite=Strict{secure}"),
        format!("{CSRF_COOKIE}={csrf}; Path=/; SameSite=Strict{secure}"),
    ])
}

/// Ends a session.
#[utoipa::path(delete, path = "/api/session", tag = "access", responses(
    (status = 204, description = "Signed out."),
    ParameterErrors,
    AccessErrors,
))]
pub(super) async fn sign_out(
    State(admin): State<Admin>,
    Extension(actor): Extension<Actor>,
    headers: HeaderMap,
    _: NoParameters,
) -> Response {
    if let Some(session) = cookie(&headers, SESSION_COOKIE) {
        admin.access.sessions().close(session);
        let action = Action { name: "sign_out", target: LISTENER.to_owned(), ..Action::default() };
        audit::record(&admin, actor, action).await;
    }
    cookies([
        format!("{SESSION_COOKIE}=; Path=/; HttpOnly; SameSite=Strict; Max-Age=0"),
        format!("{CSRF_COOKIE}=; Path=/; SameSite=Strict; Max-Age=0"),
    ])
}

fn cookies(values: [String; 2]) -> Response {
    let mut response = StatusCode::NO_CONTENT.into_response();
    for value in values {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().append(header::SET_COOKIE, value);
        }
    }
    response
}

/// The value of a cookie.
fn cookie<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    let lines = headers.get_all(header::COOKIE).iter().filter_map(|line| line.to_str().ok());
    let mut pairs = lines.flat_map(|line| line.split(';')).filter_map(|pair| pair.trim().split_once('='));
    pairs.find(|(key, _)| *key == name).map(|(_, value)| value)
}

fn is_own_site(headers: &HeaderMap, hosts: &[String], scheme: &str) -> bool {
    let is_own = |name: &str| hosts.iter().any(|host| host == name);
    let host = headers.get(header::HOST).and_then(|h| h.to_str().ok());
    let origin = headers.get(header::ORIGIN).map(|o| o.to_str().unwrap_or_default());
    host.is_some_and(is_own) && origin.is_none_or(|o| o.strip_prefix(scheme).is_some_and(is_own))
}

fn foreign_site() -> Response {
    refusal(
        StatusCode::FORBIDDEN,
        "foreign_site",
        "Without admin.token this listener accepts only requests whose Host and Origin are its own address, such as 127.0.0.1 or localhost with its port. Use that address, or set admin.token.",
    )
}

/// Whether the request announces a body that is larger than any that its path takes.
fn is_too_large(request: &Request) -> bool {
    let length = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    let max = max_body_bytes(request) as u64;
    length.is_some_and(|length| length.parse().is_ok_and(|length: u64| length > max))
}

/// Receives the body of a request. A large body has a permit, which is released when the request has been answered.
async fn with_whole_body(
    admin: &Admin,
    request: Request,
    max_time: Duration,
) -> Result<(Request, Option<SemaphorePermit<'_>>), Box<Response>> {
    let max_bytes = max_body_bytes(&request);
    let (parts, body) = request.into_parts();
    let receive = async {
        let permit = if max_bytes > MAX_BODY_BYTES {
            // The semaphore is never closed.
            admin.access.large_bodies.acquire().await.ok()
        } else {
            None
        };
        receive(body, max_bytes).await.map(|bytes| (bytes, permit))
    };
    let refusal = match timeout(max_time, receive).await {
        Ok(Ok((bytes, permit))) => return Ok((Request::from_parts(parts, Body::from(bytes)), permit)),
        Ok(Err(BodyFault::TooLarge)) => body_too_large(),
        Ok(Err(BodyFault::Incomplete)) => {
            refusal(StatusCode::BAD_REQUEST, "bad_request", "The body was not received to its end.")
        }
        Err(_) => {
            let message = format!("The body was not received within {} s.", max_time.as_secs());
            refusal(StatusCode::REQUEST_TIMEOUT, "request_timeout", &message)
        }
    };
    Err(Box::new(refusal))
}

/// Why a body was not received.
enum BodyFault {
    TooLarge,
    /// The connection broke off.
    Incomplete,
}

async fn receive(body: Body, max_bytes: usize) -> Result<Bytes, BodyFault> {
    let (mut received, mut pieces) = (Vec::new(), body.into_data_stream());
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|_| BodyFault::Incomplete)?;
        if received.len() + piece.len() > max_bytes {
            return Err(BodyFault::TooLarge);
        }
        received.extend_from_slice(&piece);
    }
    Ok(received.into())
}

fn max_body_bytes(request: &Request) -> usize {
    if request.uri().path() == EXPLAIN { MAX_EXPLAINED_BYTES } else { MAX_BODY_BYTES }
}

fn wrong_token() -> Response {
    refusal(
        StatusCode::UNAUTHORIZED,
        "invalid_token",
        "The token is missing or wrong. Send 'Authorization: Bearer <admin.token>', or sign in on the page.",
    )
}

fn too_many_guesses(wait_ms: u64) -> Response {
    let seconds = wait_ms.div_ceil(1_000).max(1);
    let message = format!("This address has sent several wrong tokens. Try again in {seconds} s.");
    let mut response = refusal(StatusCode::TOO_MANY_REQUESTS, "too_many_wrong_tokens", &message);
    response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
    response
}
