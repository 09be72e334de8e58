//! Configuration, as files and flags give it.

use super::*;

fn args() -> ServeArgs {
    ServeArgs { insecure_plaintext: true, ..ServeArgs::default() }
}

fn refused(change: impl FnOnce(&mut ServeArgs)) -> String {
    let mut args = args();
    change(&mut args);
    Config::from_args(args).expect_err("must be refused").flag
}

#[test]
fn the_built_in_configuration_makes_sense() {
    let config = Config::from_args(args()).unwrap();
    assert_eq!(config.drivers.len(), 4);
    assert_eq!(config.devices.len(), 3);
    assert_eq!(config.devices[0].owner, Some(Owner::Driver(0)));
    assert_eq!(config.devices[2].owner, None);
    assert_eq!(config.memory_bytes, 1 << 30);
}

#[test]
fn every_refusal_names_its_flag() {
    let text = |t: &str| Some(t.to_owned());
    type Change = Box<dyn FnOnce(&mut ServeArgs)>;
    let cases: Vec<(&str, Change)> = vec![
        ("--listen", Box::new(|a| a.listen = vec!["0.0.0.0:1".parse().unwrap()])),
        ("--admin", Box::new(move |a| a.admin = text("0.0.0.0:1"))),
        ("--admin", Box::new(move |a| a.admin = text("nowhere"))),
        ("--memory", Box::new(move |a| a.memory = text("1MiB"))),
        ("--memory", Box::new(move |a| a.memory = text("lots"))),
        ("--memory", Box::new(move |a| a.memory = text("99999999999TiB"))),
        ("--grace", Box::new(move |a| a.grace = text("soon"))),
        ("--drain-deadline", Box::new(move |a| a.drain_deadline = text("-1"))),
        ("--stream-stalled", Box::new(move |a| a.stream_stalled = text("1ms"))),
        ("--config", Box::new(|a| a.config = Some("/nonexistent/file".into()))),
        ("--device", Box::new(|a| a.device = vec!["00:01.0".into()])),
        ("--device", Box::new(|a| a.device = vec!["00:01.9=x".into()])),
        ("--device", Box::new(|a| a.device = vec!["0001:00:01.0=x".into()])),
        ("--device", Box::new(|a| a.device = vec!["00:01.0=x@driver:9".into()])),
        ("--device", Box::new(|a| a.device = vec!["00:01.0=x".into(), "00:01.0=y".into()])),
        ("--device", Box::new(|a| a.device = vec!["00:01.0=a b".into()])),
        ("--driver", Box::new(|a| a.driver = vec!["vm:1=x".into()])),
        ("--driver", Box::new(|a| a.driver = vec!["driver:1=x".into(), "driver:2=x".into()])),
    ];
    for (flag, change) in cases {
        assert_eq!(refused(change), flag);
    }
}

#[test]
fn certificates_are_needed_on_tcp_and_nowhere_else() {
    let unix = |args: &mut ServeArgs| args.listen_unix = vec!["/tmp/x".into()];
    let anywhere = |args: &mut ServeArgs| args.listen = vec!["0.0.0.0:1".parse().unwrap()];
    let pki = |change: &dyn Fn(&mut ServeArgs), plaintext| {
        let mut args =
            ServeArgs { pki: Some("/pki".into()), insecure_plaintext: plaintext, ..ServeArgs::default() };
        change(&mut args);
        Config::from_args(args).unwrap().pki
    };
    assert_eq!(pki(&|_| {}, false), Some("/pki".into()));
    assert_eq!(pki(&anywhere, false), Some("/pki".into()), "TLS may listen anywhere");
    assert_eq!(pki(&unix, false), None, "a UNIX socket has the peer's credentials");
    assert_eq!(pki(&|_| {}, true), None);
}

#[test]
fn a_file_with_an_unknown_setting_is_refused() {
    let reason = parse_file("--config", "memroy = \"1GiB\"").unwrap_err();
    assert!(reason.why.contains("memroy"), "{reason}");
}

#[test]
fn flags_win_over_the_file() {
    let file = parse_file("--config", "memory = \"64MiB\"\ngrace = \"1s\"").unwrap();
    let defaults = parse_file("defaults", DEFAULT_TOML).unwrap();
    let args = ServeArgs { memory: Some("32MiB".into()), ..args() };
    let config = Config::layered(args, file, defaults).unwrap();
    assert_eq!((config.memory_bytes, config.grace), (32 << 20, Duration::from_secs(1)));
}
