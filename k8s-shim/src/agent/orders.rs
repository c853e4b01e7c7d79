//! What to ask a daemon for: pure.

use crate::plan::{Side, Step};

/// What the controller has written down, as far as it concerns a side.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    pub step: Step,
    pub proceed: bool,
    pub fenced: Option<Side>,
    pub new_uid: Option<String>,
}

/// What the daemon has of the migration.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Known {
    pub is_final: bool,
    /// It has not frozen anything yet, and goes on when it is told.
    pub copying: bool,
    /// It has not yet been told to restore: which pod is to become it can be said.
    pub receiving: bool,
    pub fence_wanted: bool,
    /// The target was told of this pod.
    pub expected: Option<String>,
    /// It was refused by name before it began.
    pub refused: bool,
}

/// A call of the daemon's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Migrate,
    Expect {
        pod_uid: String,
    },
    Proceed,
    Abort,
    /// The other side is dead.
    Resolve,
}

impl Call {
    /// What it is called among metrics.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Migrate => "migrate",
            Self::Expect { .. } => "expect",
            Self::Proceed => "proceed",
            Self::Abort => "abort",
            Self::Resolve => "resolve",
        }
    }
}

/// The next call, if there is one to make. `known` is none where the daemon has no such migration.
pub fn next(side: Side, orders: &Orders, known: Option<&Known>) -> Option<Call> {
    if known.is_some_and(|known| known.is_final || known.refused) {
        return None;
    }
    let other = match side {
        Side::Source => Side::Target,
        Side::Target => Side::Source,
    };
    if let Some(known) = known {
        let deciding = matches!(orders.step, Step::Moving | Step::Aborting);
        if known.fence_wanted && deciding && orders.fenced == Some(other) {
            return Some(Call::Resolve);
        }
        // One that has ended without this daemon having heard of it ends here too.
        let given_up = orders.step == Step::Aborting || orders.step == Step::Ended;
        if given_up {
            return Some(Call::Abort);
        }
    }
    match (side, orders.step, known) {
        // Never after the word: what a daemon has forgotten does not begin anew.
        (Side::Source, Step::Copying | Step::Placing, None) if !orders.proceed => {
            Some(Call::Migrate)
        }
        (Side::Source, Step::Moving, Some(known)) if orders.proceed && known.copying => {
            Some(Call::Proceed)
        }
        (Side::Target, Step::Placing | Step::Moving, Some(known)) if known.receiving => {
            let uid = orders.new_uid.as_ref()?;
            let told = known.expected.as_ref() == Some(uid);
            (!told).then(|| Call::Expect {
                pod_uid: uid.clone(),
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn orders(step: Step) -> Orders {
        Orders {
            step,
            proceed: matches!(step, Step::Moving),
            fenced: None,
            new_uid: Some("new".to_owned()),
        }
    }

    #[test]
    fn a_source_is_told_step_by_step() {
        let next = |step, known: Option<&Known>| next(Side::Source, &orders(step), known);
        let copying = Known {
            copying: true,
            ..Known::default()
        };
        assert_eq!(next(Step::Waiting, None), None);
        assert_eq!(next(Step::Copying, None), Some(Call::Migrate));
        assert_eq!(next(Step::Placing, Some(&copying)), None);
        assert_eq!(next(Step::Moving, Some(&copying)), Some(Call::Proceed));
        // What it has forgotten after the word is not begun anew.
        assert_eq!(next(Step::Moving, None), None);
        assert_eq!(next(Step::Aborting, Some(&copying)), Some(Call::Abort));
        assert_eq!(next(Step::Aborting, None), None);
    }

    #[test]
    fn a_target_is_told_of_one_pod() {
        let mut known = Known {
            receiving: true,
            ..Known::default()
        };
        let orders = orders(Step::Placing);
        let call = next(Side::Target, &orders, Some(&known));
        let pod_uid = "new".to_owned();
        assert_eq!(call, Some(Call::Expect { pod_uid }));
        known.expected = Some("new".to_owned());
        assert_eq!(next(Side::Target, &orders, Some(&known)), None);
        assert_eq!(next(Side::Target, &orders, None), None);
        // An agent that was started anew has forgotten it, and a daemon that restores takes none.
        known.expected = None;
        known.receiving = false;
        assert_eq!(next(Side::Target, &orders, Some(&known)), None);
    }

    #[test]
    fn only_who_is_asked_to_declares_the_other_dead() {
        let mut orders = orders(Step::Moving);
        let known = Known {
            fence_wanted: true,
            ..Known::default()
        };
        orders.fenced = Some(Side::Source);
        assert_eq!(next(Side::Source, &orders, Some(&known)), None);
        orders.fenced = Some(Side::Target);
        assert_eq!(
            next(Side::Source, &orders, Some(&known)),
            Some(Call::Resolve)
        );
        // What has been taken over stays so.
        orders.step = Step::Switching;
        assert_eq!(next(Side::Source, &orders, Some(&known)), None);
    }
}
