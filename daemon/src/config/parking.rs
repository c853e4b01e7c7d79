//! How packets are kept that come for a workload that stands still, as a file and a flag say it.

use std::str::FromStr;

/// How they are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parking {
    /// As well as this node's kernel can.
    Auto,
    /// With closed bridge ports, by looking at what passes the bridge.
    Capture,
    /// Not at all: they are dropped, and a target takes none.
    Off,
}

/// A word that says nothing of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is none of auto, capture and off")]
pub struct NoParking(String);

impl FromStr for Parking {
    type Err = NoParking;

    fn from_str(text: &str) -> Result<Self, NoParking> {
        match text {
            "auto" => Ok(Self::Auto),
            "capture" => Ok(Self::Capture),
            "off" => Ok(Self::Off),
            _ => Err(NoParking(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_words_say_how() {
        for (text, parking) in [
            ("auto", Parking::Auto),
            ("capture", Parking::Capture),
            ("off", Parking::Off),
        ] {
            assert_eq!(text.parse(), Ok(parking));
        }
        let error = "on".parse::<Parking>().unwrap_err().to_string();
        assert_eq!(error, "\"on\" is none of auto, capture and off");
    }
}
