//! Runs `iommuctl` as a process against a scripted server.

use iommu_proto::pb;
use tonic::transport::server::{Router, TcpIncoming};

/// Exit code, standard output, standard error.
pub(crate) type Ran = (Option<i32>, String, String);

/// Serves until the test ends; gives the endpoint.
pub(crate) fn serve(server: Router) -> String {
    let incoming = TcpIncoming::bind("127.0.0.1:0".parse().expect("an address")).expect("a port");
    let address = incoming.local_addr().expect("it is bound");
    tokio::spawn(server.serve_with_incoming(incoming));
    format!("http://{address}")
}

pub(crate) async fn run(endpoint: &str, arguments: &[&str], environment: &[(&str, &str)]) -> Ran {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_iommuctl"));
    command.args(arguments).args(["--server", endpoint]).envs(environment.iter().copied());
    let output = tokio::task::spawn_blocking(move || command.output().expect("it runs"));
    let output = output.await.expect("no panic");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (output.status.code(), text(output.stdout), text(output.stderr))
}

/// What a session is opened with.
pub(crate) fn opened(resumed: bool) -> pb::OpenResponse {
    let limits = pb::Limits {
        message_bytes_max: 1 << 20,
        batch_operations_max: 8,
        batch_bytes_max: 1024,
        request_window: 4,
    };
    pb::OpenResponse {
        schema_version: 1,
        generation: 1,
        resume_token: bytes::Bytes::from_static(&[7; 16]),
        resumed,
        grace_ms: 900,
        limits: Some(limits),
    }
}
