//! The endpoint: `GET /metrics`, and nothing else.
//!
//! Whoever reaches it may read it: it says how much is moved, and of whom nothing. So by default
//! nothing listens. A few may ask at once; more than that are told to come again.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use super::{Metrics, Standing};

/// Answers at once.
const ANSWERS_MAX: usize = 4;

/// What the format is called.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Why nobody listens.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for metrics at {address}")]
pub struct ServeError {
    address: SocketAddr,
    #[source]
    source: io::Error,
}

struct Desk<Ask> {
    metrics: Metrics,
    ask: Ask,
    places: Semaphore,
}

/// Serves `metrics` at an address until what is returned is aborted; `ask` says what stands
/// somewhere. Also says which address that is, if a port was left open.
pub async fn serve<Ask, Answer>(
    address: SocketAddr,
    metrics: Metrics,
    ask: Ask,
) -> Result<(SocketAddr, JoinHandle<()>), ServeError>
where
    Ask: Fn() -> Answer + Send + Sync + 'static,
    Answer: Future<Output = Standing> + Send + 'static,
{
    let failed = |source| ServeError { address, source };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let address = listener.local_addr().map_err(failed)?;
    let desk = Arc::new(Desk {
        metrics,
        ask,
        places: Semaphore::new(ANSWERS_MAX),
    });
    let router = Router::new()
        .route("/metrics", get(answer::<Ask, Answer>))
        .with_state(desk);
    let serving = tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "metrics are served no more");
        }
    });
    Ok((address, serving))
}

async fn answer<Ask, Answer>(State(desk): State<Arc<Desk<Ask>>>) -> Response
where
    Ask: Fn() -> Answer + Send + Sync + 'static,
    Answer: Future<Output = Standing> + Send + 'static,
{
    let Ok(_place) = desk.places.try_acquire() else {
        return StatusCode::SERVICE_UNAVAILABLE.into_response();
    };
    let standing = (desk.ask)().await;
    ([(CONTENT_TYPE, OPEN_METRICS)], desk.metrics.text(&standing)).into_response()
}
