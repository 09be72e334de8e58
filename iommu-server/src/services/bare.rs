//! `BareMachineService`: machines whose creator plays the operating system.

use std::sync::Arc;

use bytes::BytesMut;
use iommu_hardware::vtd::EventMessage;
use iommu_proto::errors::WireError;
use iommu_proto::model::{
    self, CreateMachine, CreatedMachine, DestroyMachine, MachineInterrupt, Machines, ReadMachineMemory,
    ReadRegister, WatchMachineInterrupts, WriteMachineMemory, WriteRegister,
};
use iommu_proto::pb;
use iommu_proto::pb::bare_machine_service_server::BareMachineService;
use iommu_types::HpaRange;
use iommu_types::errors::{MemoryError, MmioError, NoMemory, NotYours};
use tonic::{Request, Response, Status};

use super::driver::{mmio_call, watcher};
use super::feed::{Feed, feed};
use super::memory::within_batch;
use super::{Caller, enter, internal, parse};
use crate::host::Host;
use crate::interrupts::Signal;
use crate::machine::Machine;

/// The service.
#[derive(Clone, Debug)]
pub struct BareMachines {
    /// The host.
    pub host: Arc<Host>,
}

impl BareMachines {
    /// A machine of the caller.
    fn machine(&self, caller: &Caller, segment: u16) -> Result<Arc<Machine>, Status> {
        let machine = self.host.machines.get(segment).map_err(WireError::into_status)?;
        if !caller.bare()?.owns(segment) {
            return Err(NotYours { object: format!("the machine at segment {segment:04x}") }.into_status());
        }
        Ok(machine)
    }
    async fn mmio(&self, caller: &Caller, mmio: model::Mmio) -> Result<u64, Status> {
        let device = self.host.devices.get(mmio.device).map_err(WireError::into_status)?;
        if !caller.bare()?.owns(mmio.device.segment) {
            let object = device.address.to_string();
            return Err(MmioError::from(NotYours { object }).into_status());
        }
        mmio_call(&self.host, mmio, None).await.map_err(WireError::into_status)
    }
}

/// Memory of the machine, all of it and not too much at once.
fn check_range(machine: &Machine, range: HpaRange) -> Result<(), MemoryError> {
    within_batch(range.size_bytes())?;
    if machine.memory().contains(range) {
        return Ok(());
    }
    // The first address that is not memory.
    let first = machine.memory().ranges().into_iter().find(|ram| ram.contains(range.base()));
    let address = first.map_or(range.base().get(), |ram| ram.last().get() + 1);
    Err(NoMemory { address }.into())
}

fn told(signal: Signal, count: u32) -> pb::MachineInterrupt {
    match signal {
        Signal::Device { device, vector, destination } => {
            MachineInterrupt::Device(model::Interrupt { device, vector, destination, count }).into()
        }
        Signal::Event(EventMessage { address, data }) => {
            MachineInterrupt::Event(model::EventMessage { address, data }).into()
        }
    }
}

fn described(machine: &Machine) -> model::Machine {
    model::Machine {
        segment: machine.segment,
        memory_bytes: machine.memory().size_bytes(),
        devices: machine.devices.clone(),
    }
}

#[tonic::async_trait]
impl BareMachineService for BareMachines {
    async fn create(
        &self,
        request: Request<pb::CreateMachineRequest>,
    ) -> Result<Response<pb::CreateMachineResponse>, Status> {
        let caller = Caller::of(&request)?;
        let wanted: CreateMachine = parse(request.into_inner())?;
        let inside = enter(&caller.session)?;
        let (host, client) = (Arc::clone(&self.host), Arc::clone(caller.bare()?));
        // Memory is allocated whole, which blocks: 0.3 ms a MiB.
        let runtime = tokio::runtime::Handle::current();
        let made = tokio::task::spawn_blocking(move || {
            let _inside = inside;
            let _runtime = runtime.enter();
            host.machines.create(&host, &client, wanted)
        });
        let machine = match made.await {
            Ok(made) => made.map_err(WireError::into_status)?,
            Err(_) => return Err(internal("making a machine ended early")),
        };
        let capabilities = *machine.unit().capabilities();
        Ok(Response::new(CreatedMachine { segment: machine.segment, capabilities }.into()))
    }

    async fn destroy(
        &self,
        request: Request<pb::DestroyMachineRequest>,
    ) -> Result<Response<pb::DestroyMachineResponse>, Status> {
        let caller = Caller::of(&request)?;
        let DestroyMachine { segment } = parse(request.into_inner())?;
        self.machine(&caller, segment)?;
        let destroyed = self.host.machines.destroy(&self.host, caller.bare()?, segment);
        destroyed.map_err(WireError::into_status)?;
        Ok(Response::new(pb::DestroyMachineResponse {}))
    }

