//! Maps a buffer for a device, lets the device work on it, and unmaps it. The device is `echo_device`: it
//! inverts the 8 bytes at the address that is written to its register. Both are known to the server's default configuration.

use guest_sdk::{Connection, Direction, Owner};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let driver = Connection::to("https://127.0.0.1:7450").driver("driver1", Owner::Driver(1)).await?;
    let device = driver.device("00:02.0".parse()?);

    let buffer = driver.allocate(4096).await?;
    buffer.write(0, 0x0123_4567_89ab_cdef_u64.to_le_bytes().to_vec()).await?;

    let mapping = driver.dma_map_single(&device, buffer.range(), Direction::Bidirectional).await?;
    device.write64(0, mapping.iova().get()).await?;
    mapping.unmap().await?; // from here on, the device cannot reach the buffer

    assert_eq!(buffer.read(0, 8).await?, (!0x0123_4567_89ab_cdef_u64).to_le_bytes().as_slice());
    Ok(())
}
