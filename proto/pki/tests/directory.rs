//! The directory: what is private stays private, nothing is overwritten unasked, and what was issued can be revoked.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use iommu_pki::{
    AUTHORITY, AUTHORITY_KEY, DECLARED_MAX, Directory, ISSUED_MAX, Overwrite, PkiError, REVOCATIONS,
    Revocations, SERVER, Serial, Usage, Validity,
};
use iommu_types::{Identity, Owner, Role};

fn days(days: u64) -> Validity {
    Validity::of_days(days).expect("a validity")
}

fn identity(name: &str, role: Role) -> Identity {
    Identity { name: name.to_owned(), role }
}

fn alice() -> Identity {
    identity("alice", Role::Operator)
}

/// A directory with an authority.
fn fresh() -> (tempfile::TempDir, Directory) {
    let parent = tempfile::tempdir().expect("a directory");
    let directory = Directory::at(parent.path().join("state/pki"));
    assert!(directory.init(days(10)).expect("an authority"), "it was not there");
    (parent, directory)
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).expect("it is there").permissions().mode() & 0o777
}

fn content(directory: &Directory, name: &str) -> String {
    std::fs::read_to_string(directory.file(name)).expect("it can be read")
}

#[test]
fn secrets_are_for_one_user_alone() {
    let (_parent, directory) = fresh();
    directory.issue(&alice(), days(1), None, Overwrite::Never).expect("issued");
    directory.issue_server(&[], days(1), None, Overwrite::Never).expect("issued");
    let rows = [
        ("", 0o700),
        (AUTHORITY, 0o644),
        (REVOCATIONS, 0o644),
        (AUTHORITY_KEY, 0o600),
        (SERVER, 0o600),
        ("operator-alice.pem", 0o600),
        ("issued", 0o600),
    ];
    for (name, expected) in rows {
        let mode = mode(&directory.file(name));
        assert_eq!(mode, expected, "{name:?} has {mode:o}");
    }
    let drafts = std::fs::read_dir(directory.path()).expect("readable").filter(|entry| {
        entry.as_ref().is_ok_and(|entry| entry.file_name().to_string_lossy().ends_with(".new"))
    });
    assert_eq!(drafts.count(), 0, "no draft is left");
}

#[test]
fn a_directory_that_others_may_write_is_refused() {
    let parent = tempfile::tempdir().expect("a directory");
    std::fs::set_permissions(parent.path(), std::fs::Permissions::from_mode(0o775)).expect("permissions");
    let refused = Directory::at(parent.path()).init(days(1)).expect_err("refused");
    assert!(matches!(refused, PkiError::Exposed { mode: 0o775, .. }), "{refused}");
}

#[test]
fn nothing_is_overwritten_unless_that_was_asked_for() {
    let (_parent, directory) = fresh();
    let authority = content(&directory, AUTHORITY);
    assert!(!directory.init(days(10)).expect("no error"), "there was one");
    assert_eq!(content(&directory, AUTHORITY), authority);
    let first = directory.issue(&alice(), days(1), None, Overwrite::Never).expect("issued");
    let again = directory.issue(&alice(), days(1), None, Overwrite::Never).expect_err("it is there");
    assert!(matches!(&again, PkiError::Exists { path } if *path == first.path), "{again}");
    let second = directory.issue(&alice(), days(1), None, Overwrite::Replace).expect("replaced");
    assert_ne!(first.serial, second.serial);
    assert_eq!(Directory::show(&second.path).expect("shown").serial, second.serial);
}

#[test]
fn a_crash_between_key_and_certificate_is_gone_on_from() {
    let (_parent, directory) = fresh();
    let key = content(&directory, AUTHORITY_KEY);
    std::fs::remove_file(directory.file(AUTHORITY)).expect("removed");
    assert!(directory.init(days(10)).expect("an authority"));
    assert_eq!(content(&directory, AUTHORITY_KEY), key, "the key is the same");
    directory.issue(&alice(), days(1), None, Overwrite::Never).expect("it signs");
    let (list, authority) = (content(&directory, REVOCATIONS), content(&directory, AUTHORITY));
    Revocations::read_genuine(&list, &authority).expect("and its list is its own");
}

