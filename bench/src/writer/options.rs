//! Arguments of the writer: `key=value` words, so that the binary needs no parser library.

use anyhow::{Context, Result, bail, ensure};

use crate::content::Content;
use crate::sys::memory::PAGE;
use crate::sys::process::Verdict;

/// What the writer does.
#[derive(Clone, Debug)]
pub struct Options {
    /// Bytes of checked memory.
    pub memory: usize,
    /// Bytes of it, from the start, that are dirtied.
    pub hot: usize,
    /// Pages dirtied per second.
    pub rate: u32,
    pub pattern: Pattern,
    pub content: Content,
    /// Pages checked per millisecond.
    pub checks: usize,
    pub case: String,
    /// A filter that treats `userfaultfd` like this.
    pub seccomp: Option<Verdict>,
}

/// Which pages of the hot set are dirtied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    Uniform,
    Sequential,
    Zipf,
}

impl Options {
    /// The writer with so much memory, a hot set of 1/8 of it, and a mild rate.
    pub fn new(memory: usize) -> Self {
        Self {
            memory,
            hot: (memory / 8).max(PAGE),
            rate: 1000,
            pattern: Pattern::Uniform,
            content: Content::Random,
            checks: 16,
            case: "none".to_owned(),
            seccomp: None,
        }
    }

    pub fn parse(arguments: &[String]) -> Result<Self> {
        let mut options = Self::new(DEFAULT_MEMORY);
        let mut hot = None;
        for argument in arguments {
            let (key, value) = argument
                .split_once('=')
                .context("arguments are key=value")?;
            match key {
                "memory" => options.memory = size(value)?,
                "hot" => hot = Some(size(value)?),
                "rate" => options.rate = value.parse().context("a rate in pages per second")?,
                "pattern" => options.pattern = Pattern::parse(value)?,
                "content" => options.content = value.parse()?,
                "checks" => options.checks = value.parse().context("pages per millisecond")?,
                "case" => value.clone_into(&mut options.case),
                "seccomp" => options.seccomp = Some(parse_verdict(value)?),
                _ => bail!("no argument is called {key:?}"),
            }
        }
        options.hot = hot.unwrap_or_else(|| Self::new(options.memory).hot);
        ensure!(
            options.hot <= options.memory,
            "the hot set is part of the memory"
        );
        Ok(options)
    }

    /// The arguments that [`Options::parse`] reads.
    pub fn arguments(&self) -> Vec<String> {
        let mut arguments = vec![
            format!("memory={}", self.memory),
            format!("hot={}", self.hot),
            format!("rate={}", self.rate),
            format!("pattern={}", self.pattern.name()),
            format!("content={}", self.content.name()),
            format!("checks={}", self.checks),
            format!("case={}", self.case),
        ];
        if let Some(verdict) = self.seccomp {
            arguments.push(format!("seccomp={}", verdict_name(verdict)));
        }
        arguments
    }
}

impl Pattern {
    fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Sequential => "sequential",
            Self::Zipf => "zipf",
        }
    }

    fn parse(text: &str) -> Result<Self> {
        let all = [Self::Uniform, Self::Sequential, Self::Zipf];
        let found = all.into_iter().find(|pattern| pattern.name() == text);
        found.with_context(|| format!("patterns are uniform, sequential or zipf, not {text:?}"))
    }
}

fn verdict_name(verdict: Verdict) -> &'static str {
    match verdict {
        Verdict::Refuse => "errno",
        Verdict::Kill => "kill",
    }
}

fn parse_verdict(text: &str) -> Result<Verdict> {
    let all = [Verdict::Refuse, Verdict::Kill];
    let found = all
        .into_iter()
        .find(|verdict| verdict_name(*verdict) == text);
    found.with_context(|| format!("a filter says errno or kill, not {text:?}"))
}

/// Bytes, with K, M or G behind the number; a multiple of the page size above 0.
fn size(text: &str) -> Result<usize> {
    let (digits, shift) = match text.strip_suffix(['K', 'M', 'G']) {
        None => (text, 0),
        Some(digits) if text.ends_with('K') => (digits, 10),
        Some(digits) if text.ends_with('M') => (digits, 20),
        Some(digits) => (digits, 30),
    };
    let number: usize = digits
        .parse()
        .with_context(|| format!("{text:?} is not a size"))?;
    let bytes = number
        .checked_shl(shift)
        .context("a size beyond this machine")?;
    ensure!(
        bytes > 0 && bytes.is_multiple_of(PAGE),
        "{text:?} is not a number of pages"
    );
    Ok(bytes)
}

const DEFAULT_MEMORY: usize = 64 << 20; // 64 MiB

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_survive_being_written_and_read() {
        let mut options = Options::new(1 << 30);
        options.pattern = Pattern::Zipf;
        options.content = Content::HalfZero;
        options.seccomp = Some(Verdict::Kill);
        let again = Options::parse(&options.arguments()).unwrap();
        assert_eq!(again.arguments(), options.arguments());
    }

    #[test]
    fn sizes_are_whole_pages() {
        assert_eq!(size("64M").unwrap(), 64 << 20);
        assert_eq!(size("8192").unwrap(), 8192);
        for wrong in ["", "0", "100", "x", "4T"] {
            assert!(size(wrong).is_err(), "{wrong:?} is no size");
        }
    }
}
