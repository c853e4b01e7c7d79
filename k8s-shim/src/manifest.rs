//! The resources' definitions, as a cluster takes them.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

use crate::migration::Migration;
use crate::policy::MigrationPolicy;

/// All of them.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    vec![Migration::crd(), MigrationPolicy::crd()]
}

/// The file with all of them.
///
/// # Errors
/// What the writer of YAML said.
pub fn text() -> Result<String, serde_saphyr::ser::Error> {
    let mut text = HEAD.to_owned();
    for definition in definitions() {
        text += "---\n";
        text += &serde_saphyr::to_string(&definition)?;
        if !text.ends_with('\n') {
            text.push('\n');
        }
    }
    Ok(text)
}

/// Where the file is in the repository.
pub const PATH: &str = "deploy/kubernetes/crds.yaml";
const HEAD: &str = "# Generated: cargo run -p pageferry-k8s --bin crdgen\n";
