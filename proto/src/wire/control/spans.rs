//! What a target has measured, in the schema's form.

use super::{ControlError, short};
use crate::migration::timeline::{
    Asked, BOOT_BYTES_MAX, EXCHANGES_MAX, Exchange, SPANS_MAX, Span, Spans, TEXT_BYTES_MAX,
};
use crate::wire::schema;

impl From<&Spans> for schema::Spans {
    fn from(spans: &Spans) -> Self {
        let span = |span: &Span| schema::Span {
            name: span.name.clone(),
            detail: span.detail.clone(),
            begin: span.begin,
            end: span.end,
        };
        Self {
            boot: spans.boot.clone(),
            spans: spans.spans.iter().map(span).collect(),
            exchanges: spans.exchanges.iter().map(exchange).collect(),
            dropped: spans.dropped,
            last: spans.last,
        }
    }
}

fn exchange(exchange: &Exchange) -> schema::Exchange {
    let (what, number) = match exchange.asked {
        Asked::Offer => (1, 0),
        Asked::Round(number) => (2, number),
        Asked::Final(number) => (3, number),
        Asked::Go(number) => (4, number),
    };
    schema::Exchange {
        what,
        number,
        heard: exchange.heard,
        said: exchange.said,
    }
}

impl TryFrom<schema::Spans> for Spans {
    type Error = ControlError;

    fn try_from(wire: schema::Spans) -> Result<Self, ControlError> {
        short("spans.boot", wire.boot.len(), BOOT_BYTES_MAX)?;
        short("spans.spans", wire.spans.len(), SPANS_MAX)?;
        short("spans.exchanges", wire.exchanges.len(), EXCHANGES_MAX)?;
        printable("spans.boot", &wire.boot)?;
        let spans = wire.spans.into_iter().map(Span::try_from);
        let exchanges = wire.exchanges.into_iter().map(Exchange::try_from);
        Ok(Self {
            boot: wire.boot,
            spans: spans.collect::<Result<_, _>>()?,
            exchanges: exchanges.collect::<Result<_, _>>()?,
            dropped: wire.dropped,
            last: wire.last,
        })
    }
}

impl TryFrom<schema::Span> for Span {
    type Error = ControlError;

    fn try_from(wire: schema::Span) -> Result<Self, ControlError> {
        short("span.name", wire.name.len(), TEXT_BYTES_MAX)?;
        short("span.detail", wire.detail.len(), TEXT_BYTES_MAX)?;
        let is_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
        let odd = wire.name.bytes().find(|byte| !is_name(*byte));
        if odd.is_some() || wire.name.is_empty() {
            return Err(invalid("span.name", odd.unwrap_or(0)));
        }
        printable("span.detail", &wire.detail)?;
        if wire.end < wire.begin {
            return Err(invalid("span.end", 0));
        }
        Ok(Self {
            name: wire.name,
            detail: wire.detail,
            begin: wire.begin,
            end: wire.end,
        })
    }
}

impl TryFrom<schema::Exchange> for Exchange {
    type Error = ControlError;

    fn try_from(wire: schema::Exchange) -> Result<Self, ControlError> {
        let asked = match wire.what {
            1 => Asked::Offer,
            2 => Asked::Round(wire.number),
            3 => Asked::Final(wire.number),
            4 => Asked::Go(wire.number),
            other => {
                return Err(ControlError::Invalid {
                    field: "exchange.what",
                    value: other.into(),
                });
            }
        };
        Ok(Self {
            asked,
            heard: wire.heard,
            said: wire.said,
        })
    }
}

/// It is shown to people, whose terminals obey what is not.
fn printable(field: &'static str, text: &str) -> Result<(), ControlError> {
    let odd = text.bytes().find(|byte| !(b' '..=b'~').contains(byte));
    odd.map_or(Ok(()), |odd| Err(invalid(field, odd)))
}

fn invalid(field: &'static str, value: u8) -> ControlError {
    ControlError::Invalid {
        field,
        value: value.into(),
    }
}
