//! The address of a pod that moves: the node's program for addresses is told where it is.
//!
//! At the target it is told before the pod is made that one of that name has to wait, and then of
//! its UID, with which it gets the address; at the source it is told before the pod may leave: the
//! range there does not give the address to another one.

use std::net::Ipv4Addr;

use pageferry_ipam::{Away, Expected, Folders, StoreError};

use crate::plan::{Record, Side, Step};

/// A move, as far as its address goes.
pub(super) struct Place<'a> {
    pub side: Side,
    pub namespace: &'a str,
    /// The UID of the pod that it was.
    pub old_uid: &'a str,
    pub record: &'a Record,
    /// The daemons' id of it.
    pub id: &'a str,
    /// The source goes on: its daemon says so.
    pub given_back: bool,
}

impl Place<'_> {
    /// Writes down what holds at this step, as often as it is looked at. Returns the name of the
    /// pod for which there is an address here.
    pub fn settle(&self, folders: &Folders) -> Result<Option<String>, StoreError> {
        // It is in the cluster no more, and no kubelet starts it again: the daemon had it marked.
        let gone = self.record.step == Step::Cleaning && self.record.new_name.is_some();
        if self.side == Side::Source && gone {
            folders.stay(self.old_uid)?;
        }
        let address = self.record.address.as_deref();
        // Others than these the program does not keep, and no pod is expected with one.
        let Some(address) = address.and_then(|text| text.parse::<Ipv4Addr>().ok()) else {
            return Ok(self.record.new_name.clone());
        };
        match self.side {
            Side::Source => self.at_source(folders, address).map(|()| None),
            Side::Target => self.at_target(folders, address),
        }
    }

    fn at_source(&self, folders: &Folders, address: Ipv4Addr) -> Result<(), StoreError> {
        // Also one that came: the node's route to it stays for as long as it is away.
        match self.record.step {
            Step::Moving if !folders.is_away(address)? => {
                let migration = self.id.to_owned();
                folders.away(address, &Away { migration })
            }
            Step::Aborting | Step::Ended if self.given_back => folders.returned(address).map(drop),
            _ => Ok(()),
        }
    }

    fn at_target(
        &self,
        folders: &Folders,
        address: Ipv4Addr,
    ) -> Result<Option<String>, StoreError> {
        let Some(name) = &self.record.new_name else {
            return Ok(None);
        };
        match self.record.step {
            Step::Placing => {
                let expected = Expected {
                    address,
                    gateway: None,
                    // Written again when there is the pod: until then none of its name has one.
                    uid: self.record.new_uid.clone(),
                    migration: self.id.to_owned(),
                };
                if folders.expected(self.namespace, name)?.as_ref() != Some(&expected) {
                    folders.expect(self.namespace, name, &expected)?;
                }
                Ok(Some(name.clone()))
            }
            Step::Moving => Ok(Some(name.clone())),
            // It has its sandbox. Another one, after a reboot, has an address of the range here.
            Step::Switching | Step::Cleaning => {
                folders.unexpect(self.namespace, name)?;
                folders.returned(address)?;
                Ok(None)
            }
            Step::Aborting | Step::Ended => folders.unexpect(self.namespace, name).map(|_| None),
            Step::Waiting | Step::Copying => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use pageferry_ipam::Left;

    use super::*;

    fn record(step: Step) -> Record {
        Record {
            step,
            address: Some("10.1.2.3".to_owned()),
            new_name: Some("web-m1".to_owned()),
            ..Record::default()
        }
    }

    #[test]
    fn an_address_is_where_its_pod_is() {
        let folder = tempfile::tempdir().expect("a folder");
        let folders = Folders::new(folder.path().join("run"), folder.path().join("state"));
        let settle = |side, step, given_back| {
            let place = Place {
                side,
                namespace: "default",
                old_uid: "old",
                record: &record(step),
                id: "id",
                given_back,
            };
            place.settle(&folders).expect("folders")
        };
        let address = Ipv4Addr::new(10, 1, 2, 3);
        let expected = || {
            folders
                .expected("default", "web-m1")
                .expect("folders")
                .is_some()
        };
        let away = || folders.is_away(address).expect("folders");
        assert_eq!(settle(Side::Target, Step::Copying, false), None);
        let prepared = settle(Side::Target, Step::Placing, false);
        assert_eq!((prepared.as_deref(), expected()), (Some("web-m1"), true));
        let uid = || {
            let expected = folders.expected("default", "web-m1").expect("folders");
            expected.expect("it is expected").uid
        };
        assert_eq!(uid(), None);
        let made = Record {
            new_uid: Some("new".to_owned()),
            ..record(Step::Placing)
        };
        let place = Place {
            side: Side::Target,
            namespace: "default",
            old_uid: "old",
            record: &made,
            id: "id",
            given_back: false,
        };
        place.settle(&folders).expect("folders");
        assert_eq!(uid().as_deref(), Some("new"));
        settle(Side::Source, Step::Placing, false);
        assert!(!away());
        settle(Side::Source, Step::Moving, false);
        assert!(away());
        let left = || folders.left("old").expect("folders").is_some();
        folders.leave("old", &Left::default()).expect("folders");
        settle(Side::Source, Step::Switching, false);
        settle(Side::Target, Step::Cleaning, false);
        assert!(left());
        settle(Side::Source, Step::Cleaning, false);
        assert!(!left());
        // A target gives it back; here both sides are one node.
        assert!(!away());
        settle(Side::Source, Step::Moving, false);
        // Not before it is known how it ended.
        settle(Side::Source, Step::Aborting, false);
        assert!(away());
        settle(Side::Source, Step::Aborting, true);
        assert!(!away());
        settle(Side::Target, Step::Aborting, false);
        assert!(!expected());
    }
}
