//! What a workload needs of its target besides files and network: memory, and the limits that it
//! had at the source and keeps.

use crate::wire::control::{ControlError, missing};
use crate::wire::schema;

/// Shortest and longest period of a limit of processor time, in microseconds: the kernel's.
pub const CPU_PERIOD_US_MIN: u64 = 1_000;
/// The longest.
pub const CPU_PERIOD_US_MAX: u64 = 1_000_000;
/// Largest weight of processor time: the kernel's, for cgroups of version 2.
pub const CPU_WEIGHT_MAX: u32 = 10_000;

/// What a workload needs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Memory that each process has for itself, resident or swapped out, in bytes: what is
    /// anonymous, and its own copies of a file's pages.
    pub private_bytes: u64,
    /// Shared memory that is in no lasting file, in bytes, each object once.
    pub shared_bytes: u64,
    /// The limits it has.
    pub limits: ResourceLimits,
}

/// Limits of a workload, as cgroups of version 2 express them: the strictest of its own cgroup and
/// those above it. What is none is not limited.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResourceLimits {
    /// Most memory, in bytes.
    pub memory_max: Option<u64>,
    /// Memory from which on it is slowed down, in bytes.
    pub memory_high: Option<u64>,
    /// Most swap, in bytes.
    pub swap_max: Option<u64>,
    /// Most processor time.
    pub cpu_max: Option<CpuMax>,
    /// Its weight against others, 1 to 10 000; usual is 100. Of its own cgroup alone.
    pub cpu_weight: Option<u32>,
    /// Most processes and threads.
    pub pids_max: Option<u64>,
}

/// A limit of processor time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuMax {
    /// Time that may be used in each period, on all processors together, in microseconds.
    pub quota_us: u64,
    /// The period, in microseconds.
    pub period_us: u64,
}

impl From<&Needs> for schema::Needs {
    fn from(needs: &Needs) -> Self {
        let limits = needs.limits;
        Self {
            private_bytes: needs.private_bytes,
            shared_bytes: needs.shared_bytes,
            memory_max: limits.memory_max,
            memory_high: limits.memory_high,
            swap_max: limits.swap_max,
            cpu_quota_us: limits.cpu_max.map_or(0, |max| max.quota_us),
            cpu_period_us: limits.cpu_max.map_or(0, |max| max.period_us),
            cpu_weight: limits.cpu_weight.unwrap_or_default(),
            pids_max: limits.pids_max,
        }
    }
}

impl TryFrom<Option<schema::Needs>> for Needs {
    type Error = ControlError;

    fn try_from(wire: Option<schema::Needs>) -> Result<Self, ControlError> {
        let wire = wire.ok_or(missing("description.needs"))?;
        let invalid = |field, value: u64| ControlError::Invalid {
            field,
            value: i64::try_from(value).unwrap_or(i64::MAX),
        };
        let cpu_max = match (wire.cpu_quota_us, wire.cpu_period_us) {
            (0, 0) => None,
            (0, _) => return Err(invalid("needs.cpu_quota_us", 0)),
            (quota_us, period_us) => {
                if !(CPU_PERIOD_US_MIN..=CPU_PERIOD_US_MAX).contains(&period_us) {
                    return Err(invalid("needs.cpu_period_us", period_us));
                }
                Some(CpuMax {
                    quota_us,
                    period_us,
                })
            }
        };
        if CPU_WEIGHT_MAX < wire.cpu_weight {
            return Err(invalid("needs.cpu_weight", wire.cpu_weight.into()));
        }
        Ok(Self {
            private_bytes: wire.private_bytes,
            shared_bytes: wire.shared_bytes,
            limits: ResourceLimits {
                memory_max: wire.memory_max,
                memory_high: wire.memory_high,
                swap_max: wire.swap_max,
                cpu_max,
                cpu_weight: Some(wire.cpu_weight).filter(|weight| *weight != 0),
                pids_max: wire.pids_max,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(needs: Needs) {
        assert_eq!(
            Needs::try_from(Some(schema::Needs::from(&needs))),
            Ok(needs)
        );
    }

    #[test]
    fn a_limit_of_zero_is_not_the_same_as_none() {
        check(Needs::default());
        check(Needs {
            private_bytes: 1,
            shared_bytes: u64::MAX,
            limits: ResourceLimits {
                memory_max: Some(u64::MAX),
                memory_high: Some(0),
                swap_max: Some(0),
                cpu_max: Some(CpuMax {
                    quota_us: 50_000,
                    period_us: 100_000,
                }),
                cpu_weight: Some(1),
                pids_max: Some(0),
            },
        });
    }

    // clause: N-4
    #[test]
    fn needs_that_no_kernel_has_are_refused() {
        let good = schema::Needs {
            cpu_quota_us: 1,
            cpu_period_us: CPU_PERIOD_US_MAX,
            cpu_weight: CPU_WEIGHT_MAX,
            ..schema::Needs::default()
        };
        assert!(Needs::try_from(Some(good)).is_ok());
        let bad = [
            schema::Needs {
                cpu_quota_us: 0,
                ..good
            },
            schema::Needs {
                cpu_period_us: 0,
                ..good
            },
            schema::Needs {
                cpu_period_us: CPU_PERIOD_US_MAX + 1,
                ..good
            },
            schema::Needs {
                cpu_weight: CPU_WEIGHT_MAX + 1,
                ..good
            },
        ];
        for needs in bad {
            let refused = Needs::try_from(Some(needs));
            assert!(matches!(refused, Err(ControlError::Invalid { .. })));
        }
        let absent = Needs::try_from(None);
        assert!(
            matches!(absent, Err(ControlError::Missing { .. })),
            "{absent:?}"
        );
    }
}
