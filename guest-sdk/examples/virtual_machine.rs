//! Creates a virtual machine with memory and a device, uses them as its driver would, and takes them away. The server's default configuration has the
//! device, 00:03.0, which belongs to nobody.

use guest_sdk::{Connection, DEFAULT_ENDPOINT, Direction, Gpa, GpaRange, Revocation, VmOptions};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let hypervisor = Connection::to(DEFAULT_ENDPOINT).hypervisor("hv0").await?;
    let vm = hypervisor.create_vm(VmOptions::new("guest1")).await?;
    let memory = GpaRange::new(Gpa::new(0x10_0000), 1 << 20)?;
    vm.add_memory(memory).await?;
    vm.assign("00:03.0".parse()?).await?; // with all of its isolation group

    // The guest, usually a process of its own: an ordinary driver, whose buffers are its machine's memory.
    let guest = Connection::to(DEFAULT_ENDPOINT).driver("guest1", vm.owner()).await?;
    let device = guest.device("00:03.0".parse()?);
    let buffer = guest.allocate(4096).await?;
    let mapping = guest.dma_map_single(&device, buffer.range(), Direction::FromDevice).await?;
    mapping.leave_mapped();

    // The guest has not unmapped; memory that is taken back by force is out of the device's reach all the same.
    assert_eq!(vm.remove_memory(memory, Revocation::Revoke).await?, 1);
    vm.destroy().await?;
    Ok(())
}
