//! Waits that end.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Asks again and again until there is an answer.
///
/// # Errors
/// When `time_max` is over: `what`, and why there was none the last time.
pub fn until<T>(what: &str, time_max: Duration, mut ask: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + time_max;
    loop {
        match ask() {
            Ok(answer) => return Ok(answer),
            Err(error) if deadline < Instant::now() => {
                return Err(error).with_context(|| format!("{what}: not within {time_max:?}"));
            }
            Err(error) if error.is::<Hopeless>() => bail!("{what}: {error:#}"),
            Err(_) => std::thread::sleep(POLL),
        }
    }
}

/// An answer that asking again does not change.
#[derive(Debug)]
pub struct Hopeless(pub String);

impl std::fmt::Display for Hopeless {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Hopeless {}

const POLL: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn it_ends_with_the_answer_the_last_error_or_no_hope() {
        let mut asked = 0;
        let third = until("three", Duration::from_secs(60), || {
            asked += 1;
            if asked == 3 {
                Ok(asked)
            } else {
                Err(anyhow!("not yet"))
            }
        });
        assert_eq!(third.expect("an answer"), 3);
        let never: Result<()> = until("it", Duration::ZERO, || Err(anyhow!("no")));
        let text = format!("{:#}", never.expect_err("there is no answer"));
        assert!(
            text.starts_with("it: not within") && text.ends_with(": no"),
            "{text}"
        );
        let dead: Result<()> = until("it", Duration::from_secs(60), || {
            Err(Hopeless("it ended".to_owned()).into())
        });
        assert_eq!(format!("{:#}", dead.expect_err("it ended")), "it: it ended");
    }
}
