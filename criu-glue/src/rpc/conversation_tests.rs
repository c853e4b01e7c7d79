use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};

use super::super::client::{Patch, PatchError};
use super::super::message::{CriuNotify, CriuRequest, CriuResponse};
use super::*;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;

/// A conversation between a client and a CRIU that are both us.
struct Parties {
    conversation: Conversation,
    client: Channel,
    criu: Channel,
}

const ENOUGH: Duration = Duration::from_secs(5);

/// The client has asked for a dump with these bytes, which were passed on as they are.
async fn parties(request: &[u8]) -> Parties {
    let (ours, theirs) = ends().expect("sockets");
    let us = Peer::of(ours.as_fd()).expect("we made it");
    assert_eq!(
        getsockopt(&ours, PeerCredentials).expect("a peer").pid(),
        us.pid()
    );
    let client = Client::new(ours).expect("we are alive");
    let asks = Channel::new(theirs).expect("a socket");
    asks.send(&request.to_vec().into()).await.expect("room");
    let request = client.request(ENOUGH).await.expect("it was asked");
    let (mut conversation, theirs) = Conversation::between(client, us).expect("we are alive");
    conversation.pass(request).await.expect("room");
    let criu = Channel::new(theirs).expect("a socket");
    Parties {
        conversation,
        client: asks,
        criu,
    }
}

async fn next(conversation: &mut Conversation) -> Result<Event, TalkError> {
    let next = timeout(ENOUGH, conversation.next()).await;
    next.expect("something happens")
}

async fn heard(channel: &Channel) -> Packet {
    let heard = timeout(ENOUGH, channel.receive()).await.expect("a packet");
    heard.expect("a packet").0
}

fn notification(script: &str) -> Vec<u8> {
    let response = CriuResponse {
        kind: RequestType::Notify as i32,
        success: true,
        notify: Some(CriuNotify {
            script: Some(script.to_owned()),
            pid: None,
        }),
        ..CriuResponse::default()
    };
    response.encode_to_vec()
}

/// type 1, opts { images_dir_fd -1, notify_scripts }, and a field that nobody knows
const DUMP: [u8; 20] = [
    8, 1, 18, 13, 8, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1, 96, 1, 0xc0, 0x3e, 7,
];

#[tokio::test]
async fn descriptors_ride_with_their_packets() {
    let mut parties = parties(&DUMP).await;
    assert_eq!(heard(&parties.criu).await.bytes, DUMP);
    let file = tempfile::tempfile().expect("a file");
    let inode = |file: &File| {
        let metadata = file.metadata().expect("an open file");
        std::os::unix::fs::MetadataExt::ino(&metadata)
    };
    let expected = inode(&file);
    let packet = Packet {
        bytes: notification("orphan-pts-master"),
        descriptors: vec![file.into()],
    };
    parties.criu.send(&packet).await.expect("room");
    let event = next(&mut parties.conversation).await.expect("criu talks");
    assert!(matches!(
        event,
        Event::Notify {
            script: NotifyScript::OrphanPtsMaster,
            ..
        }
    ));
    let told = async {
        let mut told = heard(&parties.client).await;
        assert_eq!(told.bytes, packet.bytes);
        let file = File::from(told.descriptors.pop().expect("the descriptor"));
        assert_eq!((inode(&file), told.descriptors.len()), (expected, 0));
        parties
            .client
            .send(&vec![8, 6, 24, 1].into())
            .await
            .expect("room");
    };
    let (agrees, ()) = tokio::join!(parties.conversation.relay(), told);
    assert!(agrees.expect("it answers"));
    parties.conversation.answer(true).await.expect("room");
    assert_eq!(heard(&parties.criu).await.bytes, [8, 6, 24, 1]);
}

#[tokio::test]
async fn a_client_that_thinks_for_too_long_is_answered_for() {
    let mut parties = parties(&DUMP).await;
    heard(&parties.criu).await;
    parties
        .criu
        .send(&notification("post-dump").into())
        .await
        .expect("room");
    next(&mut parties.conversation).await.expect("criu talks");
    parties.conversation.client_answer_max = Duration::from_millis(10);
    let silent = parties.conversation.relay().await;
    assert!(
        matches!(silent, Err(TalkError::ClientSilent { .. })),
        "{silent:?}"
    );
    parties.conversation.answer(false).await.expect("room");
    assert_eq!(heard(&parties.criu).await.bytes, [8, 6, 24, 0]);
}

#[tokio::test]
async fn a_client_hears_that_criu_has_ended_without_a_word() {
    let mut parties = parties(&DUMP).await;
    drop(parties.criu);
    let ended = next(&mut parties.conversation).await;
    assert!(matches!(ended, Err(TalkError::Closed)), "{ended:?}");
    parties.conversation.reply().await.expect("it listens");
    let response = heard(&parties.client).await.bytes;
    let response = CriuResponse::decode(&response[..]).expect("a response");
    assert_eq!((response.kind, response.success), (1, false));
    assert!(
        response
            .cr_errmsg
            .is_some_and(|text| text.contains("without a word"))
    );
}

