//! The control API of a daemon: messages, client and server of `schema/control.proto`.
//!
//! For whoever speaks to a daemon, and for the daemon: the socket is a unix socket of its node, and
//! whoever may open it may do everything. The schema says what each call and each field means; all
//! of this crate is generated from it.
//!
//! Invariants: fields are added, never changed or removed; an enum's 0 is no value. Absent: serving
//! the calls, and the types of the daemon, which are in the daemon; any way in from the network.

#![forbid(unsafe_code)]
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
