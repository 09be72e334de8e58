//! A device with one register: writing an address to it makes the device read 8 bytes there, and write them
//! back inverted.

use device_runtime::{Agent, DeviceModel, Dma, MmioRefusal, Register};
use iommu_types::Iova;

struct Echo;

impl DeviceModel for Echo {
    async fn mmio_read(&self, register: Register, _: &Dma) -> Result<u64, MmioRefusal> {
        Err(MmioRefusal::new(format!("register {:#x} is write-only", register.offset)))
    }

    async fn mmio_write(&self, _: Register, address: u64, dma: &Dma) -> Result<(), MmioRefusal> {
        let iova = Iova::new(address);
        let mut word = [0; 8];
        // Both go through the IOMMU; a refusal is an ordinary error, which the driver is told here.
        dma.read_into(iova, &mut word).await.map_err(|error| MmioRefusal::new(error.to_string()))?;
        let inverted = (!u64::from_le_bytes(word)).to_le_bytes().to_vec();
        dma.write(iova, inverted).await.map_err(|error| MmioRefusal::new(error.to_string()))
    }

    async fn reset(&self) {}
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let address = "00:02.0".parse()?;
    Agent::builder("https://127.0.0.1:7450", "engine1", address).run(Echo).await?;
    Ok(())
}
