//! Where handshakes are computed: on one thread, of a low priority.
//!
//! A handshake costs more than thousands of DMA operations, and whoever asks for one has not said yet who they are, so no rate of a tenant can count it. Who
//! connects again and again gets what the others leave of a processor, and slows down nobody but those who connect.

use std::io;

use rustix::process::{getpriority_process, setpriority_process};
use tokio::runtime::{Builder, Handle};

use crate::bounds;
use crate::ending::EndSignal;

/// Starts the thread; it ends at `shutdown`. What it runs may use sockets that belong to another runtime.
pub(crate) fn start(shutdown: &EndSignal) -> io::Result<Handle> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    let (handle, over) = (runtime.handle().clone(), shutdown.wait_owned());
    std::thread::Builder::new().name("handshakes".to_owned()).spawn(move || {
        if let Err(reason) = yield_to_others() {
            // A system that refuses it has handshakes like everything else.
            tracing::warn!(%reason, "handshakes run at the usual priority");
        }
        runtime.block_on(over);
    })?;
    Ok(handle)
}

/// Lowers the priority of the calling thread, where that of the whole server is not lower still.
fn yield_to_others() -> rustix::io::Result<()> {
    let niceness = getpriority_process(None)?.max(bounds::HANDSHAKE_NICENESS);
    setpriority_process(None, niceness)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ending::Ending;

    #[tokio::test]
    async fn handshakes_run_at_a_low_priority_and_nothing_else_does() {
        let shutdown = EndSignal::new();
        let usual = getpriority_process(None).expect("told");
        let desk = start(&shutdown).expect("a thread starts");
        // What is spawned first may be asked before the priority is set; the same thread says it soon.
        let niceness = desk.spawn(async {
            loop {
                match getpriority_process(None).expect("a thread has a priority") {
                    niceness if niceness >= bounds::HANDSHAKE_NICENESS => {
                        return std::thread::current().name().map(str::to_owned);
                    }
                    _ => tokio::task::yield_now().await,
                }
            }
        });
        assert_eq!(niceness.await.expect("it is told").as_deref(), Some("handshakes"));
        assert_eq!(getpriority_process(None).expect("told"), usual, "the thread that started it");
        let endless = desk.spawn(std::future::pending::<()>());
        shutdown.end(Ending::ShuttingDown);
        assert!(endless.await.expect_err("it is over").is_cancelled());
    }
}
