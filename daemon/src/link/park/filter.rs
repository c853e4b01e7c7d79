//! A program at a port of a bridge that diverts what would go to the workload, and drops what would
//! come from it.
//!
//! It is attached by the classifier `bpf` of traffic control, not by TCX: it stays when the daemon
//! that attached it dies. What it diverted to is gone then, so that nothing passes, until another
//! daemon lets it pass ([`detach`]) or deletes the port.
//!
//! Invariants: filters of others stay, and are asked behind it; its handle is ours.

use futures_util::StreamExt;
use pageferry_sys::divert::Divert;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{
    TcAttribute, TcBpfFlags, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
};

use std::os::fd::{AsFd, AsRawFd};

use super::failed as io_failed;
use crate::link::LinkError;
use crate::link::netlink::{Netlink, failed};
use crate::link::port::{Port, unless};

/// The programs of one port: everything passes at the beginning.
#[derive(Debug)]
pub(super) struct Filter {
    to_workload: Divert,
    from_workload: Divert,
    /// Where to what would go to the workload is diverted.
    tap: u32,
}

impl Filter {
    /// Attaches them.
    pub(super) async fn attach(node: &Netlink, port: &Port, tap: u32) -> Result<Self, LinkError> {
        let filter = Self {
            to_workload: Divert::load().map_err(io_failed)?,
            from_workload: Divert::load().map_err(io_failed)?,
            tap,
        };
        let mut place = message(port, TcHandle::CLSACT);
        place.header.handle = TcHandle::from(PLACE);
        place.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
        let place = RouteNetlinkMessage::NewQueueDiscipline(place);
        let made = ask(node, place, NLM_F_CREATE | NLM_F_EXCL).await;
        unless(&[libc::EEXIST], made).map_err(failed("making a place for", port.name()))?;
        let programs = [(TO, &filter.to_workload), (FROM, &filter.from_workload)];
        for (parent, program) in programs {
            let number = program.as_fd().as_raw_fd();
            let number = u32::try_from(number).map_err(|e| io_failed(std::io::Error::other(e)))?;
            let mut attached = ours(port, parent);
            let options = [
                TcFilterBpfOption::ProgFd(number),
                TcFilterBpfOption::ProgName("pageferry".to_owned()),
                TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
            ];
            let options = options.into_iter().map(TcOption::Bpf).collect();
            attached.attributes.push(TcAttribute::Options(options));
            // One that a dead daemon has left is replaced.
            let attached = RouteNetlinkMessage::NewTrafficFilter(attached);
            let attached = ask(node, attached, NLM_F_CREATE).await;
            attached.map_err(failed("attaching a program to", port.name()))?;
        }
        Ok(filter)
    }

    /// From here on what would go to the workload is diverted.
    pub(super) fn park(&self) -> Result<(), LinkError> {
        self.to_workload.divert_to(self.tap).map_err(io_failed)
    }

    /// From here on nothing comes from the workload.
    pub(super) fn shut(&self) -> Result<(), LinkError> {
        self.from_workload.drop_all().map_err(io_failed)
    }

    /// From here on what comes from the workload passes.
    pub(super) fn let_speak(&self) -> Result<(), LinkError> {
        self.from_workload.pass().map_err(io_failed)
    }

    /// From here on what goes to the workload passes, too.
    pub(super) fn pass(&self) -> Result<(), LinkError> {
        self.to_workload.pass().map_err(io_failed)
    }
}

/// Takes the programs off a port, if it has any. Nobody else's place is taken away with them.
pub(super) async fn detach(node: &Netlink, port: &Port) -> Result<(), LinkError> {
    for parent in [FROM, TO] {
        let gone = RouteNetlinkMessage::DelTrafficFilter(ours(port, parent));
        let gone = ask(node, gone, 0).await;
        // Without a link, a place, or one of ours.
        let gone = unless(&[libc::ENODEV, libc::EINVAL, libc::ENOENT], gone);
        gone.map_err(failed("taking a program off", port.name()))?;
    }
    Ok(())
}

fn message(port: &Port, parent: TcHandle) -> TcMessage {
    let index = i32::try_from(port.ends().0).unwrap_or(i32::MAX);
    let mut message = TcMessage::with_index(index);
    message.header.parent = parent;
    message
}

/// Names our filter.
fn ours(port: &Port, parent: TcHandle) -> TcMessage {
    let mut message = message(port, parent);
    message.header.handle = TcHandle::from(HANDLE);
    message.header.info = FIRST << 16 | u32::from(ALL.to_be());
    message.attributes = vec![TcAttribute::Kind("bpf".to_owned())];
    message
}

async fn ask(
    node: &Netlink,
    message: RouteNetlinkMessage,
    flags: u16,
) -> Result<(), rtnetlink::Error> {
    let mut request = NetlinkMessage::from(message);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut answers = node.handle().clone().request(request)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && error.code.is_some()
        {
            return Err(rtnetlink::Error::NetlinkError(error));
        }
    }
    Ok(())
}

/// What leaves by a port goes to the workload, what comes in by it is from there.
const TO: TcHandle = TcHandle {
    major: u16::MAX,
    minor: TcHandle::MIN_EGRESS,
};
const FROM: TcHandle = TcHandle {
    major: u16::MAX,
    minor: TcHandle::MIN_INGRESS,
};
/// `TC_H_MAKE(TC_H_CLSACT, 0)`.
const PLACE: u32 = 0xffff_0000;
/// Its number among those that are asked first.
const HANDLE: u32 = 0x7066;
const FIRST: u32 = 1;
/// `ETH_P_ALL`.
const ALL: u16 = 3;
