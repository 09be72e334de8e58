//! The binary: lines in, lines out, and the exit codes that its help tells.

use std::io::Write;
use std::process::{Command, Output, Stdio};

fn run(arguments: &[&str], lines: &[u8]) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_rogue"))
        .args(arguments)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary starts");
    // It may have ended by itself already.
    let _ = child.stdin.take().expect("piped").write_all(lines);
    child.wait_with_output().expect("it ends")
}

#[test]
fn lines_are_answered_one_by_one_and_nonsense_ends_nothing() {
    let lines = b"nonsense\n\n{\"do\":\"fly\"}\n{\"do\":\"release\",\"do\":1}\n{\"do\":\"reading\",\"on\":true,\"really\":1}\n{\"do\":\"status\"}\n{\"do\":\"quit\"}\n{\"do\":\"status\"}\n";
    let output = run(&["--server", "unix:///nonexistent"], lines);
    let told = String::from_utf8(output.stdout).expect("text");
    let is: Vec<&str> =
        told.lines().map(|line| if line.contains("\"is\":\"wrong\"") { "wrong" } else { "right" }).collect();
    assert_eq!(is, ["wrong", "wrong", "wrong", "wrong", "right"], "{told}");
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn exit_codes_are_as_the_help_says() {
    let nowhere = ["--server", "unix:///nonexistent"];
    let attack = |name: &'static str| {
        [nowhere.as_slice(), &["attack", name, "--name", "engine0", "--address", "00:01.0"]].concat()
    };
    let long = vec![b'x'; (5 << 20) + 1];
    let cases: &[(&[&str], &[u8], i32)] = &[
        (&nowhere, b"", 0),
        (&["--server", "host:1"], b"", 64),
        (&["attack", "fly"], b"", 64),
        (&nowhere, &long, 65),
        (&nowhere, &[0xff, b'\n'], 65),
        (&attack("scan"), b"", 69),
        // Nobody was taken in, and nobody was asked.
        (&attack("spoof"), b"", 69),
        (&["--help"], b"", 0),
    ];
    for (arguments, lines, code) in cases {
        let output = run(arguments, lines);
        assert_eq!(
            output.status.code(),
            Some(*code),
            "{arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn nobody_who_reads_the_answers_is_no_bad_line() {
    let attack = ["attack", "spoof", "--name", "engine0", "--address", "00:01.0"];
    for (arguments, code) in [(&[][..], 0), (&attack[..], 69)] {
        let mut child = Command::new(env!("CARGO_BIN_EXE_rogue"))
            .args(["--server", "unix:///nonexistent"])
            .args(arguments)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        drop(child.stdout.take());
        // It may have ended by itself already.
        let _ = child.stdin.take().expect("piped").write_all(b"{\"do\":\"status\"}\n");
        let output = child.wait_with_output().expect("it ends");
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!((output.status.code(), &*told), (Some(code), ""), "{arguments:?}");
    }
}

#[test]
fn help_teaches_the_language_with_lines_that_parse() {
    let help = run(&["--help"], b"");
    let help = String::from_utf8(help.stdout).expect("text");
    let commands = help.split("ANSWERS").next().expect("before the answers");
    let mut lines = 0;
    for piece in commands.split('{').skip(1).filter(|piece| piece.starts_with("\"do\"")) {
        // Nested braces are those of a generation, which stand outside the examples.
        let line = format!("{{{}}}", piece.split('}').next().expect("closed"));
        serde_json::from_str::<rogue::language::Command>(&line)
            .unwrap_or_else(|error| panic!("{line}: {error}"));
        lines += 1;
    }
    assert!(lines >= 20, "{lines} examples");
}
