//! One GET request, by hand: the admin port speaks plain HTTP and the tests need nothing else.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// The status code and the whole answer.
pub async fn get(address: &str, path: &str) -> (u16, String) {
    let mut socket = TcpStream::connect(address).await.expect("the admin port listens");
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    socket.write_all(request.as_bytes()).await.expect("the request is taken");
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer).await.expect("the answer ends");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
    (status.expect("an HTTP status line"), answer)
}
