//! What the nodes of a benchmark have besides the image, when a cell needs it.

use crate::app::layer::{ARRAYS, ARRAYS_TEXT};
use crate::lab::layer::LayerPlan;
use crate::workload::podman;

/// Everything at once: a benchmark has one lab, and its runs are mixed.
pub const LAYER: LayerPlan = LayerPlan {
    name: "bench",
    packages: &[
        "conmon",
        "libcriu2",
        "memcached",
        "netavark",
        "podman",
        "postgresql",
        "python3-numpy",
        "socat",
        "zstd",
    ],
    files: &[podman::SETTINGS, (ARRAYS, ARRAYS_TEXT)],
    script: "rm -rf /var/lib/postgresql/*/main\n",
};
