use super::*;

const MAPS: &str = "\
1000-3000 r-xp 00000000 fe:00 77                                 /bin/a program
3000-5000 rw-p 00002000 fe:00 77                                 /bin/a program
10000-20000 rw-p 00000000 00:00 0                                [heap]
30000-40000 rw-p 00000000 00:00 0 
50000-60000 rw-s 00000000 00:01 12                               /dev/zero (deleted)
70000-72000 r--p 00000000 00:00 0                                [vvar]
";

/// Smaps of [`MAPS`], each mapping with the flags of the same position.
fn smaps_of(maps: &str, flags: &[&str]) -> Vec<u8> {
    let lines = maps.lines().zip(flags);
    let text = lines.map(|(line, flags)| format!("{line}\nRss:  4 kB\nVmFlags: {flags} \n"));
    text.collect::<String>().into_bytes()
}

fn recorded() -> Recorded {
    let flags = [
        "rd ex mr",
        "rd wr ac",
        "rd wr ac",
        "rd wr nr nh uw",
        "rd wr sh dc",
        "rd mr pf io de dd",
    ];
    Recorded::parse(&smaps_of(MAPS, &flags)).expect("well formed")
}

/// Renders one more or changed line and gives back its flags.
fn check(line: &str, expected: Option<&str>) {
    let rendered = recorded().render(format!("{line}\n").as_bytes());
    let text = rendered
        .ok()
        .map(|text| String::from_utf8(text).expect("ascii"));
    let flags = text.map(|text| {
        let (first, flags) = text.split_once("\nVmFlags:").expect("both lines");
        assert_eq!(first, line, "the first line is passed on as it is");
        flags.trim().to_owned()
    });
    assert_eq!(flags.as_deref(), expected, "{line}");
}

#[test]
fn an_unchanged_process_is_rendered_as_recorded() {
    let rendered = recorded().render(MAPS.as_bytes()).expect("nothing new");
    let true_flags = ["rd", "wr", "ac", "nh nr", "dc sh", "io pf dd de"];
    compare(&smaps_of(MAPS, &true_flags), &rendered).expect("equal where it counts");
}

#[test]
fn a_changed_mapping_keeps_its_flags() {
    check(
        "10000-28000 rw-p 00000000 00:00 0                                [heap]",
        Some(""),
    );
    check("30000-48000 rw-p 00000000 00:00 0 ", Some("nh nr"));
    check("38000-39000 ---p 00000000 00:00 0 ", Some("nh nr"));
    check(
        "34000-36000 r--p 00000000 00:00 0                          [anon:name]",
        Some("nh nr"),
    );
    check(
        "51000-60000 r--s 00001000 00:01 12                         /dev/zero (deleted)",
        Some("dc"),
    );
    check(
        "2000-3000 rwxp 00001000 fe:00 77                           /bin/a program",
        Some(""),
    );
}

#[test]
fn a_part_of_the_stack_grows_down_without_its_name() {
    let whole = "7000-9000 rw-p 00000000 00:00 0                             [stack]\n";
    let recorded = Recorded::parse(&smaps_of(whole, &["rd wr gd ac"])).expect("well formed");
    let part = recorded
        .render(b"7000-8000 rwxp 00000000 00:00 0 \n")
        .expect("a part of it");
    assert!(part.ends_with(b"VmFlags: gd \n"));
}

#[test]
fn a_new_mapping_is_like_its_kin_or_cannot_be_told() {
    // The only private memory without a name has these flags.
    check("90000-91000 rw-p 00000000 00:00 0 ", Some("nh nr"));
    // Another library of the same disk, and one of a disk not seen before.
    check(
        "90000-91000 r-xp 00000000 fe:00 99                         /lib/new",
        Some(""),
    );
    check(
        "90000-91000 r-xp 00000000 08:01 99                         /lib/new",
        Some(""),
    );
    // A device without a disk may be hugetlbfs or a driver.
    check(
        "90000-91000 rw-s 00000000 00:05 99                         /dev/something",
        None,
    );
    check(
        "90000-92000 r--p 00000000 00:00 0                          [vvar]",
        None,
    );
    // Replaced: another file at the same place is not the file recorded there.
    check(
        "50000-60000 rw-s 00000000 00:05 13                         /dev/shm/x",
        None,
    );
}

