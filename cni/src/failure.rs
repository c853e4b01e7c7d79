//! What went wrong, as CNI has it said: one JSON object on standard output.

use serde_json::{Value, json};

use crate::folders::StoreError;

/// Codes of the specification.
pub(crate) const VERSION: u32 = 1;
pub(crate) const ENVIRONMENT: u32 = 4;
pub(crate) const INPUT: u32 = 5;
pub(crate) const DECODE: u32 = 6;
pub(crate) const CONFIG: u32 = 7;
pub(crate) const LATER: u32 = 11;
/// Ours: the delegate did not do what it was asked.
pub(crate) const DELEGATE: u32 = 100;
/// Ours: the pod runs elsewhere.
pub(crate) const LEFT: u32 = 101;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// Found here.
    #[error("{text}")]
    Own {
        /// What kind it is, for a program.
        code: u32,
        /// What failed, on what, and what to do.
        text: String,
    },
    /// Said by the delegate, which is passed on as it is.
    #[error("{0}")]
    Delegate(Value),
}

impl Failure {
    pub(crate) fn new(code: u32, text: impl Into<String>) -> Self {
        let text = text.into();
        Self::Own { code, text }
    }

    /// The object that the caller reads.
    pub fn object(&self, version: &str) -> Value {
        match self {
            Self::Own { code, text } => json!({"cniVersion": version, "code": code, "msg": text}),
            Self::Delegate(object) => object.clone(),
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let code = match error {
            StoreError::File { .. } => INPUT,
            StoreError::Text { .. } => DECODE,
            StoreError::Names { .. } | StoreError::Uid { .. } => ENVIRONMENT,
        };
        let mut text = error.to_string();
        if let Some(source) = std::error::Error::source(&error) {
            text = format!("{text}: {source}");
        }
        Self::new(code, text)
    }
}
