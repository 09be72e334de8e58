//! The binary's command line: what it refuses, and with which exit code.

use std::process::{Command, Output};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_dma-engine"))
        .args(arguments)
        .env_clear()
        .output()
        .expect("the binary runs")
}

#[test]
fn exit_codes_and_words_are_as_the_help_says() {
    let agent = ["--name", "copy0", "--address", "00:05.0"];
    let cases: &[(&[&str], i32, &str)] = &[
        (&[], 64, "--name"),
        (&["--name", "copy0", "--address", "5"], 64, "is not a PCI address"),
        (
            &[agent.as_slice(), &["--server", "host:1"]].concat(),
            64,
            "write https://HOST:PORT, http://HOST:PORT (plaintext) or unix:///PATH",
        ),
        (&[agent.as_slice(), &["--log", "a=b=c"]].concat(), 64, "--log"),
        (
            &[agent.as_slice(), &["--server", "unix:///nonexistent", "--attempts", "0"]].concat(),
            69,
            "no connection",
        ),
    ];
    for (arguments, code, words) in cases {
        let output = run(arguments);
        let told = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(*code), "{arguments:?}: {told}");
        assert!(told.contains(words), "{arguments:?}: {told}");
    }
}

#[test]
fn help_and_completion_go_to_standard_output() {
    let help = run(&["--help"]);
    assert!(help.status.success() && String::from_utf8_lossy(&help.stdout).contains("EXIT CODES"));
    let completion = run(&["completion", "bash"]);
    assert!(completion.status.success() && completion.stdout.starts_with(b"_dma__engine()"));
}
