//! The generated half of the API: messages, client and server of `schema/control.proto`.

#![allow(
    missing_debug_implementations,
    clippy::all,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    clippy::needless_pass_by_value,
    clippy::semicolon_if_nothing_returned,
    clippy::too_many_lines,
    clippy::uninlined_format_args
)]

tonic::include_proto!("pageferry.control.v1");
