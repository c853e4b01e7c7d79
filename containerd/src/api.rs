//! containerd's messages and client stubs, generated; and what is read of them.

pub use generated::containerd::runc::v1::Options;
pub use generated::containerd::services::containers::v1 as containers;
pub use generated::containerd::services::images::v1 as images;
pub use generated::containerd::services::namespaces::v1 as namespaces;
pub use generated::containerd::services::snapshots::v1 as snapshots;
pub use generated::containerd::services::tasks::v1 as tasks;
pub use generated::containerd::types::Mount;
pub use generated::containerd::v1::types::Status;

#[allow(
    dead_code,
    missing_debug_implementations,
    clippy::all,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::needless_pass_by_value,
    clippy::semicolon_if_nothing_returned,
    clippy::too_many_lines,
    clippy::uninlined_format_args
)]
mod generated {
    pub mod containerd {
        pub mod types {
            tonic::include_proto!("containerd.types");
        }
        pub mod runc {
            pub mod v1 {
                tonic::include_proto!("containerd.runc.v1");
            }
        }
        pub mod v1 {
            pub mod types {
                tonic::include_proto!("containerd.v1.types");
            }
        }
        pub mod services {
            pub mod containers {
                pub mod v1 {
                    tonic::include_proto!("containerd.services.containers.v1");
                }
            }
            pub mod images {
                pub mod v1 {
                    tonic::include_proto!("containerd.services.images.v1");
                }
            }
            pub mod namespaces {
                pub mod v1 {
                    tonic::include_proto!("containerd.services.namespaces.v1");
                }
            }
            pub mod snapshots {
                pub mod v1 {
                    tonic::include_proto!("containerd.services.snapshots.v1");
                }
            }
            pub mod tasks {
                pub mod v1 {
                    tonic::include_proto!("containerd.services.tasks.v1");
                }
            }
        }
    }
}