#[test]
fn what_is_missing_is_said_with_the_remedy() {
    let parent = tempfile::tempdir().expect("a directory");
    let nothing = Directory::at(parent.path().join("nothing"));
    let error = nothing.authority().expect_err("nothing is there").to_string();
    assert!(error.contains("iommuctl pki init"), "{error}");
    let (_parent, directory) = fresh();
    std::fs::remove_file(directory.file(AUTHORITY_KEY)).expect("removed");
    let error = directory.issue(&alice(), days(1), None, Overwrite::Never).expect_err("no key").to_string();
    assert!(error.contains("ca.key"), "{error}");
    for (host, fit) in
        [("iommu.example", true), ("10.0.0.1", true), ("::1", true), ("a b", false), ("", false)]
    {
        let (_parent, directory) = fresh();
        let issued = directory.issue_server(&[host.to_owned()], days(1), None, Overwrite::Never);
        assert_eq!(issued.is_ok(), fit, "{host:?}: {issued:?}");
        assert!(fit || !directory.file(SERVER).exists());
    }
    assert!(Validity::of(Duration::ZERO).is_err() && Validity::of_days(100_000).is_err());
}

#[test]
fn a_certificate_says_what_it_was_issued_for() {
    let (_parent, directory) = fresh();
    let rows = [
        identity("engine0", Role::Device("0001:00:01.0".parse().expect("an address"))),
        identity("guest3", Role::Driver(Owner::Vm(3))),
        identity("bare", Role::Bare),
        identity("eve", Role::Observer),
        alice(),
    ];
    for peer in rows {
        let issued = directory.issue(&peer, days(2), None, Overwrite::Never).expect("issued");
        let shown = Directory::show(&issued.path).expect("shown");
        assert_eq!(shown.usage, Usage::Peer(peer.clone()));
        assert_eq!((shown.serial, shown.not_after_unix_s), (issued.serial, issued.not_after_unix_s));
        assert!(directory.has(&peer).expect("the name is fit"));
    }
    let hosts = ["iommu.example".to_owned(), "127.0.0.1".to_owned(), "10.0.0.1".to_owned()];
    let server = directory.issue_server(&hosts, days(1), None, Overwrite::Never).expect("issued");
    let Usage::Server(names) = Directory::show(&server.path).expect("shown").usage else {
        panic!("it is for a server")
    };
    assert_eq!(names, ["localhost", "127.0.0.1", "::1", "iommu.example", "10.0.0.1"]);
    let subjects: Vec<_> =
        directory.issued().expect("the index").into_iter().map(|record| record.subject).collect();
    assert_eq!(subjects.first().map(String::as_str), Some("spiffe://iommu/device/engine0/0001-00-01.0"));
    assert_eq!(subjects.len(), 6);
}

#[test]
fn a_list_holds_what_was_revoked_and_only_its_authority_signs_it() {
    let (_parent, directory) = fresh();
    let list = || {
        let (list, authority) = (content(&directory, REVOCATIONS), content(&directory, AUTHORITY));
        Revocations::read_genuine(&list, &authority).expect("a genuine list")
    };
    let empty = list();
    assert!(empty.revoked.is_empty());
    let serials: Vec<Serial> = (0..5)
        .map(|_| directory.issue(&alice(), days(1), None, Overwrite::Replace).expect("issued").serial)
        .collect();
    assert_eq!(directory.revoke(&serials[..2]).expect("revoked"), serials[..2]);
    assert_eq!(directory.revoke(&serials[1..3]).expect("revoked"), serials[2..3], "one was already");
    let now = list();
    assert!(now.number > empty.number, "each list has a larger number");
    for (index, serial) in serials.iter().enumerate() {
        assert_eq!(now.contains(serial), index < 3, "{serial}");
        assert_eq!(serial.to_string().parse().as_ref(), Ok(serial), "a serial number reads back");
    }

    let (_other, elsewhere) = fresh();
    let rows = [
        (content(&elsewhere, REVOCATIONS), content(&directory, AUTHORITY), false),
        (content(&directory, REVOCATIONS), content(&elsewhere, AUTHORITY), false),
        (String::new(), content(&directory, AUTHORITY), false),
        (content(&directory, REVOCATIONS), String::new(), false),
        // While an authority is exchanged there are two, each with its list.
        (
            content(&directory, REVOCATIONS) + &content(&elsewhere, REVOCATIONS),
            content(&directory, AUTHORITY) + &content(&elsewhere, AUTHORITY),
            true,
        ),
        (
            content(&directory, REVOCATIONS),
            content(&directory, AUTHORITY) + &content(&elsewhere, AUTHORITY),
            false,
        ),
    ];
    for (index, (lists, authorities, genuine)) in rows.into_iter().enumerate() {
        assert_eq!(Revocations::read_genuine(&lists, &authorities).is_ok(), genuine, "row {index}");
    }
}