#[test]
fn kin_that_differ_are_asked_by_permissions() {
    let maps = "\
1000-2000 rw-p 00000000 00:00 0 
3000-4000 ---p 00000000 00:00 0 
5000-6000 ---p 00000000 00:00 0 
";
    let render = |flags: &[&str], line: &str| {
        let recorded = Recorded::parse(&smaps_of(maps, flags)).expect("well formed");
        recorded
            .render(line.as_bytes())
            .map(|text| String::from_utf8(text).expect("ascii"))
    };
    let stack = "9000-a000 ---p 00000000 00:00 0 \n";
    let rendered = render(&["ac", "nr", "nr"], stack).expect("both stacks agree");
    assert!(rendered.ends_with("VmFlags: nr \n"), "{rendered}");
    let unknown = render(&["ac", "nr", "nh"], stack);
    assert_eq!(
        unknown,
        Err(Unrenderable::Unknown {
            start: 0x9000,
            end: 0xa000
        })
    );
}

#[test]
fn a_merged_mapping_of_unlike_parts_cannot_be_told() {
    let maps = "1000-2000 rw-p 00000000 00:00 0 \n2000-3000 rw-p 00000000 00:00 0 \n";
    let recorded = Recorded::parse(&smaps_of(maps, &["lo", "ac"])).expect("well formed");
    let merged = recorded.render(b"1000-3000 rw-p 00000000 00:00 0 \n");
    assert_eq!(
        merged,
        Err(Unrenderable::Unknown {
            start: 0x1000,
            end: 0x3000
        })
    );
}

#[test]
fn memory_locked_in_advance_makes_new_mappings_unknown() {
    let maps = "1000-2000 rw-p 00000000 fe:00 7 /x\n";
    let recorded = Recorded::parse(&smaps_of(maps, &["lo"])).expect("well formed");
    assert!(
        recorded
            .render(b"9000-a000 rw-p 00000000 00:00 0 \n")
            .is_err()
    );
    assert!(
        recorded
            .render(b"9000-a000 rw-p 00000000 00:00 0   [heap]\n")
            .is_err()
    );
}

#[test]
fn a_difference_names_the_mapping_and_both_sides() {
    let flags = ["", "", "", "nr nh", "dc", "pf io dd"];
    let rendered = recorded().render(MAPS.as_bytes()).expect("nothing new");
    let mut locked = flags;
    locked[2] = "lo";
    let unequal = compare(&smaps_of(MAPS, &locked), &rendered).expect_err("locked since");
    let Unequal::Different(difference) = unequal else {
        panic!("{unequal}")
    };
    assert_eq!((difference.start, difference.end), (0x10000, 0x20000));
    assert!(difference.actual.ends_with("flags lo"), "{difference}");
    assert!(difference.recorded.ends_with("flags"), "{difference}");

    let fewer = MAPS.rsplit_once("70000").expect("last mapping").0;
    let unequal = compare(&smaps_of(fewer, &flags), &rendered).expect_err("one is gone");
    let Unequal::Different(difference) = unequal else {
        panic!("{unequal}")
    };
    assert_eq!(
        (difference.start, difference.actual.as_str()),
        (0x70000, "")
    );
}

#[test]
fn malformed_text_is_refused() {
    let bad = [
        "VmFlags: rd\n",
        "nonsense\n",
        "1000-2000 rw-p 0 00:00\n",
        "2000-1000 rw-p 00000000 00:00 0 \n",
        "1000-3000 rw-p 00000000 00:00 0 \n2000-4000 rw-p 00000000 00:00 0 \n",
        "1000-3000 rw- 00000000 00:00 0 \n",
    ];
    for text in bad {
        assert!(Recorded::parse(text.as_bytes()).is_err(), "{text:?}");
    }
}

#[test]
fn this_process_is_rendered_as_the_kernel_does() {
    // Reading allocates: buffers are made before, so that the mappings stay as they are.
    let read = || std::fs::read("/proc/self/smaps").expect("procfs");
    drop((
        read(),
        read(),
        std::fs::read("/proc/self/maps").expect("procfs"),
    ));
    let truth = read();
    let recorded = Recorded::parse(&truth).expect("the kernel's own text");
    let maps: Vec<u8> = truth
        .split_inclusive(|byte| *byte == b'\n')
        .filter(|line| !line[0].is_ascii_uppercase())
        .flatten()
        .copied()
        .collect();
    let rendered = recorded.render(&maps).expect("nothing new");
    compare(&truth, &rendered).expect("equal");
}
