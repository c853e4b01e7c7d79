//! `lab-writer`: the self-checking workload.

use std::process::ExitCode;

fn main() -> ExitCode {
    pageferry_bench::writer::main()
}