    async fn list(
        &self,
        request: Request<pb::ListMachinesRequest>,
    ) -> Result<Response<pb::ListMachinesResponse>, Status> {
        let caller = Caller::of(&request)?;
        let machines = caller.bare()?.machines().iter().map(|machine| described(machine)).collect();
        Ok(Response::new(Machines { machines }.into()))
    }

    async fn read_register(
        &self,
        request: Request<pb::ReadRegisterRequest>,
    ) -> Result<Response<pb::ReadRegisterResponse>, Status> {
        let caller = Caller::of(&request)?;
        let ReadRegister { segment, offset, width_bytes } = parse(request.into_inner())?;
        let value = self.machine(&caller, segment)?.read_register(offset, width_bytes);
        Ok(Response::new(pb::ReadRegisterResponse { value: value.map_err(WireError::into_status)? }))
    }

    async fn write_register(
        &self,
        request: Request<pb::WriteRegisterRequest>,
    ) -> Result<Response<pb::WriteRegisterResponse>, Status> {
        let caller = Caller::of(&request)?;
        let WriteRegister { segment, offset, width_bytes, value } = parse(request.into_inner())?;
        let written = self.machine(&caller, segment)?.write_register(offset, width_bytes, value);
        written.map_err(WireError::into_status)?;
        Ok(Response::new(pb::WriteRegisterResponse {}))
    }

    async fn read_memory(
        &self,
        request: Request<pb::ReadMachineMemoryRequest>,
    ) -> Result<Response<pb::ReadMachineMemoryResponse>, Status> {
        let caller = Caller::of(&request)?;
        let ReadMachineMemory { segment, range } = parse(request.into_inner())?;
        let machine = self.machine(&caller, segment)?;
        check_range(&machine, range).map_err(WireError::into_status)?;
        let mut data = BytesMut::zeroed(range.size_bytes() as usize);
        let read = machine.memory().read_units(range.base(), &mut data);
        read.map_err(|_| NoMemory { address: range.base().get() }.into_status())?;
        Ok(Response::new(pb::ReadMachineMemoryResponse { data: data.freeze() }))
    }

    async fn write_memory(
        &self,
        request: Request<pb::WriteMachineMemoryRequest>,
    ) -> Result<Response<pb::WriteMachineMemoryResponse>, Status> {
        let caller = Caller::of(&request)?;
        let WriteMachineMemory { segment, range, data } = parse(request.into_inner())?;
        let machine = self.machine(&caller, segment)?;
        check_range(&machine, range).map_err(WireError::into_status)?;
        let written = machine.memory().write_units(range.base(), &data);
        written.map_err(|_| NoMemory { address: range.base().get() }.into_status())?;
        Ok(Response::new(pb::WriteMachineMemoryResponse {}))
    }

    type WatchInterruptsStream = Feed<pb::WatchMachineInterruptsResponse>;

    async fn watch_interrupts(
        &self,
        request: Request<pb::WatchMachineInterruptsRequest>,
    ) -> Result<Response<Self::WatchInterruptsStream>, Status> {
        let caller = Caller::of(&request)?;
        let place = watcher(&caller)?;
        let WatchMachineInterrupts { segment } = parse(request.into_inner())?;
        let machine = self.machine(&caller, segment)?;
        let subscription = machine.interrupts.subscribe();
        let stream = feed(&self.host, &caller, Some(place), |sender| async move {
            sender.send(Ok(pb::WatchMachineInterruptsResponse::default())).await?;
            loop {
                let signals = tokio::select! {
                    signals = subscription.next() => signals,
                    () = machine.wait_gone() => return Ok(()),
                };
                let interrupts = signals.into_iter().map(|(signal, count)| told(signal, count)).collect();
                sender.send(Ok(pb::WatchMachineInterruptsResponse { interrupts })).await?;
            }
        });
        Ok(Response::new(stream))
    }

    async fn mmio_read(
        &self,
        request: Request<pb::MmioReadRequest>,
    ) -> Result<Response<pb::MmioReadResponse>, Status> {
        let caller = Caller::of(&request)?;
        let value = self.mmio(&caller, parse(request.into_inner())?).await?;
        Ok(Response::new(pb::MmioReadResponse { value }))
    }

    async fn mmio_write(
        &self,
        request: Request<pb::MmioWriteRequest>,
    ) -> Result<Response<pb::MmioWriteResponse>, Status> {
        let caller = Caller::of(&request)?;
        self.mmio(&caller, parse(request.into_inner())?).await?;
        Ok(Response::new(pb::MmioWriteResponse {}))
    }
}