#[tokio::test]
async fn whoever_waits_for_one_side_hears_of_the_others_end() {
    let mut parties = parties(&DUMP).await;
    heard(&parties.criu).await;
    drop(parties.client);
    let gone = next(&mut parties.conversation).await;
    assert!(matches!(gone, Err(TalkError::ClientClosed)), "{gone:?}");
    assert!(parties.conversation.client().is_none());
    // What CRIU says from now on is for us alone.
    parties
        .criu
        .send(&notification("post-dump").into())
        .await
        .expect("room");
    next(&mut parties.conversation).await.expect("criu talks");
    assert!(
        parties
            .conversation
            .relay()
            .await
            .expect("nobody to be asked")
    );

    let mut parties = self::parties(&DUMP).await;
    heard(&parties.criu).await;
    parties
        .criu
        .send(&notification("post-dump").into())
        .await
        .expect("room");
    next(&mut parties.conversation).await.expect("criu talks");
    drop(parties.criu);
    let gone = parties.conversation.relay().await;
    assert!(matches!(gone, Err(TalkError::Closed)), "{gone:?}");
}

#[tokio::test]
async fn a_request_that_is_called_off_never_reaches_criu() {
    let (ours, theirs) = ends().expect("sockets");
    let client = Client::new(ours).expect("we are alive");
    let asks = Channel::new(theirs).expect("a socket");
    asks.send(&DUMP.to_vec().into()).await.expect("room");
    let request = client.request(ENOUGH).await.expect("it was asked");
    assert_eq!(
        request.options().map(|options| options.images_dir_fd),
        Some(-1)
    );
    client
        .call_off(&request, "not now")
        .await
        .expect("it listens");
    let response = CriuResponse::decode(&heard(&asks).await.bytes[..]).expect("a response");
    assert_eq!((response.kind, response.success), (1, false));
    assert_eq!(response.cr_errmsg.as_deref(), Some("not now"));
}

#[tokio::test]
async fn descriptors_a_client_names_are_taken_over() {
    let directory = File::open("/proc").expect("procfs");
    let number = u8::try_from(directory.as_raw_fd()).expect("a small number");
    // opts { images_dir_fd, work_dir_fd -1 }
    let mut request = vec![8, 1, 18, 16, 8, number, 0x88, 1];
    request.extend([0xff; 9]);
    request.extend([1, 8, number]);
    let (ours, theirs) = ends().expect("sockets");
    let client = Client::new(ours).expect("we are alive");
    let asks = Channel::new(theirs).expect("a socket");
    asks.send(&request.into()).await.expect("room");
    let mut request = client.request(ENOUGH).await.expect("it was asked");
    let images = File::open("/sys").expect("sysfs");
    let replaced = images.as_raw_fd();
    request
        .patch(Patch::default(), client.peer())
        .expect("both are open");
    let (packet, held) = request.into_parts();
    let changed = CriuRequest::decode(&packet.bytes[..]).expect("a request");
    let options = changed.opts.expect("options");
    assert_eq!(held.len(), 1);
    assert_eq!(options.images_dir_fd, held[0].as_raw_fd());
    assert_ne!(options.images_dir_fd, i32::from(number));
    assert_eq!(
        (options.work_dir_fd, options.notify_scripts),
        (Some(-1), Some(true))
    );
    let path = std::fs::read_link(format!("/proc/self/fd/{}", options.images_dir_fd));
    assert_eq!(path.expect("it is open").to_str(), Some("/proc"));

    let patch = Patch {
        images: Some(images.into()),
        ..Patch::default()
    };
    let mut request = ClientRequest::from_packet(packet).expect("a request");
    drop(directory);
    request
        .patch(patch, client.peer())
        .expect("it is not looked at");
    let (packet, _held) = request.into_parts();
    let changed = CriuRequest::decode(&packet.bytes[..]).expect("a request");
    assert_eq!(changed.opts.expect("options").images_dir_fd, replaced);
}

#[tokio::test]
async fn a_descriptor_that_is_not_there_is_named() {
    let (ours, theirs) = ends().expect("sockets");
    let client = Client::new(ours).expect("we are alive");
    let asks = Channel::new(theirs).expect("a socket");
    asks.send(&vec![8, 1, 18, 3, 8, 0xff, 0x7f].into())
        .await
        .expect("room");
    let mut request = client.request(ENOUGH).await.expect("it was asked");
    let missing = request.patch(Patch::default(), client.peer());
    assert!(
        matches!(
            missing,
            Err(PatchError::Descriptor {
                name: "images_dir_fd",
                number: 16383,
                ..
            })
        ),
        "{missing:?}"
    );
}
