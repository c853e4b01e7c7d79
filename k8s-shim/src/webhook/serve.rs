//! Answers over TLS.
//!
//! Whoever reaches the port can ask: how many there are at a time, how long each may take and how
//! much it may say has a limit each.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use kube::core::DynamicObject;
use kube::core::admission::{AdmissionRequest, AdmissionReview};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, info, warn};

use super::certificates::Certificates;
use super::judge::judge;
use crate::reconcile::Context;

/// Answers for ever.
///
/// # Errors
/// When nothing can be heard at the address.
pub async fn serve(
    address: SocketAddr,
    context: Arc<Context>,
    certificates: Arc<Certificates>,
) -> Result<()> {
    let listener = TcpListener::bind(address).await;
    let listener = listener.with_context(|| format!("listening at {address} for evictions"))?;
    let acceptor = TlsAcceptor::from(certificates.server()?);
    let places = Arc::new(Semaphore::new(AT_ONCE));
    info!(%address, "answers before evictions");
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else {
            return Ok(());
        };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                warn!(%error, "a connection came to nothing");
                sleep(RETRY).await;
                continue;
            }
        };
        let (acceptor, context) = (acceptor.clone(), Arc::clone(&context));
        tokio::spawn(async move {
            if let Err(error) = converse(stream, acceptor, context).await {
                debug!("a connection ended: {error:#}");
            }
            drop(place);
        });
    }
}

async fn converse(stream: TcpStream, acceptor: TlsAcceptor, context: Arc<Context>) -> Result<()> {
    let accepted = timeout(HANDSHAKE_TIME, acceptor.accept(stream)).await;
    let stream = accepted
        .context("no handshake in time")?
        .context("the handshake")?;
    let service = service_fn(move |request| {
        let context = Arc::clone(&context);
        async move { Ok::<_, Infallible>(respond(request, &context).await) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIME);
    // The API server keeps its connections; they end when they have not been used for a while.
    let conversation = http.serve_connection(TokioIo::new(stream), service);
    conversation.await.context("the conversation")
}

async fn respond(request: Request<Incoming>, context: &Context) -> Response<Full<Bytes>> {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/healthz") => plain(StatusCode::OK, "ok"),
        (&Method::POST, PATH) => {
            let read = timeout(BODY_TIME, Limited::new(request, BODY_MAX).collect()).await;
            match read {
                Ok(Ok(body)) => review(&body.to_bytes(), context).await,
                Ok(Err(error)) => plain(StatusCode::BAD_REQUEST, &error.to_string()),
                Err(_) => plain(StatusCode::REQUEST_TIMEOUT, "nothing more was said"),
            }
        }
        _ => plain(StatusCode::NOT_FOUND, "there is nothing here"),
    }
}

async fn review(body: &[u8], context: &Context) -> Response<Full<Bytes>> {
    let review = serde_json::from_slice::<AdmissionReview<DynamicObject>>(body);
    let request: AdmissionRequest<DynamicObject> = match review {
        Ok(review) => match review.try_into() {
            Ok(request) => request,
            Err(error) => return plain(StatusCode::BAD_REQUEST, &format!("{error}")),
        },
        Err(error) => return plain(StatusCode::BAD_REQUEST, &format!("{error}")),
    };
    let review = judge(context, &request).await.into_review();
    match serde_json::to_vec(&review) {
        Ok(text) => {
            let mut response = Response::new(Full::from(text));
            let json = hyper::header::HeaderValue::from_static("application/json");
            response.headers_mut().insert(CONTENT_TYPE, json);
            response
        }
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

fn plain(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{text}\n")));
    *response.status_mut() = status;
    response
}

/// What deploy/kubernetes/webhook.yaml says.
const PATH: &str = "/evict";
/// The API server has few connections to one address.
const AT_ONCE: usize = 128;
/// An eviction is small, and the API server sends none above 3 MiB.
const BODY_MAX: usize = 3 << 20;
const BODY_TIME: Duration = Duration::from_secs(5);
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
const HEADER_TIME: Duration = Duration::from_secs(120);
const RETRY: Duration = Duration::from_millis(200);
