use super::*;

/// What runc 1.3.6 sent for `runc checkpoint --tcp-established` of a container without a network
/// namespace of its own. Most of it are mounts (`ext_mnt`), which [`CriuOpts`] does not know.
const RECORDED: &[u8] = include_bytes!("recorded/runc-1.3.6-dump");

/// A field that no version of CRIU has: number 1000, "new!".
const UNKNOWN: [u8; 7] = [0xc2, 0x3e, 4, b'n', b'e', b'w', b'!'];

/// A message as field `key` of another.
fn wrapped(key: u8, message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).expect("a short message");
    assert!((0x80..0x4000).contains(&length));
    let length = [length as u8 | 0x80, (length >> 7) as u8];
    [&[key][..], &length, message].concat()
}

/// `type: DUMP`, these options, and a field that nobody knows.
fn request(options: &[u8]) -> Vec<u8> {
    [&[8, 1][..], &wrapped(18, options), &UNKNOWN].concat()
}

fn us() -> Peer {
    let (ours, _theirs) = nix::sys::socket::socketpair(
        nix::sys::socket::AddressFamily::Unix,
        nix::sys::socket::SockType::SeqPacket,
        None,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
    )
    .expect("sockets");
    Peer::of(std::os::fd::AsFd::as_fd(&ours)).expect("we made it")
}

#[test]
fn a_recorded_request_keeps_all_that_is_not_patched() {
    // The options are all of it but the type and their own key and length.
    let options = &RECORDED[5..];
    assert_eq!(RECORDED, [&[8, 1][..], &wrapped(18, options)].concat());
    // images_dir_fd, work_dir_fd, notify_scripts, manage_cgroups_mode, freeze_cgroup, lazy_pages,
    // and at the end config_file
    for (at, bytes) in [
        (0, &[8, 6][..]),
        (26, &[0x60, 1]),
        (42, &[0x88, 1, 8]),
        (704, &[0x90, 2, 6]),
        (714, &[0xe2, 2, 32]),
        (752, &[0x80, 3, 0]),
        (758, &[0x9a, 3, 19]),
    ] {
        assert_eq!(&options[at..at + bytes.len()], bytes, "at {at}");
    }
    // With what nobody knows in the middle and at the end.
    let asked = [&options[..14], &UNKNOWN, &options[14..], &UNKNOWN].concat();
    let packet = Packet::from(request(&asked));
    let mut asked = ClientRequest::from_packet(packet).expect("a request");
    assert_eq!((asked.kind(), asked.wants_notifications()), (1, true));
    assert_eq!(asked.options().and_then(|options| options.pid), Some(72));

    let open = || OwnedFd::from(std::fs::File::open("/").expect("the root directory"));
    let (images, work) = (open(), open());
    let number = |fd: &OwnedFd| u8::try_from(fd.as_raw_fd()).expect("a small number");
    let (at_images, at_work) = (number(&images), number(&work));
    let patch = Patch {
        images: Some(images),
        work: Some(work),
        network_lock: Some(NetworkLock::Skip),
        manage_cgroups: Some(ManageCgroups::Ignore),
        freeze_cgroup: Some("/cg".to_owned()),
        lazy_pages: Some(true),
        external: vec!["x".to_owned()],
        untold: true,
        ..Patch::default()
    };
    asked.patch(patch, &us()).expect("a request");
    assert!(!asked.wants_notifications());
    let kept = [
        &options[2..14],
        &UNKNOWN,
        &options[14..26],
        &options[28..42],
        &options[45..704],
        &options[707..714],
        &options[749..752],
        &options[755..758],
        &UNKNOWN,
    ];
    let added: [&[u8]; 9] = [
        &[0x90, 2, 0],
        &[0x80, 3, 1],
        &[0x80, 4, 3],
        &[0xe2, 2, 3, b'/', b'c', b'g'],
        &[0xaa, 2, 1, b'x'],
        &[0x60, 1],
        b"\x9a\x03\x09/dev/null",
        &[8, at_images],
        &[0x88, 1, at_work],
    ];
    let expected = request(&[kept.concat(), added.concat()].concat());
    let (packet, held) = asked.into_parts();
    assert_eq!(packet.bytes, expected);
    assert_eq!(held.len(), 2);
}

#[test]
fn a_request_without_options_is_not_patched() {
    let version = ClientRequest::from_packet(vec![8, 10].into());
    let mut version = version.expect("a request");
    let patched = version.patch(Patch::default(), &us());
    assert!(matches!(patched, Err(PatchError::NoOptions)));
    assert_eq!(version.into_parts().0.bytes, [8, 10]);
}

#[test]
fn each_field_of_a_patch_is_the_one_of_its_name() {
    let asked = CriuRequest {
        kind: 1,
        opts: Some(CriuOpts {
            images_dir_fd: -1,
            tcp_established: Some(false),
            log_level: Some(4),
            ..CriuOpts::default()
        }),
        ..CriuRequest::default()
    };
    let mut asked = ClientRequest::from_packet(asked.encode_to_vec().into()).expect("a request");
    let patch = Patch {
        tcp_established: Some(true),
        file_locks: Some(true),
        link_remap: Some(true),
        log_level: Some(LogLevel::Warning),
        ghost_limit: Some(7),
        freeze_timeout: Some(3),
        ..Patch::default()
    };
    asked.patch(patch, &us()).expect("a request");
    let patched = CriuRequest::decode(&asked.into_parts().0.bytes[..]).expect("a request");
    let expected = CriuOpts {
        images_dir_fd: -1,
        notify_scripts: Some(true),
        tcp_established: Some(true),
        file_locks: Some(true),
        link_remap: Some(true),
        log_level: Some(2),
        ghost_limit: Some(7),
        timeout: Some(3),
        // What an operator has there is for others.
        config_file: Some("/dev/null".to_owned()),
        ..CriuOpts::default()
    };
    assert_eq!(patched.opts, Some(expected));
}
