//! Durations and sizes as people write them, in files, flags and output: `300ms`, `1h30m`,
//! `64MiB`.
//!
//! A unit is always written: `300` is neither. What is printed can be read back.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

/// A span of time, written as whole numbers with units: `us`, `ms`, `s`, `m`, `h`, `d`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span(pub Duration);

/// A number of bytes, written as a whole number with a unit: `B`, `KiB`, `MiB`, `GiB`, `TiB`, or
/// `kB`, `MB`, `GB`, `TB` for powers of ten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Bytes(pub u64);

/// Why a text is not a duration or a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// A number without a unit.
    #[error("{text:?} has no unit: write it like {example}")]
    NoUnit {
        /// The text.
        text: String,
        /// How such a value is written.
        example: &'static str,
    },
    /// Neither a number nor a known unit.
    #[error("{text:?} is not written like {example}")]
    Form {
        /// The text.
        text: String,
        /// How such a value is written.
        example: &'static str,
    },
    /// More than 64 bits hold.
    #[error("{text:?} is too large")]
    TooLarge {
        /// The text.
        text: String,
    },
}

impl FromStr for Span {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let micros = sum_of_terms(text, &SPAN_UNITS, SPAN_EXAMPLE)?;
        Ok(Self(Duration::from_micros(micros)))
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut left = u64::try_from(self.0.as_micros()).unwrap_or(u64::MAX);
        if left == 0 {
            return f.write_str("0s");
        }
        for (name, micros) in SPAN_UNITS.into_iter().rev() {
            if left >= micros {
                write!(f, "{}{name}", left / micros)?;
                left %= micros;
            }
        }
        Ok(())
    }
}

impl FromStr for Bytes {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        sum_of_terms(text, &BYTE_UNITS, BYTES_EXAMPLE).map(Self)
    }
}

impl fmt::Display for Bytes {
    /// Exact: the largest binary unit that leaves no remainder.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = |&(_, unit): &(&str, u64)| self.0 >= unit && self.0.is_multiple_of(unit);
        match BINARY_UNITS.into_iter().rev().find(whole) {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl Bytes {
    /// Rounded for people: three digits and a binary unit, such as `1.50 GiB`.
    pub fn rounded(self) -> String {
        let Some((name, unit)) = BINARY_UNITS
            .into_iter()
            .rev()
            .find(|&(_, unit)| self.0 >= unit)
        else {
            return format!("{} B", self.0);
        };
        // Precise enough: three digits are shown.
        let value = self.0 as f64 / unit as f64;
        let decimals = match value {
            ..10.0 => 2,
            10.0..100.0 => 1,
            _ => 0,
        };
        format!("{value:.decimals$} {name}")
    }
}

impl Span {
    /// Rounded for people: three digits and one unit, such as `12.3 ms` or `1.50 s`.
    pub fn rounded(self) -> String {
        let seconds = self.0.as_secs_f64();
        match seconds {
            ..1e-3 => format!("{:.0} us", seconds * 1e6),
            1e-3..1.0 => format!("{:.1} ms", seconds * 1e3),
            1.0..120.0 => format!("{seconds:.2} s"),
            _ => Self(Duration::from_secs(self.0.as_secs())).to_string(),
        }
    }
}

/// `1h30m` is the sum of `1h` and `30m`, each a whole number and a unit.
fn sum_of_terms(
    text: &str,
    units: &[(&'static str, u64)],
    example: &'static str,
) -> Result<u64, UnitError> {
    let malformed = || UnitError::Form {
        text: text.to_owned(),
        example,
    };
    let too_large = || UnitError::TooLarge {
        text: text.to_owned(),
    };
    let mut rest = text;
    let mut sum = 0u64;
    loop {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        if number.is_empty() {
            return Err(malformed());
        }
        let letters = after.bytes().take_while(|byte| !byte.is_ascii_digit());
        let (name, after) = after.split_at(letters.count());
        if name.is_empty() {
            return Err(UnitError::NoUnit {
                text: text.to_owned(),
                example,
            });
        }
        let known = units.iter().find(|(unit, _)| *unit == name);
        let &(_, unit) = known.ok_or_else(malformed)?;
        let number: u64 = number.parse().map_err(|_| too_large())?;
        let term = number.checked_mul(unit).ok_or_else(too_large)?;
        sum = sum.checked_add(term).ok_or_else(too_large)?;
        if after.is_empty() {
            return Ok(sum);
        }
        rest = after;
    }
}

const SPAN_EXAMPLE: &str = "300ms, 10s or 1h30m";
const BYTES_EXAMPLE: &str = "4096B, 64MiB or 1GiB";

/// In microseconds, from small to large.
const SPAN_UNITS: [(&str, u64); 6] = [
    ("us", 1),
    ("ms", 1_000),
    ("s", 1_000_000),
    ("m", 60_000_000),
    ("h", 3_600_000_000),
    ("d", 86_400_000_000),
];

const BINARY_UNITS: [(&str, u64); 4] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
];

const BYTE_UNITS: [(&str, u64); 9] = [
    ("B", 1),
    BINARY_UNITS[0],
    BINARY_UNITS[1],
    BINARY_UNITS[2],
    BINARY_UNITS[3],
    ("kB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn span(text: &str) -> Result<Duration, String> {
        text.parse()
            .map(|Span(duration)| duration)
            .map_err(|error: UnitError| error.to_string())
    }

    fn bytes(text: &str) -> Result<u64, String> {
        text.parse()
            .map(|Bytes(count)| count)
            .map_err(|error: UnitError| error.to_string())
    }

    #[test]
    fn durations_are_numbers_with_units() {
        assert_eq!(span("300ms"), Ok(Duration::from_millis(300)));
        assert_eq!(span("1h30m"), Ok(Duration::from_secs(5400)));
        assert_eq!(span("0s"), Ok(Duration::ZERO));
        assert_eq!(
            span("300").unwrap_err(),
            r#""300" has no unit: write it like 300ms, 10s or 1h30m"#
        );
        for text in ["", "ms", "-1s", "1 s", "1.5s", "1sec", "1s2"] {
            span(text).unwrap_err();
        }
        assert_eq!(
            span("99999999999d").unwrap_err(),
            r#""99999999999d" is too large"#
        );
    }

    #[test]
    fn sizes_are_numbers_with_units() {
        assert_eq!(bytes("64MiB"), Ok(64 << 20));
        assert_eq!(bytes("1GB"), Ok(1_000_000_000));
        for text in ["", "64", "64M", "64mib", "1.5GiB", "99999999TiB"] {
            bytes(text).unwrap_err();
        }
    }

    #[test]
    fn people_read_three_digits() {
        assert_eq!(Bytes(0).rounded(), "0 B");
        assert_eq!(Bytes(1536 << 20).rounded(), "1.50 GiB");
        assert_eq!(Bytes(700 << 10).rounded(), "700 KiB");
        assert_eq!(Span(Duration::from_micros(12_345)).rounded(), "12.3 ms");
        assert_eq!(Span(Duration::from_secs(3_700)).rounded(), "1h1m40s");
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(micros in any::<u64>(), count in any::<u64>()) {
            let duration = Duration::from_micros(micros);
            prop_assert_eq!(span(&Span(duration).to_string()), Ok(duration));
            prop_assert_eq!(bytes(&Bytes(count).to_string()), Ok(count));
        }
    }
}