#[test]
fn a_list_grows_by_no_certificate_that_has_expired_or_is_there() {
    let (_parent, directory) = fresh();
    let issue = || directory.issue(&alice(), days(1), None, Overwrite::Replace).expect("issued").serial;
    let (old, new) = (issue(), issue());
    directory.revoke(std::slice::from_ref(&old)).expect("revoked");
    // As if the first had been issued long ago: it expired in 1970.
    let index = content(&directory, "issued");
    let (line, rest) = index.split_once('\n').expect("two lines");
    let words: Vec<&str> = line.split(' ').collect();
    std::fs::write(directory.file("issued"), format!("{} 1000 {}\n{rest}", words[0], words[2]))
        .expect("written");
    let number = directory.revocations().expect("a list").number;
    assert_eq!(directory.revoke(std::slice::from_ref(&old)).expect("no error"), []);
    assert_eq!(directory.revocations().expect("a list").number, number, "nothing was to be written");
    assert_eq!(directory.revoke_all_of(&alice()).expect("revoked"), std::slice::from_ref(&new));
    let list = directory.revocations().expect("a list");
    assert_eq!(
        list.revoked.iter().map(|one| &one.serial).collect::<Vec<_>>(),
        [&new],
        "the old one has gone"
    );
    assert_eq!(directory.revoke_all_of(&alice()).expect("no error"), []);
    assert_eq!(directory.revocations().expect("a list").number, list.number);
}

#[test]
fn what_the_index_forgets_goes_from_the_list_too() {
    let (_parent, directory) = fresh();
    let serials: Vec<Serial> =
        (1..=300_u32).map(|number| Serial::from_bytes(&number.to_be_bytes())).collect();
    directory.revoke(&serials).expect("revoked");
    let lines: String = serials.iter().map(|serial| format!("{serial} 1000 server\n")).collect();
    std::fs::write(directory.file("issued"), lines).expect("written");
    let issued = directory.issue(&alice(), days(1), None, Overwrite::Never).expect("issued");
    let index: Vec<Serial> =
        directory.issued().expect("the index").into_iter().map(|one| one.serial).collect();
    assert_eq!(index, [issued.serial]);
    assert_eq!(directory.revocations().expect("a list").revoked, []);
}

#[test]
fn a_full_directory_says_what_to_do() {
    let (_parent, directory) = fresh();
    let lines: String =
        (0..ISSUED_MAX).map(|number| format!("{:032x} 99999999999 server\n", number + 1)).collect();
    std::fs::write(directory.file("issued"), lines).expect("written");
    let refused = directory.issue(&alice(), days(1), None, Overwrite::Never).expect_err("it is full");
    assert!(matches!(refused, PkiError::Full { count: ISSUED_MAX, .. }), "{refused}");
    assert!(refused.to_string().contains("new authority"), "{refused}");
    assert!(!directory.has(&alice()).expect("a fit name"));
}

#[test]
fn i7_peers_that_come_and_go_leave_records_to_those_who_issue_by_hand() {
    let (_parent, directory) = fresh();
    let lines: String =
        (0..DECLARED_MAX).map(|number| format!("{:032x} 99999999999 server\n", number + 1)).collect();
    std::fs::write(directory.file("issued"), lines).expect("written");
    let refused =
        directory.issue_declared(&alice(), days(1), Overwrite::Never).expect_err("no record is left");
    assert!(matches!(refused, PkiError::Full { limit: DECLARED_MAX, .. }), "{refused}");
    directory.issue(&alice(), days(1), None, Overwrite::Never).expect("by hand it is issued");
    assert_eq!(directory.revoke_all_of(&alice()).expect("and revoked").len(), 1);
}

#[test]
fn texts_that_are_no_serial_numbers_are_refused() {
    for text in ["", "0", "0g", "abc", "+a", "0x10", &"ab".repeat(21), "é0"] {
        assert!(text.parse::<Serial>().is_err(), "{text:?}");
    }
}
