//! A device that this process plays: its DMA is under the hand of the test.

use std::time::Duration;

use device_runtime::{
    Agent, Credentials, DeviceModel, Dma, DmaError, EndReason, MmioRefusal, Reconnect, Register,
};
use iommu_launch::Server;
use iommu_types::{DeviceAddress, DmaFault, Identity, Role};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::stage::SOON;

/// The only register that the device has; it reads as this.
pub const REGISTER_VALUE: u64 = 0x1dea;

/// Registers of no consequence.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl DeviceModel for Plain {
    async fn mmio_read(&self, register: Register, _dma: &Dma) -> Result<u64, MmioRefusal> {
        match register.offset {
            0 => Ok(REGISTER_VALUE),
            offset => Err(MmioRefusal::new(format!("there is no register at {offset:#x}"))),
        }
    }
    async fn mmio_write(&self, _register: Register, _value: u64, _dma: &Dma) -> Result<(), MmioRefusal> {
        Ok(())
    }
    async fn reset(&self) {}
}

/// A connected device. It leaves when it is dropped.
#[derive(Debug)]
pub struct Device {
    /// Its DMA.
    pub dma: Dma,
    stop: CancellationToken,
    agent: JoinHandle<Result<(), EndReason>>,
}

impl Device {
    /// Connects, and returns once the session stands.
    pub async fn attach(server: &Server, endpoint: &str, name: &str, address: DeviceAddress) -> Self {
        Self::attach_with(server, endpoint, name, address, Reconnect::STANDARD).await
    }

    /// The same, with a policy of its own.
    pub async fn attach_with(
        server: &Server,
        endpoint: &str,
        name: &str,
        address: DeviceAddress,
        reconnect: Reconnect,
    ) -> Self {
        let stop = CancellationToken::new();
        let identity = Identity { name: name.to_owned(), role: Role::Device(address) };
        server.admit(&identity).expect("certificates can be issued");
        let agent = Agent::builder(endpoint, name, address)
            .credentials(Credentials::from_directory(server.pki()))
            .reconnect(reconnect)
            .stop_on(stop.clone())
            .build();
        let dma = agent.dma();
        let agent = tokio::spawn(async move { agent.run(Plain).await });
        let connected = tokio::time::timeout(SOON, dma.connected()).await.expect("the session stands soon");
        if connected.is_none() {
            panic!("{name} at {address} was not admitted: {:?}", agent.await);
        }
        Self { dma, stop, agent }
    }

    /// How the agent ends by itself.
    pub async fn ended(mut self) -> Result<(), EndReason> {
        let ended = tokio::time::timeout(SOON, &mut self.agent).await;
        ended.expect("the agent ends soon").expect("the agent does not panic")
    }

    /// Leaves, and waits until it is gone.
    pub async fn leave(mut self) {
        self.stop.cancel();
        let left = tokio::time::timeout(Duration::from_secs(5), &mut self.agent).await;
        left.expect("the agent stops when asked")
            .expect("the agent does not panic")
            .expect("it was only asked to stop");
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.stop.cancel();
        self.agent.abort();
    }
}

/// The fault that an operation ended with.
pub fn fault<T: std::fmt::Debug>(ended: Result<T, DmaError>) -> DmaFault {
    match ended {
        Err(DmaError::Fault(fault)) => fault,
        other => panic!("a refused DMA was expected, and it ended so: {other:?}"),
    }
}
