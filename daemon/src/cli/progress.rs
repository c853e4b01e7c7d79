//! Progress while a migration runs: a bar on a terminal, otherwise a line for each phase and round.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use pageferry_api::Status;

use super::output::{line, millis, paused};
use crate::config::units::{Bytes, Span};

/// Shows the statuses of one migration on stderr.
#[derive(Debug)]
pub struct Shown {
    bar: Option<ProgressBar>,
    /// What the last line said.
    phase: String,
    round: u32,
    /// Notes were told.
    is_noted: bool,
    /// When copying was seen to begin.
    copying_since: Option<Instant>,
}

impl Shown {
    /// Nothing shown yet.
    pub fn new() -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            bar.set_style(style());
            bar.enable_steady_tick(TICK);
            bar
        });
        Self {
            bar,
            phase: String::new(),
            round: 0,
            is_noted: false,
            copying_since: None,
        }
    }

    /// Shows `status`, if there is anything new in it.
    pub fn show(&mut self, status: &Status) {
        if status.round > 0 && self.copying_since.is_none() {
            self.copying_since = Some(Instant::now());
        }
        if !self.is_noted && !status.notes.is_empty() {
            self.is_noted = true;
            for note in &status.notes {
                self.tell(&format!("note: {note}"));
            }
        }
        if let Some(bar) = &self.bar {
            let sent = status.sent_bytes.unwrap_or(0);
            bar.set_length(status.memory_bytes.unwrap_or(0).max(sent));
            bar.set_position(sent);
            bar.set_prefix(status.phase.clone());
            bar.set_message(self.message(status));
        } else if (self.phase != status.phase || self.round != status.round) && !status.r#final {
            // How it ended whoever asked prints as the result.
            self.tell(&line(status));
        }
        self.phase.clone_from(&status.phase);
        self.round = status.round;
    }

    fn tell(&self, line: &str) {
        // There is nobody to tell that stderr is closed.
        match &self.bar {
            Some(bar) => bar.suspend(|| drop(writeln!(io::stderr(), "{line}"))),
            None => drop(writeln!(io::stderr(), "{line}")),
        }
    }

    /// Takes the bar away, so that a result can be printed.
    pub fn end(self) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
    }

    fn message(&self, status: &Status) -> String {
        let mut message = format!("round {}", status.round);
        if status.retries > 0 {
            message += &format!(", freezes given up: {}", status.retries);
        }
        if let Some(rate) = status.dirty_pages_per_second {
            message += &format!(", {rate} dirtied pages/s");
        }
        if let Some(predicted) = status.predicted_downtime_us {
            message += &format!(", predicted downtime {:.0} ms", millis(predicted));
        }
        message += &paused(status, ", ");
        match self
            .copying_since
            .and_then(|since| left(status, since.elapsed()))
        {
            Some(left) => message + &format!(", ETA {}", Span(left)),
            None => message,
        }
    }
}

/// Time until the memory has been sent once, in whole seconds; later rounds have no end that could
/// be known.
fn left(status: &Status, copying: Duration) -> Option<Duration> {
    let sent = status.sent_bytes?;
    let left = status.memory_bytes?.checked_sub(sent)?;
    if status.round != 1 || sent == 0 || left == 0 {
        return None;
    }
    // Rounded to seconds: no precision is lost that anybody sees.
    let seconds = copying.as_secs_f64() * left as f64 / sent as f64;
    Duration::try_from_secs_f64(seconds.ceil()).ok()
}

fn style() -> ProgressStyle {
    ProgressStyle::with_template("{prefix:10} [{bar:30}] {sent} of {all}  {msg}")
        .expect("the template is constant and tested")
        .progress_chars("=> ")
        .with_key(
            "sent",
            |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
                // Writing to a string cannot fail.
                let _ = out.write_str(&Bytes(state.pos()).rounded());
            },
        )
        .with_key(
            "all",
            |state: &indicatif::ProgressState, out: &mut dyn std::fmt::Write| {
                let _ = out.write_str(&Bytes(state.len().unwrap_or(0)).rounded());
            },
        )
}

/// How often the bar is drawn.
const TICK: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_is_one() {
        drop(style());
    }

    #[test]
    fn what_is_left_of_the_first_round_is_told() {
        let mut status = Status {
            round: 1,
            memory_bytes: Some(300),
            sent_bytes: Some(100),
            ..Status::default()
        };
        assert_eq!(
            left(&status, Duration::from_secs(2)),
            Some(Duration::from_secs(4))
        );
        status.round = 2;
        assert_eq!(left(&status, Duration::from_secs(2)), None);
    }
}
