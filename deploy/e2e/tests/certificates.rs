//! Certificates with real processes: nothing to do on a fresh machine, and what peers say when theirs is not there or not taken.

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use guest_sdk::Owner;
use iommu_e2e::stage::{SOON, Stage, address, binaries, soon, within};
use iommu_launch::Process;
use iommu_pki::Directory;
use iommu_types::{Identity, Role};
use rustix::process::Signal;
use serde_json::Value;

/// Runs a program in an environment that has this home and nothing else of ours.
async fn run_at_home(home: Option<&Path>, program: &Path, arguments: &[&str]) -> Output {
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).env_clear().stdin(std::process::Stdio::null()).kill_on_drop(true);
    if let Some(home) = home {
        command.env("HOME", home);
    }
    let ended = tokio::time::timeout(SOON, command.output()).await;
    ended.expect("the program ends by itself").expect("the program starts")
}

fn words(output: &Output) -> (Option<i32>, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout) + &text(&output.stderr))
}

/// Starts a program that finds everything below `home`.
fn start_at_home(home: &Path, program: &Path, arguments: &[&str], log: &str) -> Process {
    let arguments: Vec<String> = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    let environment = [("HOME", home), ("XDG_STATE_HOME", Path::new(""))];
    let name = program.file_name().and_then(|name| name.to_str()).expect("a name");
    Process::start_with(name, program, &arguments, &environment, home.join(log)).expect("it starts")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_a_fresh_machine_there_is_nothing_to_do() {
    within(60, async {
        let directory = tempfile::tempdir().expect("a directory");
        let home = directory.path();
        let binaries = binaries();
        let listen = ["--listen", "127.0.0.1:0", "--admin", "off", "--memory", "64MiB"];
        let mut server = start_at_home(home, &binaries.server, &listen, "server.log");
        let ready: Value =
            serde_json::from_str(&server.first_line().await.expect("ready")).expect("it speaks JSON");
        assert_eq!(ready["pki"], home.join(".local/state/iommu/pki").display().to_string(), "{ready}");
        let endpoint = format!("https://{}", ready["listen"][0].as_str().expect("an address"));

        let engine = ["--server", &endpoint, "--name", "engine0", "--address", "00:01.0"];
        let mut engine = start_at_home(home, &binaries.dma_engine, &engine, "engine.log");
        soon("the engine is connected", async || {
            let ask = ["--server", &endpoint, "device", "list", "--json"];
            let (code, told) = words(&run_at_home(Some(home), &binaries.iommuctl, &ask).await);
            assert_eq!(code, Some(0), "{told}");
            let devices: Value = serde_json::from_str(&told).expect("JSON");
            (devices[0]["connected"] == true).then_some(())
        })
        .await;
        let health = ["healthcheck", "--server", &endpoint];
        let (code, told) = words(&run_at_home(Some(home), &binaries.server, &health).await);
        assert_eq!(code, Some(0), "{told}");

        // In another home there is nothing, and the message says what to do.
        let elsewhere = tempfile::tempdir().expect("a directory");
        let ask = ["--server", &endpoint, "status"];
        let (code, told) = words(&run_at_home(Some(elsewhere.path()), &binaries.iommuctl, &ask).await);
        assert_eq!(code, Some(1), "{told}");
        assert!(told.contains("ca.crt") && told.contains("iommu-server once"), "{told}");
        for (program, arguments) in
            [(&binaries.iommuctl, &ask[..]), (&binaries.server, &["--listen", "127.0.0.1:0"][..])]
        {
            let (code, told) = words(&run_at_home(None, program, arguments).await);
            assert!(code.is_some_and(|code| code != 0) && told.contains("--pki"), "without a home: {told}");
        }
        assert!(engine.stop(SOON).await.expect("it ends").success());
        assert!(server.stop(SOON).await.expect("it drains").success(), "{}", server.log());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revoked_peer_hears_it_and_comes_back_with_a_new_certificate() {
    within(90, async {
        let mut stage = Stage::start(&[]).await;
        let mut engine = stage.engine(0).await;
        let (code, told, error) =
            stage.server.iommuctl(&["pki", "revoke", "device", "00:01.0"]).await.expect("iommuctl runs");
        assert_eq!(code, 0, "{told}{error}");
        stage.device_gone(0, SOON).await;
        soon("the agent says why", async || engine.log().contains("it was revoked").then_some(())).await;
        assert!(engine.log().contains("iommuctl pki issue device 0000:00:01.0 --name engine0 --force"));
        assert!(engine.ended().expect("it can be asked").is_none(), "it goes on trying");
        stage.log_says(&["handshake refused", "revoked"]).await;

        let renew = ["pki", "issue", "device", "00:01.0", "--name", "engine0", "--force"];
        let (code, told, error) = stage.server.iommuctl(&renew).await.expect("iommuctl runs");
        assert_eq!(code, 0, "{told}{error}");
        stage.device_connected(0, 2).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agent_without_a_certificate_says_so_and_waits_for_it() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let file = stage.server.pki().join("device-0000-00-01.0.pem");
        let aside = stage.server.path("aside.pem");
        std::fs::rename(&file, &aside).expect("moved");
        let pki = stage.server.pki().display().to_string();
        let arguments =
            ["--server", stage.server.endpoint(), "--pki", &pki, "--name", "engine0", "--address", "00:01.0"]
                .map(String::from);
        let start = |log: &str, more: &[&str]| {
            let arguments: Vec<String> =
                arguments.iter().cloned().chain(more.iter().map(|word| (*word).to_owned())).collect();
            Process::start("dma-engine", &binaries().dma_engine, &arguments, stage.server.path(log))
                .expect("it starts")
        };
        let waiting = start("waiting.log", &[]);
        let mut once = start("once.log", &["--attempts", "1"]);
        let ended = once.wait(SOON).await.expect("it gives up");
        assert_eq!(ended.code(), Some(77), "{}", once.log());
        assert!(once.log().contains("device-0000-00-01.0.pem"), "{}", once.log());
        soon("it says what is missing", async || {
            waiting.log().contains("iommuctl pki issue device").then_some(())
        })
        .await;
        std::fs::rename(&aside, &file).expect("moved back");
        stage.device_connected(0, 1).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn i8_the_certificate_of_one_driver_opens_no_session_of_another() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let own = stage.server.pki().join("driver-driver-1.pem");
        let credentials = guest_sdk::Credentials::from_files(&own, stage.server.pki().join("ca.crt"));
        let connection = guest_sdk::Connection::to(stage.server.endpoint()).credentials(credentials);
        let refused = connection.clone().driver("driver0", Owner::Driver(0)).await.expect_err("refused");
        assert!(refused.to_string().contains("its certificate is for driver1"), "{refused}");
        connection.driver("driver1", Owner::Driver(1)).await.expect("as itself it is admitted");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sighup_reads_certificates_anew_and_sessions_stay() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let driver = stage.driver(0).await;
        stage.server.process.signal(Signal::HUP).expect("SIGHUP");
        stage.log_says(&["certificates read anew"]).await;
        driver.allocate(4096).await.expect("the session stands");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_unix_socket_lets_in_only_the_users_that_were_named() {
    // Another user can be played by root alone.
    if !rustix::process::geteuid().is_root() {
        // Past the capture of the test harness, which would hide it with everything else that passing tests print.
        let mut stderr = std::io::stderr();
        std::io::Write::write_all(
            &mut stderr,
            b"skipped: a_unix_socket_lets_in_only_the_users_that_were_named must be run as root\n",
        )
        .expect("told");
        return;
    }
    const NOBODY: u32 = 65_534;
    within(60, async {
        for (arguments, admitted) in [(&[][..], false), (&["--unix-uid", "65534"][..], true)] {
            let stage = Stage::start(arguments).await;
            let socket = stage.server.path("server.sock");
            let everybody = |mode| std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(&socket, everybody(0o777)).expect("permissions");
            let parent = socket.parent().expect("a directory");
            std::fs::set_permissions(parent, everybody(0o755)).expect("permissions");
            // The file may lie where nobody else may go; the program is run from a copy beside the socket.
            let program = stage.server.path("iommuctl");
            std::fs::copy(&binaries().iommuctl, &program).expect("a copy");
            std::fs::set_permissions(&program, everybody(0o755)).expect("permissions");
            let run = async {
                loop {
                    let ran = tokio::process::Command::new(&program)
                        .args(["--server", &stage.server.unix_endpoint(), "status"])
                        .uid(NOBODY)
                        .kill_on_drop(true)
                        .output();
                    match ran.await {
                        // A process that another test started in this moment has the copy open for writing until it runs its own program.
                        Err(busy) if busy.kind() == std::io::ErrorKind::ExecutableFileBusy => {
                            tokio::time::sleep(Duration::from_millis(10)).await;
                        }
                        ran => return ran.expect("it runs"),
                    }
                }
            };
            let output = tokio::time::timeout(Duration::from_secs(20), run).await.expect("it ends");
            let (code, told) = words(&output);
            assert_eq!(code == Some(0), admitted, "{arguments:?}: {told}");
            if !admitted {
                stage.log_says(&["peer refused on a UNIX socket", "65534"]).await;
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_the_server_made_is_what_its_configuration_says() {
    within(60, async {
        let stage = Stage::start(&[]).await;
        let pki = Directory::at(stage.server.pki());
        for number in 0..3 {
            let device = Identity { name: format!("engine{number}"), role: Role::Device(address(number)) };
            assert!(pki.has(&device).expect("names are fit"), "{device}");
        }
        let (code, told, error) = stage.server.iommuctl(&["pki", "list", "--json"]).await.expect("it runs");
        assert_eq!(code, 0, "{error}");
        let listed: Value = serde_json::from_str(&told).expect("JSON");
        let all_good = listed.as_array().expect("a list").iter().all(|one| one["state"] == "good");
        assert!(all_good && listed.as_array().is_some_and(|all| all.len() >= 11), "{told}");
    })
    .await;
}
