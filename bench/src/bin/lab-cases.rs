//! `lab-cases`: small workloads with state that is hard to move.

use std::process::ExitCode;

fn main() -> ExitCode {
    pageferry_bench::cases::main()
}
